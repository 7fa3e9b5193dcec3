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
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.one_rank import OneRank
from common.command_line import parse, run_command, split_own
from common.values import PATH
from parallel.plan.hardware import GIB, read_hardware
from parallel.plan.memory import MemoryModel
from parallel.plan.peak import Peak, PeakModel
from train.build import expected_step_shape
from train.phases import for_phase, spans
from train.plan import read_config
from train.settings.planning import make_search

SHORT = "data.encoder_length=320 data.decoder_length=64 data.images_per_row=1 parallel.micro_batch_size=1"
CASES = {
    "z0": f"model=pali_700m {SHORT} micro_batches=2 world_size=2 rank=1",
    "z1": f"model=pali_700m {SHORT} micro_batches=2 world_size=16 rank=1 parallel=zero1",
    "z2": f"model=pali_700m {SHORT} micro_batches=2 world_size=16 rank=1 parallel=zero2",
    "z3": f"model=pali_700m {SHORT} micro_batches=2 world_size=16 rank=1 parallel=zero3",
    "tp2seq": f"model=pali_700m {SHORT} micro_batches=2 world_size=16 rank=1 parallel=tp2",
    "pp2a": f"model=pali_700m {SHORT} world_size=16 rank=1 parallel=zero1 parallel.pipeline=2 micro_batches=4",
    "pp2b": f"model=pali_700m {SHORT} world_size=16 rank=9 parallel=zero1 parallel.pipeline=2 micro_batches=4",
    "z3tp2": f"model=pali_700m {SHORT} micro_batches=2 world_size=16 rank=1 parallel=tp2 parallel.zero_stage=3",
    "17b_pp": f"model=pali_17b {SHORT} micro_batches=4 steps=1 world_size=1024 rank=1016 parallel=tp8_pp4_zero1",
    "3b_z3": f"model=pali_3b {SHORT} micro_batches=1 world_size=64 rank=3 parallel=zero3",
    "15_tp4": f"model=pali_1_5b {SHORT} micro_batches=1 world_size=64 rank=3 parallel=tp4_zero1",
    "17b_z3": f"model=pali_17b {SHORT} micro_batches=1 world_size=1024 rank=0 parallel=tp4_zero3",
    "z3step": f"model=pali_700m {SHORT} micro_batches=2 world_size=16 rank=1 parallel=zero3 parallel.gather=step",
}


@dataclass
class Options:
    """Compare the plan with one real rank."""

    folder: str = field(default="runs/scale", metadata=PATH)
    """Folder of the results."""
    cases: list[str] = field(default_factory=lambda: list(CASES))
    """Cases to print, by name; all by default."""
    measure: bool = True
    """Run the cases that have no result yet. False prints those that have one."""


def predicted(words: Sequence[str]) -> Peak:
    """Predict the memory of the rank that `benchmarks.one_rank` would run: as on a CPU."""
    own, rest = split_own(words, OneRank)
    config = read_config(rest)
    span = spans(config)[own.phase]
    config = for_phase(config, span)
    hardware = read_hardware("cpu")
    search = make_search(config, hardware, own.world_size)
    phase = search.phases[own.phase]
    data = config.parallel.data_parallel_size(own.world_size)
    step = expected_step_shape(config, data)
    if own.micro_batches:
        step = type(step)(step.micro_batch, own.micro_batches)
    costs, infos = search.costs(phase, config.parallel, step.micro_batch)
    memory = MemoryModel(config.parallel, config.optimizer, step, data)
    starts = [0]
    if config.parallel.pipeline > 1:
        from parallel.plan.cut import cut

        names = [info.name for info in infos]
        starts = [names.index(stage.units[0]) for stage in cut(costs, memory)]
    pipeline_rank = own.rank // (own.world_size // config.parallel.pipeline)
    return PeakModel(memory, hardware, costs, infos, fused=False, on_gpu=False).peaks(starts)[pipeline_rank]


def measured(name: str, folder: Path, run: bool) -> dict[str, Any] | None:
    """Return the result of a case, from its file or by running it."""
    file = folder / f"{name}.json"
    if not file.exists() and run:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "benchmarks.one_rank", *CASES[name].split(), f"output={file}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def main(options: Options) -> None:
    """Print the table."""
    table = Table(title="memory of one rank: most bytes of live tensors in a step")
    for column in ("case", "words of benchmarks.one_rank", "measured", "predicted", "deviation", "at"):
        table.add_column(column, justify="right" if column in ("measured", "predicted", "deviation") else "left")
    for name in options.cases:
        found = measured(name, Path(options.folder), options.measure)
        if found is None:
            continue
        peak = predicted(CASES[name].split())
        table.add_row(
            name,
            CASES[name],
            f"{found['peak'] / GIB:.3f} GiB",
            f"{peak.tensors / GIB:.3f} GiB",
            f"{peak.tensors / found['peak'] - 1:+.1%}",
            peak.moment,
        )
    Console(width=180).print(table)


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
