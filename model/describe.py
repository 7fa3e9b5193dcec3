"""Print the units of a model: parameters, FLOPs, activation memory, trained or frozen, and the totals.

    python -m model.describe model=pali_17b phases=frozen_224
    python -m model.describe vit=large mt5=base input_tokens=64 target_tokens=64
    python -m model.describe experiment=paper_17b_stage2

The numbers are those of one example: one image and its text in a row of their own. Any other argument overrides the
run's configuration (conf/pretrain.yaml): the groups `vit`, `mt5`, `model` and `phases` (the first phase counts).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table

from common.command_line import PHASES, compose_groups, first_phase, read_words, run_command
from common.values import at_least, replacing, typed
from model.config import ModelConfig, MT5Config, PaLIConfig, ViTConfig
from model.costs import BatchShape, UnitCost, unit_costs
from model.pali import plan_on_meta

READS = ("vit", "mt5", "model", "phases", "experiment=")
PHASE_READS = ("freeze", *(one.name for one in fields(ModelConfig)))


@dataclass
class Frozen:
    """The freeze patterns of the phase to describe."""

    freeze: list[str]


@dataclass
class DescribeConfig:
    """Options of this command: one row with one image is counted."""

    input_tokens: int = 32
    """Tokens of the input text. A prompt has about as many."""
    target_tokens: int = 32
    """Tokens of the target text. A caption has about as many."""

    def __post_init__(self) -> None:
        at_least("", 1, input_tokens=self.input_tokens, target_tokens=self.target_tokens)


def one_example(config: PaLIConfig, input_tokens: int, target_tokens: int) -> BatchShape:
    """Return the shape of one image and its text in a row of their own, as the paper counts."""
    vision = config.tokens_per_image
    return BatchShape(1, vision, 1, vision + input_tokens, target_tokens)


def describe(config: PaLIConfig, frozen: Sequence[str], input_tokens: int, target_tokens: int) -> Table:
    """Make the table of units; equal blocks in a row share a line."""
    plan = plan_on_meta(config, frozen)
    costs = list(unit_costs(plan.units(), one_example(config, input_tokens, target_tokens)))
    table = Table(
        title=f"one example: {config.tokens_per_image} visual ({config.model.image_size} px), "
        f"{input_tokens} input and {target_tokens} target tokens; activations in bf16",
        show_footer=True,
    )
    table.add_column("unit", footer="total")
    numbers = {
        "parameters": _count(sum(c.cost.parameters for c in costs)),
        "trained": _count(sum(p.numel() for c in costs for p in c.unit.parameters() if p.requires_grad)),
        "forward": _tflop(sum(c.cost.flops for c in costs)),
        "forward + backward": _tflop(sum(c.training_flops for c in costs)),
        "kept for backward": _mib(sum(c.kept_bytes for c in costs)),
    }
    for name, total in numbers.items():
        table.add_column(name, footer=total, justify="right", no_wrap=True)
    for _, equal in groupby(costs, key=lambda c: (type(c.unit), c.cost, c.trained)):
        table.add_row(*_line(list(equal)))
    return table


def _line(equal: list[UnitCost]) -> list[str]:
    first, times = equal[0], len(equal)
    name = first.name if times == 1 else f"{first.name.rstrip('0123456789').rstrip('_')} x {times}"
    return [
        name,
        _count(times * first.cost.parameters),
        "yes" if first.trained else "frozen",
        _tflop(times * first.cost.flops),
        _tflop(times * first.training_flops),
        _mib(times * first.kept_bytes),
    ]


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.3f} B" if parameters >= 1e9 else f"{parameters / 1e6:.3f} M"


def _tflop(flops: float) -> str:
    return f"{flops / 1e12:.3f} TFLOP"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def read_model(overrides: Sequence[str]) -> tuple[PaLIConfig, list[str]]:
    """Read (the model, the patterns that its first phase freezes) from conf/pretrain.yaml with overrides.

    Raises ConfigurationError where they do not compose.
    """
    groups: dict[str, Any] = {"vit": ViTConfig, "mt5": MT5Config, "model": ModelConfig, "phases": PHASES}
    found = compose_groups(overrides, groups)
    name, phase = first_phase(found["phases"])
    vit, mt5 = typed(ViTConfig, found["vit"], "vit"), typed(MT5Config, found["mt5"], "mt5")
    model = typed(ModelConfig, found["model"] | replacing(ModelConfig, phase), "model")
    frozen = typed(Frozen, {"freeze": phase.get("freeze") or []}, f"phases.{name}")
    return PaLIConfig(vit, mt5, model), frozen.freeze


def main(arguments: Sequence[str]) -> None:
    """Print the table of a model."""
    own, overrides = read_words(arguments, DescribeConfig, "model.describe", READS, PHASE_READS)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(describe(*read_model(overrides), own.input_tokens, own.target_tokens))


if __name__ == "__main__":
    run_command(main)
