"""What is measured in a step, and the file that keeps it: `metrics.jsonl`, one line a step."""

import json
import math
import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import torch

from common.files import raise_with_name, write_text
from model.loss import LossTotals
from train.health.stragglers import summary
from train.run.kept_files import free_name
from train.step.reduction import Agreed

Line = dict[str, Any]
GIB = 2**30


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


def memory_bytes(device: torch.device) -> int:
    """Peak of this process: allocated on the GPU, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux reports KiB


class MetricsFile:
    """`metrics.jsonl`, appended to. One that is opened again at a restored step forgets the steps after it.

    Lines of which none would be left are kept beside it, in the file that `kept` names.
    """

    def __init__(self, path: Path, restored_step: int) -> None:
        self.path = path
        self.kept: Path | None = None
        if path.exists():
            self._cut(restored_step)
        self.file: TextIO = path.open("a", encoding="utf-8")

    def forget_after(self, step: int) -> None:
        """The steps after `step` will be run again."""
        self.file.close()
        self._cut(step)
        self.file = self.path.open("a", encoding="utf-8")

    def _cut(self, step: int) -> None:
        """Cut off the lines of later steps, and a last line that a kill left half written."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        self.kept = None
        left = [text for text in lines if _step_of(text) <= step]
        if not left and any(_step_of(text) < math.inf for text in lines):
            self.kept = free_name(self.path)
            os.replace(self.path, self.kept)
        write_text(self.path, "".join(text + "\n" for text in left), durable=True)

    def write(self, line: Line) -> None:
        """Append one line; a value that is not finite becomes null (JSON knows no NaN)."""
        text = json.dumps({key: _finite(value) for key, value in line.items()}, allow_nan=False)
        try:
            self.file.write(f"{text}\n")
            self.file.flush()
        except OSError as error:
            with suppress(OSError):  # it would be written once more, and fail without its name
                self.file.close()
            raise_with_name(error, self.path)

    def close(self) -> None:
        self.file.close()


def _step_of(text: str) -> float:
    try:
        return float(json.loads(text)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
