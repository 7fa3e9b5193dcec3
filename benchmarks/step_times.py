"""Compare the plan's step times with real steps of one and two ranks on this machine.

    python -m benchmarks.calibrate output=runs/cpu.yaml          # first: the machine at hand
    python -m benchmarks.step_times hardware=runs/cpu.yaml

Rounds take every layout in turn, each in a world of its own; a layout's time is the median over rounds of its median
step. One rank is timed by its CPU time; two ranks by the clock, so other processes disturb them: raise the priority
(`nice -n -10`) on a shared machine.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.one_rank import full_rows
from benchmarks.parallel.toy import run_ranks
from common.command_line import parse, run_command
from common.errors import ConfigurationError
from parallel.distributed import launch
from parallel.engine.build import build_engine
from parallel.layout import Layout
from parallel.plan.cut import cut
from parallel.plan.hardware import Hardware, read_hardware
from parallel.plan.memory import MemoryModel
from parallel.plan.search import Search
from parallel.plan.step_time import StepModel, StepTime
from train.build import expected_step_shape
from train.config import RunConfig
from train.phases import for_phase, spans
from train.plan import read_config
from train.settings.planning import make_search

SMALL = (
    "vit=base vit.depth=2 mt5=small mt5.num_encoder_layers=3 mt5.num_decoder_layers=3 mt5.vocab_size=16000 "
    "data.encoder_length=320 data.decoder_length=64 data.global_batch_size=4 data.images_per_row=1 data.num_streams=2 "
    "run.precision=fp32"
)
CASES = {  # name: (ranks, words)
    "frozen ViT": (1, ""),
    "everything trained": (1, "phases=full_224"),
    "recompute=block": (1, "parallel.recompute=block"),
    "micro-batch 2": (1, "parallel.micro_batch_size=2"),
    "bf16": (1, "run.precision=bf16"),
    "AdamW": (1, "optimizer=adamw"),
    "wider": (1, "mt5=base mt5.num_encoder_layers=2 mt5.num_decoder_layers=2"),
    "replicas": (2, ""),
    "ZeRO-1": (2, "parallel.zero_stage=1"),
    "ZeRO-2": (2, "parallel.zero_stage=2"),
    "ZeRO-3": (2, "parallel.zero_stage=3"),
    "tensor 2": (2, "parallel.tensor=2"),
    "tensor 2, sequence": (2, "parallel.tensor=2 parallel.sequence=true"),
    "pipeline 2": (2, "parallel.pipeline=2"),
    "pipeline 2, interleaved": (2, "parallel.pipeline=2 parallel.virtual_stages=2"),
}


@dataclass
class Options:
    """Compare the plan's step times with real steps on this machine."""

    hardware: str = "cpu"
    """File of conf/hardware, or a path ending in .yaml, that describes this machine."""
    rounds: int = 5
    """Worlds of each layout."""
    steps: int = 1
    """Timed steps of each world, after one warm-up step."""
    cases: list[str] = field(default_factory=lambda: list(CASES))
    """Layouts to compare, by name; all by default."""

    def __post_init__(self) -> None:
        """Raise ConfigurationError for an unknown layout."""
        for name in self.cases:
            if name not in CASES:
                raise ConfigurationError(f"cases={name!r} is unknown; choose from {', '.join(CASES)}.")


def case_config(words: str) -> RunConfig:
    """Compose the run of a case, in its first phase; later words replace earlier ones."""
    both = {word.partition("=")[0]: word for word in [*SMALL.split(), *words.split()]}
    config = read_config([*both.values()])
    return for_phase(config, spans(config)[0])


def timed(folder: Path, words: str, steps: int) -> None:
    """Take steps of a case in a world that has started; write seconds by the clock and of CPU of each."""
    config = case_config(words)
    layout = Layout.start(config.parallel, launch())
    shape = expected_step_shape(config, layout.data_parallel_size)
    freeze = spans(config)[0].phase.freeze
    engine = build_engine(
        config.pali, config.optimizer, layout, precision=config.run.precision, freeze=freeze, seed=0, step=shape
    )
    batch = full_rows(shape.micro_batch, config.model.image_size)
    batches = [batch] * shape.num_micro_batches
    targets = shape.num_micro_batches * batch.num_targets * layout.data_parallel_size
    wall, cpu = [], []
    for _ in range(steps + 1):
        layout.barrier()
        began, used = time.perf_counter(), time.process_time()
        engine.forward_backward(batches, targets)
        engine.update(1e-4)
        layout.barrier()
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    torch.save({"wall": wall[1:], "cpu": cpu[1:]}, folder / f"{layout.rank}.pt")


def planned_step(
    config: RunConfig, hardware: Hardware, ranks: int, phase: int = 0, micro_batches: int = 0
) -> tuple[Search, StepModel, list[int]]:
    """Return the search, the model of a step and the cut of the engine that `config` (of a phase) would build.

    `micro_batches`: of a rank's step; 0 by default: as many as the global batch gives it.
    """
    search = make_search(config, hardware, ranks)
    model, _ = search.step_model(search.phases[phase], config.parallel)
    if micro_batches:
        model = replace(model, step=replace(model.step, num_micro_batches=micro_batches))
    starts = [0]
    if config.parallel.pipeline > 1:
        memory = MemoryModel(config.parallel, config.optimizer, model.step, model.data_parallel_size)
        names = [info.name for info in model.infos]
        starts = [names.index(stage.units[0]) for stage in cut(model.costs, memory)]
    return search, model, starts


def predicted(words: str, ranks: int, hardware: Hardware) -> StepTime:
    """Predict the step of a case."""
    _, model, starts = planned_step(case_config(words), hardware, ranks)
    return model.time(starts)


def measure(names: Sequence[str], rounds: int, steps: int) -> dict[str, list[float]]:
    """Return the median step of every round of each case: CPU time of one rank, else the slowest rank's clock."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            ranks, words = CASES[name]
            each = run_ranks(ranks, timed, words, steps)
            kind = "cpu" if ranks == 1 and not torch.cuda.is_available() else "wall"
            found[name].append(max(statistics.median(rank[kind]) for rank in each))
    return found


def main(options: Options) -> None:
    """Print the table."""
    hardware = read_hardware(options.hardware)
    table = Table(title=f"step times on {hardware.name}: medians of {options.rounds} rounds of {options.steps} steps")
    for column in ("layout", "ranks", "measured", "least .. most", "predicted", "deviation", "largest parts"):
        table.add_column(column, justify="left" if column in ("layout", "largest parts") else "right", no_wrap=True)
    found = measure(options.cases, options.rounds, options.steps)
    for name, seconds in found.items():
        ranks, words = CASES[name]
        time_of_step = predicted(words, ranks, hardware)
        middle = statistics.median(seconds)
        parts = sorted(time_of_step.parts().items(), key=lambda part: -part[1])[:4]
        table.add_row(
            name,
            str(ranks),
            f"{middle:.3f} s",
            f"{min(seconds):.3f} .. {max(seconds):.3f}",
            f"{time_of_step.seconds:.3f} s",
            f"{time_of_step.seconds / middle - 1:+.1%}",
            ", ".join(f"{cause} {part:.2f}" for cause, part in parts),
        )
    Console(width=180).print(table)


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
