"""Compare the plan with one real rank: memory and collectives, predicted beside measured.

    python -m benchmarks.scale folder=runs/scale            # runs the cases that have no result there yet, then prints

Each case is `benchmarks.one_rank` in a process of its own; its numbers stay in the folder as JSON.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.one_rank import OneRank
from benchmarks.step_times import planned_step
from common.command_line import parse, run_command, split_own
from common.values import PATH
from model.pali import plan_on_meta
from parallel.layout import planned_tensor_parallel
from parallel.plan.hardware import GIB, read_hardware
from parallel.plan.peak import Peak
from parallel.traffic import Kind, RankTraffic, Traffic
from train.phases import for_phase, spans
from train.plan import read_config

SHORT = "data.encoder_length=320 data.decoder_length=64 data.images_per_row=1 parallel.micro_batch_size=1"
MANY = "world_size=16 micro_batches=2"  # of pali_700m


class Case(NamedTuple):
    """One rank: its model, its layout in a few words, and the other words of `benchmarks.one_rank`."""

    model: str
    layout: str
    words: str

    @property
    def command(self) -> list[str]:
        """Return the words of `benchmarks.one_rank`."""
        return [f"model={self.model}", *SHORT.split(), *self.words.split()]


CASES = {
    "z0": Case("pali_700m", "2 ranks, ZeRO-0", "micro_batches=2 world_size=2 rank=1"),
    "z1": Case("pali_700m", "16 ranks, ZeRO-1", f"{MANY} rank=1 parallel=zero1"),
    "z2": Case("pali_700m", "16 ranks, ZeRO-2", f"{MANY} rank=1 parallel=zero2"),
    "z3": Case("pali_700m", "16 ranks, ZeRO-3", f"{MANY} rank=1 parallel=zero3"),
    "z3step": Case(
        "pali_700m", "16 ranks, ZeRO-3, `gather=step`", f"{MANY} rank=1 parallel=zero3 parallel.gather=step"
    ),
    "tp2seq": Case("pali_700m", "16 ranks, tensor 2 with sequence, ZeRO-1", f"{MANY} rank=1 parallel=tp2"),
    "z3tp2": Case(
        "pali_700m", "16 ranks, tensor 2 with sequence, ZeRO-3", f"{MANY} rank=1 parallel=tp2 parallel.zero_stage=3"
    ),
    "pp2a": Case(
        "pali_700m", "16 ranks, pipeline 2, ZeRO-1, first stage",
        "world_size=16 micro_batches=4 rank=1 parallel=zero1 parallel.pipeline=2",
    ),
    "pp2b": Case(
        "pali_700m", "16 ranks, pipeline 2, ZeRO-1, last stage",
        "world_size=16 micro_batches=4 rank=9 parallel=zero1 parallel.pipeline=2",
    ),
    "15_tp4": Case(
        "pali_1_5b", "64 ranks, tensor 4, ZeRO-1, one micro-batch",
        "micro_batches=1 world_size=64 rank=3 parallel=tp4_zero1",
    ),
    "3b_z3": Case(
        "pali_3b", "64 ranks, ZeRO-3, one micro-batch", "micro_batches=1 world_size=64 rank=3 parallel=zero3"
    ),
    "17b_z3": Case(
        "pali_17b", "1,024 ranks, tensor 4, ZeRO-3, one micro-batch",
        "micro_batches=1 world_size=1024 rank=0 parallel=tp4_zero3",
    ),
    "17b_pp": Case(
        "pali_17b", "1,024 ranks, tensor 8, pipeline 4, ZeRO-1, last stage",
        "micro_batches=4 steps=1 world_size=1024 rank=1016 parallel=tp8_pp4_zero1",
    ),
}  # fmt: skip


@dataclass
class Options:
    """Compare the plan with one real rank."""

    folder: str = field(default="runs/scale", metadata=PATH)
    """Folder of the results."""
    cases: list[str] = field(default_factory=lambda: list(CASES))
    """Cases to print, by name; all by default."""
    measure: bool = True
    """Run the cases that have no result yet. False prints those that have one."""


def predicted(words: Sequence[str]) -> tuple[Peak, Traffic]:
    """Predict the memory and the collectives of the rank that `benchmarks.one_rank` would run: as on a CPU."""
    own, rest = split_own(words, OneRank)
    config = read_config(rest)
    span = spans(config)[own.phase]
    config, hardware = for_phase(config, span), read_hardware("cpu")
    search, model, starts = planned_step(config, hardware, own.world_size, own.phase, own.micro_batches)
    stage = own.rank // (own.world_size // config.parallel.pipeline)
    units = plan_on_meta(
        search.phases[own.phase].config, span.phase.freeze, planned_tensor_parallel(config.parallel, own.rank)
    )
    return search.peaks(model, starts)[stage], RankTraffic(model, starts, units, own.rank).count()


def measured(name: str, folder: Path, run: bool) -> dict[str, Any] | None:
    """Return the result of a case, from its file or by running it."""
    file = folder / f"{name}.json"
    if not file.exists() and run:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.one_rank", *CASES[name].command, f"output={file}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def differences(collectives: Sequence[tuple[str, int, int, int]], planned: Traffic) -> str:
    """Return the collectives whose calls or bytes differ from the plan, "equal" where none does."""
    found: dict[Kind, tuple[int, int]] = {(kind, ranks): (calls, size) for kind, ranks, calls, size in collectives}
    wrong = [
        f"{kind} of {ranks}: {found.get((kind, ranks), (0, 0))}, planned {planned.amount((kind, ranks))}"
        for kind, ranks in sorted({*found, *planned.calls})
        if found.get((kind, ranks), (0, 0)) != planned.amount((kind, ranks))
    ]
    return "; ".join(wrong) or "equal"


def row(case: Case, found: dict[str, Any]) -> str:
    """Return a line of the Markdown table: memory and collectives, measured beside predicted."""
    peak, planned = predicted(case.command)
    calls, size = (sum(each[column] for each in found["collectives"]) for column in (2, 3))
    return (
        f"| {case.model} | {case.layout} | {found['peak'] / GIB:.3f} GiB | {peak.tensors / GIB:.3f} GiB | "
        f"{peak.tensors / found['peak'] - 1:+.1%} | {calls:,} | {size / 1e9:.3f} GB | "
        f"{differences(found['collectives'], planned)} |"
    ).replace("%", " %")


def main(options: Options) -> None:
    """Print the table as Markdown."""
    print("| model | layout | measured | predicted | deviation | collectives | bytes | planned |")
    print("|---|---|---:|---:|---:|---:|---:|---|")
    for name in options.cases:
        found = measured(name, Path(options.folder), options.measure)
        if found is not None:
            print(row(CASES[name], found), flush=True)


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
