"""Print the units of a model: parameters, FLOPs, activation memory, trained or frozen, and the totals.

    python -m model.describe model=pali_17b stage=frozen_224 input_tokens=32 target_tokens=32

The numbers are those of one example: one image and its text in a row of their own. `input_tokens` and `target_tokens`
are the lengths of its text. Any other argument overrides the run's configuration (conf/pretrain.yaml); `vit`, `mt5`,
`model` and the first phase of `stage` matter here, the other settings are ignored.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table

from common.errors import ConfigurationError
from common.overrides import check_choices, check_read, stored_schema
from common.terminal import use_utf8
from common.values import in_one_line, typed
from model.config import ModelConfig, MT5Config, PaLIConfig, ViTConfig
from model.costs import BatchShape, UnitCost, unit_costs
from model.pali import plan_on_meta

CONFIGURATION = Path(__file__).parent.parent / "conf"
SCHEMA = "run_schema"
OWN = {"input_tokens": 32, "target_tokens": 32}
READS = ("vit", "mt5", "model", "stage", "experiment=")


@dataclass
class Frozen:
    """The freeze patterns of the phase to describe."""

    freeze: list[str]


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
    groups = {"vit": ViTConfig(), "mt5": MT5Config(), "model": ModelConfig()}
    try:
        check_choices(overrides, CONFIGURATION)
        with stored_schema(SCHEMA, groups), initialize_config_dir(str(CONFIGURATION), version_base=None):
            config = compose("pretrain", list(overrides))
        if not config.stage.phases:
            raise ConfigurationError("stage.phases is empty; give at least one phase (see conf/stage).")
        phase = config.stage.phases[0]
        vit, mt5 = typed(ViTConfig, _plain(config, "vit"), "vit"), typed(MT5Config, _plain(config, "mt5"), "mt5")
        model = typed(ModelConfig, _plain(config, "model") | {"image_size": phase.image_size}, "model")
        return PaLIConfig(vit, mt5, model), typed(Frozen, {"freeze": phase.freeze}).freeze
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(_sentence(error)) from error


def _plain(config: DictConfig, group: str) -> dict[str, Any]:
    found = OmegaConf.to_container(config.get(group, OmegaConf.create()), resolve=True)
    return cast(dict[str, Any], found)


def _sentence(error: Exception) -> str:
    """Return Hydra's message on one line, with the choices if it has some."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        return f"{group}={option} does not exist; choose one of {', '.join(error.options)}."
    return in_one_line(error)


def main(arguments: Sequence[str]) -> None:
    """Print the table; raises ConfigurationError for arguments that do not compose."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return
    lengths, overrides = dict(OWN), []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in lengths:
            overrides.append(argument)
        elif value.isdecimal() and int(value) > 0:
            lengths[key] = int(value)
        else:
            raise ConfigurationError(f"{argument} is not a number of tokens; give at least 1.")
    check_read(overrides, READS, "model.describe")
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(describe(*read_model(overrides), lengths["input_tokens"], lengths["target_tokens"]))


if __name__ == "__main__":
    use_utf8()
    try:
        main(sys.argv[1:])
    except ConfigurationError as error:
        print(f"Configuration: {error}", file=sys.stderr)
        sys.exit(2)
