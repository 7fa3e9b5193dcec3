"""Turn a run's settings into a search for its layout, and the layout that was found into settings."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from common.errors import ConfigurationError
from common.files import write_text
from common.launcher import is_main_rank
from model.attention.kernels import kernel_name
from parallel.config import ParallelConfig
from parallel.engine.build import DTYPES
from parallel.plan.hardware import FOLDER, Hardware, read_hardware
from parallel.plan.search import Choice, PhasePlan, Rows, Search
from train.config import RunConfig
from train.phases import for_phase, spans

KEPT = "layout.json"  # in the run's folder
OF_ALL_PHASES = ("tensor", "pipeline", "virtual_stages", "sequence", "zero_stage")
OF_A_PHASE = ("micro_batch_size", "recompute", "gather", "reduce")


def make_search(config: RunConfig, hardware: Hardware, gpus: int, keep_streams: bool = False) -> Search:
    """Make the search for the layout of a run on `gpus` devices.

    `keep_streams`: data-parallel sizes divide `data.num_streams`, which is then not changed. Raises
    ConfigurationError for phases that do not add up.
    """
    on_gpu = hardware.matmul.units > 1
    kernel = kernel_name(config.model.attention, on_gpu)  # of that hardware, not of this machine
    phases = []
    for span in spans(config):
        own = for_phase(config, span)
        own.model = replace(own.model, attention=kernel)
        rows = Rows(own.data.global_batch_size, own.data.images_per_row, own.data.encoder_length,
                    own.data.decoder_length)  # fmt: skip
        own.data.check_images(own.pali.tokens_per_image)
        phases.append(PhasePlan(span.name, own.pali, tuple(span.phase.freeze), rows, span.last - span.first + 1))
    return Search(
        phases, config.optimizer, hardware, gpus, base=_without_auto(config.parallel),
        element_bytes=DTYPES[config.run.precision].itemsize, fused=kernel == "flex",
        on_gpu=on_gpu, num_streams=config.data.num_streams if keep_streams else None,
    )  # fmt: skip


def _without_auto(parallel: ParallelConfig) -> ParallelConfig:
    """Return the settings that are not searched; ZeRO's options may need a stage that the search then keeps to."""
    return replace(parallel, auto=False, cut=[], tensor=1, pipeline=1, virtual_stages=1, sequence=False, zero_stage=3,
                   gather="micro_batch", reduce="step", hpz_partition_size=1, memory_gib=None)  # fmt: skip


def overrides(choice: Choice, config: RunConfig, gpus: int) -> list[str]:
    """Return the words of the command line that choose a layout."""
    first = choice.parallel
    words = [f"parallel.{name}={_text(getattr(first, name))}" for name in OF_ALL_PHASES]
    several = len(choice.phases) > 1
    for name, phase in choice.phases.items():
        prefix = f"phases.{name}" if several or _sets_its_own(config, name) else "parallel"
        words += [f"{prefix}.{key}={_text(getattr(phase.parallel, key))}" for key in OF_A_PHASE]
        if phase.cut:
            words.append(f"{prefix}.cut=[{','.join(phase.cut)}]")
    data = first.data_parallel_size(gpus)
    if config.data.num_streams % data:
        words.append(f"data.num_streams={_streams(config.data.num_streams, data, config.data.global_batch_size)}")
    return words


def _sets_its_own(config: RunConfig, name: str) -> bool:
    return any(getattr(config.phases[name], key) is not None for key in OF_A_PHASE)


def _streams(now: int, data: int, batch: int) -> int:
    both = math.lcm(now, data)
    return both if batch % both == 0 else data


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_plain(choice: Choice) -> dict[str, Any]:
    """Return the settings of a layout as plain values: `parallel` of the run, and those of each phase."""
    phases = {
        name: {key: getattr(phase.parallel, key) for key in OF_A_PHASE} | {"cut": list(phase.cut) or None}
        for name, phase in choice.phases.items()
    }
    return {"parallel": {name: getattr(choice.parallel, name) for name in OF_ALL_PHASES}, "phases": phases}


def with_layout(config: RunConfig, plain: dict[str, Any]) -> RunConfig:
    """Return the settings of a run under a layout as `to_plain` gives it; `parallel.auto` is off."""
    phases = {name: replace(phase, **plain["phases"][name]) for name, phase in config.phases.items()}
    return replace(config, parallel=replace(config.parallel, auto=False, **plain["parallel"]), phases=phases)


def choose_layout(config: RunConfig, world_size: int) -> RunConfig:
    """Return the settings with the layout that `parallel.auto` asks for; unchanged where it is false.

    The layout in the run's folder is taken while the number of ranks is the same; else it is planned anew, printed and
    written there by the main rank. All ranks plan alike. Raises ConfigurationError where no layout fits.
    """
    if not config.parallel.auto:
        return config
    file = Path(config.run.folder) / KEPT
    if (kept := _kept(file, config, world_size)) is not None:
        return with_layout(config, kept)
    hardware = this_hardware(config.parallel.hardware)
    search = make_search(config, hardware, world_size, keep_streams=True)
    found = search.run(most=1)
    if not found:
        raise ConfigurationError(
            f"parallel.auto=true finds no layout of {world_size} x {hardware.name} ({hardware.memory_gib:g} GiB) that "
            f"divides data.num_streams={config.data.num_streams}; take more devices, or see train.plan."
        )
    plain = to_plain(found[0])
    if is_main_rank():
        print(f"parallel.auto: {' '.join(overrides(found[0], config, world_size))}")
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps({"world_size": world_size, **plain}, indent=1))
    return with_layout(config, plain)


def _kept(file: Path, config: RunConfig, world_size: int) -> dict[str, Any] | None:
    """Return the layout of an earlier start with as many ranks and the same phases, None where there is none."""
    try:
        plain = json.loads(file.read_text(encoding="utf-8"))
        fits = plain.pop("world_size") == world_size and plain["phases"].keys() == config.phases.keys()
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return plain if fits else None


def this_hardware(name: str | None) -> Hardware:
    """Return the hardware of that name, else that of this machine's GPU, else the CPU's.

    Raises ConfigurationError for a GPU without a file.
    """
    if name is not None:
        return read_hardware(name)
    if not torch.cuda.is_available():
        return read_hardware("cpu")
    device = torch.cuda.get_device_name()
    for known in sorted(path.stem for path in FOLDER.glob("*.yaml")):
        if known.partition("_")[0].upper() in device.upper():
            return read_hardware(known)
    raise ConfigurationError(
        f"parallel.auto=true finds no file of conf/hardware for {device}; set parallel.hardware to the nearest one, or "
        "write one with benchmarks.calibrate."
    )
