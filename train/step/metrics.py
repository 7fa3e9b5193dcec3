"""Compute what is measured in a step: losses, speeds, counts."""

from collections.abc import Sequence

from model.loss import LossTotals
from train.health.memory import GIB
from train.health.stragglers import summary
from train.run.metrics_file import Line
from train.step.reduction import Agreed


def step_line(
    step: int,
    totals: LossTotals,
    agreed: Agreed,
    objectives: Sequence[str],
    *,
    grad_norm: float | None,
    lr: float,
    seconds: float,
    flops: float,
    world_size: int,
    peak_tflops: float | None,
) -> Line:
    """One step's line of metrics, for the global batch unless a unit says otherwise.

    Losses are in nats per target token, z-loss included. `tokens_per_s` counts real encoder (visual ones too) and
    decoder tokens; `padding_fraction` is the share of positions that are computed (after `data.trim_multiple`) without
    holding one, `truncated` the examples whose text was cut to fit a row. `tflop` is the step's model arithmetic.
    `data_wait_s` is of the slowest rank, `memory_gib` of the fullest one. `mfu` is null where the peak is unknown.
    `step_s`, `compute_s`, `communication_wait_s` and `…rank…` are of the step before (`rank_times.summary`): ranks tell
    each other once a step. `added_micro_batches` hold no example: ranks compute them because another one has more.
    """
    real = agreed.encoder_tokens + agreed.num_targets
    tflops = flops / seconds / world_size / 1e12
    line: Line = {"step": step, **losses(totals, objectives)}
    line |= {f"examples/{name}": count for name, count in zip(objectives, agreed.examples, strict=True)}
    line |= {
        "grad_norm": grad_norm,
        "lr": lr,
        "examples_per_s": sum(agreed.examples) / seconds,
        "tokens_per_s": real / seconds,
        "tflop": flops / 1e12,
        "tflops_per_device": tflops,
        "mfu": tflops / peak_tflops if peak_tflops else None,
        "padding_fraction": 1.0 - real / agreed.positions,
        "truncated": agreed.truncated,
        "added_micro_batches": agreed.added_micro_batches,
        "data_wait_s": agreed.data_wait_s,
        "memory_gib": agreed.memory_bytes / GIB,
        **summary(agreed.times),
    }
    return line | {f"skipped/{cause}": count for cause, count in agreed.skipped.items()}


def losses(totals: LossTotals, objectives: Sequence[str], prefix: str = "") -> Line:
    """`loss` and `z_loss` per target token; `loss/<objective>` and `accuracy/<objective>` of tokens where it occurs.

    Without any target token there is no loss: null, not 0.
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
