"""Search the layout of a run on a cluster, before a GPU is booked.

    python -m train.plan model=pali_17b phases=chained hardware=h100_sxm nodes=128
    python -m train.plan model=pali_3b hardware=a100_80 gpus=8
    python -m train.plan experiment=paper_17b hardware=h100_sxm nodes=64 hardware.memory_gib=60 figure=step.png

It reads no data and needs no weights. Other words are those of `train.pretrain`; unless set otherwise rows come from
`data=web`, the batch is 4,096 and the phase is `frozen_224`. Times are predictions (docs/scale.md has their errors).
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from common.command_line import run_command, split_own
from common.errors import ConfigurationError
from common.values import PATH, at_least
from parallel.plan.campaign import simulate
from parallel.plan.hardware import GIB, Hardware, read_hardware
from parallel.plan.search import Choice, Search, smallest
from train.config import RunConfig
from train.entry import register
from train.settings.compose import to_run_config
from train.settings.planning import make_search, overrides
from train.submit import composed

DEFAULTS = {"data": "web", "phases": "frozen_224", "tracker": "none"}


@dataclass
class PlanOptions:
    """Search the layout of a run on a cluster."""

    hardware: str = "h100_sxm"
    """File of conf/hardware, or a path ending in .yaml; `hardware.memory_gib=60` changes one key of it."""
    nodes: int = 0
    """Nodes of the cluster. 0 by default: `gpus` gives the size."""
    gpus: int = 0
    """Devices of the cluster, instead of `nodes`."""
    rows: int = 8
    """Layouts to print."""
    figure: str | None = field(default=None, metadata=PATH)
    """PNG file for the best layout's schedule and the parts of its step. Null by default: none."""

    def __post_init__(self) -> None:
        at_least("", 0, nodes=self.nodes, gpus=self.gpus)
        at_least("", 1, rows=self.rows)
        if bool(self.nodes) == bool(self.gpus):
            raise ConfigurationError(f"nodes={self.nodes} and gpus={self.gpus} give the size; set one of them.")


def read_config(words: Sequence[str]) -> RunConfig:
    """Compose the run that the words describe; it reads no data and needs no weights, so neither is given.

    Unless set otherwise rows come from `data=web`, the batch is 4,096 and the phase is `frozen_224`.
    """
    register()
    given = {word.partition("=")[0].lstrip("+") for word in words}
    defaults = [f"{k}={v}" for k, v in DEFAULTS.items() if k not in given and "experiment" not in given]
    root = [] if "data.root" in given else ["data.root=none"]
    length = ["run.steps=382325"] if "experiment" not in given and "run.steps" not in given else []
    return to_run_config(composed("pretrain", [*defaults, *root, *length, *words]), weights=False)


def no_layout(search: Search, config: RunConfig, hardware: Hardware) -> ConfigurationError:
    """Return the error of a cluster on which no layout fits; it names the smallest number of devices that would do."""
    needed = {name: size / GIB for name, size in search.rejected.items()}
    phase, gib = max(needed.items(), key=lambda each: each[1], default=("the run", 0.0))
    found = smallest(lambda gpus: make_search(config, hardware, gpus), search.gpus)
    hint = f"take {found} or more" if found else "take a smaller model"
    why = f"needs {gib:.1f} GiB on a device of {hardware.memory_gib:g} GiB at least" if gib else "divides into none"
    return ConfigurationError(f"gpus={search.gpus} hold no layout of phase {phase}, which {why}; {hint}.")


def layout_name(choice: Choice) -> str:
    """Return a layout in few words: degrees, ZeRO, and by phase micro-batch and recomputation."""
    p = choice.parallel
    degrees = [f"tp{p.tensor}{'s' if p.sequence else ''}"] if p.tensor > 1 else []
    if p.pipeline > 1:
        degrees.append(f"pp{p.pipeline}" + (f"x{p.virtual_stages}" if p.virtual_stages > 1 else ""))
    degrees.append(f"zero{p.zero_stage}")
    own = [
        f"mb{x.parallel.micro_batch_size}"
        + (" gather=step" if x.parallel.gather == "step" else "")
        + (" reduce=micro_batch" if x.parallel.reduce == "micro_batch" and p.zero_stage == 3 else "")
        + ("" if x.parallel.recompute == "none" else f" re:{x.parallel.recompute}")
        for x in choice.phases.values()
    ]
    return " ".join(degrees) + "; " + " | ".join(own)


def reason(choice: Choice, best: Choice) -> str:
    """Return the cause that costs most more than under the best layout."""
    if choice is best:
        return "fastest"
    more: dict[str, float] = {}
    for name, phase in choice.phases.items():
        other = best.phases[name].time.parts()
        for cause, seconds in phase.time.parts().items():
            more[cause] = more.get(cause, 0.0) + seconds - other[cause]
    worst = max(more, key=lambda cause: more[cause])
    return f"+{more[worst]:.3f} s {worst}"


def table(found: Sequence[Choice], search: Search) -> Table:
    """Make the ranked table; several phases are joined by a slash."""
    shown = Table(title=f"{search.gpus} x {search.hardware.name}, {search.hardware.memory_gib:g} GiB: predicted steps")
    for column in ("", "layout", "step", "examples/s", "MFU", "memory", "bubble", "exposed", "why not first"):
        shown.add_column(column, justify="left" if column in ("layout", "why not first") else "right", no_wrap=True)
    batches = [phase.rows.global_batch_size for phase in search.phases]
    for rank, choice in enumerate(found, 1):
        phases = list(choice.phases.values())
        seconds = [x.time.seconds for x in phases]
        shown.add_row(
            str(rank),
            layout_name(choice),
            "/".join(f"{each:.2f}" for each in seconds) + " s",
            "/".join(f"{batch / each:,.0f}" for batch, each in zip(batches, seconds, strict=True)),
            "/".join(f"{x.mfu:.0%}" for x in phases),
            "/".join(f"{x.memory_bytes / GIB:.0f}" for x in phases) + " GiB",
            "/".join(f"{x.time.bubble_s / x.time.seconds:.0%}" for x in phases),
            "/".join(f"{x.time.communication_s / x.time.seconds:.0%}" for x in phases),
            reason(choice, found[0]),
        )
    return shown


def would_help(best: Choice, config: RunConfig, search: Search) -> list[str]:
    """Return what more memory or faster links would change, each as one line; the search runs anew for each."""
    h = search.hardware
    changes = {
        "twice the memory": replace(h, memory_gib=2 * h.memory_gib),
        "twice the network between nodes": replace(h, network=replace(h.network, gb_per_s=2 * h.network.gb_per_s)),
        "twice the links within a node": replace(h, node=replace(h.node, gb_per_s=2 * h.node.gb_per_s)),
    }
    lines = []
    for name, changed in changes.items():
        other = replace(search, hardware=changed, played=0, rejected={}, _times={}).run(1, below_s=0.999 * best.seconds)
        gain = f"{1 - other[0].seconds / best.seconds:.1%} less time ({layout_name(other[0])})" if other else "no gain"
        lines.append(f"{name}: {gain}")
    return lines


def whole_run(best: Choice, search: Search) -> str:
    """Return one line about the whole run: days, checkpoints, interruptions, energy."""
    h = search.hardware
    state = max(peak.stored for phase in best.phases.values() for peak in phase.peaks)
    run = simulate(best.seconds, search.gpus, h.devices_per_node, h.power_w, state)
    steps = " + ".join(f"{phase.steps:,} ({phase.name})" for phase in search.phases)
    return (
        f"whole run, {steps} steps: {run.training_days:.1f} days of training, {run.expected_days:.1f} expected with "
        f"{run.interruptions:.1f} interruptions, 90 % of runs below {run.days_90:.1f}; {run.device_days:,.0f} "
        f"GPU-days, {run.energy_mwh:,.0f} MWh; a checkpoint every {run.interval_s / 60:.0f} minutes, "
        f"{run.spare_nodes} spare nodes."
    )


def main(words: Sequence[str]) -> None:
    """Print the ranked layouts, the words that choose the first, and what would help."""
    began = time.perf_counter()
    changes = [word.removeprefix("hardware.") for word in words if word.startswith("hardware.")]
    own, rest = split_own([word for word in words if not word.startswith("hardware.")], PlanOptions)
    hardware = read_hardware(own.hardware, changes)
    config = read_config(rest)
    gpus = own.gpus or own.nodes * hardware.devices_per_node
    search = make_search(config, hardware, gpus)
    found = search.run(most=own.rows)
    if not found:
        raise no_layout(search, config, hardware)
    console = Console(width=None if sys.stdout.isatty() else 190)
    console.print(table(found, search))
    console.print("first choice:", style="bold")
    print(" ".join(overrides(found[0], config, gpus)))
    print(whole_run(found[0], search))
    for line in would_help(found[0], config, search):
        print(f"- {line}")
    if own.figure:
        from parallel.plan.figure import draw

        draw(search, found[0].phases, Path(own.figure))
        print(f"figure: {own.figure}")
    print(f"played {search.played} layouts in {time.perf_counter() - began:.1f} s.")


if __name__ == "__main__":
    run_command(main)
