"""Compute the metrics of a step: losses, counts and speeds."""

from collections.abc import Sequence

from data.objectives import NAMES
from model.loss import LossTotals
from train.health.memory import GIB
from train.health.stragglers import summary
from train.run.metrics_file import Line
from train.step.flops import FlopCounter
from train.step.reduction import StepStats


class StepMetrics:
    """Compute the line of metrics of each step of a phase, for the global batch unless a unit states otherwise."""

    def __init__(self, flops: FlopCounter, world_size: int, peak_tflops: float | None) -> None:
        """`peak_tflops`: the peak of one device, None where it is unknown."""
        self.flops, self.world_size, self.peak_tflops = flops, world_size, peak_tflops

    def line(
        self,
        step: int,
        totals: LossTotals,
        stats: StepStats,
        *,
        seconds: float,
        learning_rate: float,
        grad_norm: float | None,
    ) -> Line:
        """Return one step's metrics; `seconds`: its duration; `grad_norm`: None where it was skipped.

        `data_wait_s` and `memory_gib` are maxima over ranks. `step_s`, `compute_s`, `communication_wait_s` and
        `…rank…` describe the previous step, because ranks exchange their times once a step
        (`train.health.stragglers.summary`). `added_micro_batches` hold no example: ranks compute them because another
        rank has more.
        """
        return {
            "step": step,
            **losses(totals, NAMES),
            **{f"examples/{name}": count for name, count in stats.examples.items()},
            "grad_norm": grad_norm,
            "lr": learning_rate,
            **self.speeds(stats, seconds),
            "truncated": stats.truncated,
            "added_micro_batches": stats.added_micro_batches,
            "data_wait_s": stats.data_wait_s,
            "memory_gib": stats.memory_bytes / GIB,
            **summary(stats.times),
            **{f"skipped/{cause}": count for cause, count in stats.skipped.items()},
        }

    def speeds(self, stats: StepStats, seconds: float) -> Line:
        """Return throughput and efficiency of a step.

        `tokens_per_s` counts real encoder tokens (visual ones too) and decoder tokens. `tflop` is the arithmetic of the
        model in the step. `mfu` is null where the device's peak is unknown. `padding_fraction` is the share of computed
        positions (after `data.trim_multiple`) that hold no token.
        """
        examples, tokens = sum(stats.examples.values()), stats.encoder_tokens + stats.num_targets
        tflop = self.flops.step(examples, stats.images, stats.encoder_tokens, stats.num_targets) / 1e12
        tflops_per_device = tflop / seconds / self.world_size
        return {
            "examples_per_s": examples / seconds,
            "tokens_per_s": tokens / seconds,
            "tflop": tflop,
            "tflops_per_device": tflops_per_device,
            "mfu": tflops_per_device / self.peak_tflops if self.peak_tflops else None,
            "padding_fraction": 1.0 - tokens / stats.positions,
        }


def losses(totals: LossTotals, objectives: Sequence[str], prefix: str = "") -> Line:
    """Return `loss` and `z_loss`, and `loss/<objective>` and `accuracy/<objective>` of objectives with targets.

    Losses are in nats per target token, z-loss included. Without any target token there is no loss: null, not 0.
    """
    nll, z_loss, correct, tokens = (
        part.double().tolist() for part in (totals.nll, totals.z_loss, totals.correct, totals.tokens)
    )
    count = sum(tokens)
    if not count:
        return {f"{prefix}loss": None, f"{prefix}z_loss": None}
    line: Line = {f"{prefix}loss": (sum(nll) + sum(z_loss)) / count, f"{prefix}z_loss": sum(z_loss) / count}
    for i, name in enumerate(objectives):
        if tokens[i]:
            line[f"{prefix}loss/{name}"] = (nll[i] + z_loss[i]) / tokens[i]
            line[f"{prefix}accuracy/{name}"] = correct[i] / tokens[i]
    return line
