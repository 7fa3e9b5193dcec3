"""Predict published runs of encoder-decoders, beside their numbers: `python -m benchmarks.published`.

Sources: NVIDIA/NeMo-Framework-Launcher README@996ceb61 sections 7.2.2 and 7.3.2, layouts in conf/training/{t5,mt5};
its tokens are those of the encoder. NVIDIA/JAX-Toolbox rosetta/projects/t5x README@b5dbd838. A factor for each software
(the geometric mean of its rows) is the only calibration.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log

from rich.console import Console
from rich.table import Table

from common.command_line import parse, run_command
from model.config import ModelConfig, MT5Config, PaLIConfig, ViTConfig
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.plan.hardware import read_hardware
from parallel.plan.search import PhasePlan, Rows, Search


@dataclass
class Options:
    """Predict published runs of encoder-decoders."""

    hardware: str = "a100_80"
    """File of conf/hardware; all runs are of A100 80 GB."""


@dataclass(frozen=True)
class Run:
    """A published run: layout, batch and sequences per second."""

    software: str
    name: str
    devices: int
    tensor: int
    micro_batch_size: int
    global_batch_size: int
    sequences_per_s: float
    d_model: int = 2048
    d_ff: int = 5120
    layers: int = 24
    vocab_size: int = 29184
    decoder_length: int = 128
    optimizer: str = "adamw"


XL, XXL, B23 = (2048, 5120, 24), (4096, 10240, 24), (5120, 10880, 36)
T5_3B = ((1, 110769), (2, 215579), (4, 417644), (5, 515100), (10, 957506), (20, 1626353))
MT5_3B = ((1, 91166), (2, 179583), (4, 346263), (5, 429088), (10, 798570), (20, 1303767))
TRILLION_IN = {"11B": 26.5, "23B": 36.0}  # days for 1e12 tokens
RUNS = (
    *(Run("NeMo", f"T5-3B, {n} nodes", 8 * n, 2, 24, 1920, tokens / 512) for n, tokens in T5_3B),
    *(Run("NeMo", f"mT5-3B, {n} nodes", 8 * n, 2, 24, 1920, tokens / 512, *XL, 250112) for n, tokens in MT5_3B),
    Run("NeMo", "T5-11B, 20 nodes", 160, 4, 24, 1920, 1e12 / (TRILLION_IN["11B"] * 86400) / 512, *XXL),
    Run("NeMo", "T5-23B, 40 nodes", 320, 4, 8, 1920, 1e12 / (TRILLION_IN["23B"] * 86400) / 512, *B23),
    Run("T5X", "T5-XL, 144 GPUs", 144, 1, 8, 1152, 3021, *XL, 32128, 114, "adafactor"),
    Run("T5X", "T5-XL, 256 GPUs", 256, 1, 8, 2048, 4322, *XL, 32128, 114, "adafactor"),
    Run("T5X", "T5-XXL, 512 GPUs", 512, 8, 36, 2304, 1887, *XXL, 32128, 114, "adafactor"),
)


def predict(run: Run, hardware: str) -> float:
    """Return sequences per second: our step under that layout, attention not fused, ZeRO-1, no image.

    Sums of gradients follow the passes, because with our overlap the runs of many nodes deviate more.
    """
    mt5 = MT5Config(
        d_model=run.d_model, d_ff=run.d_ff, d_kv=64, num_heads=run.d_model // 64, num_encoder_layers=run.layers,
        num_decoder_layers=run.layers, vocab_size=run.vocab_size,
    )  # fmt: skip
    tower = ViTConfig(width=64, depth=1, mlp_dim=64, num_heads=8)  # next to nothing
    model = PaLIConfig(tower, mt5, ModelConfig(image_size=14, attention="plain"))
    phase = PhasePlan("run", model, (), Rows(run.global_batch_size, 1, 512, run.decoder_length), 1)
    search = Search([phase], OptimizerConfig(name=run.optimizer), read_hardware(hardware), run.devices, fused=False)
    options = ParallelConfig(tensor=run.tensor, zero_stage=1, micro_batch_size=run.micro_batch_size)
    step, starts = search.step_model(phase, options)
    return run.global_batch_size / replace(step, overlaps=False).time(starts).seconds


def rows(runs: Sequence[Run], hardware: str) -> list[tuple[Run, float, float]]:
    """Return (run, prediction, prediction times the factor of its software)."""
    found = [(run, predict(run, hardware)) for run in runs]
    factors = {}
    for software in {run.software for run in runs}:
        ratios = [log(run.sequences_per_s / each) for run, each in found if run.software == software]
        factors[software] = exp(sum(ratios) / len(ratios))
    return [(run, each, factors[run.software] * each) for run, each in found]


def main(options: Options) -> None:
    """Print the table."""
    table = Table(title="published runs on A100 80 GB: sequences per second")
    for column in ("software", "run", "published", "predicted", "deviation", "calibrated", "deviation "):
        table.add_column(column, justify="left" if column in ("software", "run") else "right", no_wrap=True)
    for run, raw, calibrated in rows(RUNS, options.hardware):
        real = run.sequences_per_s
        numbers = [f"{raw:,.0f}", f"{raw / real - 1:+.0%}", f"{calibrated:,.0f}", f"{calibrated / real - 1:+.0%}"]
        table.add_row(run.software, run.name, f"{real:,.0f}", *numbers)
    Console(width=130).print(table)


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
