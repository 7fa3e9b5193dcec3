"""Measure this machine, and write it as a file of conf/hardware.

    python -m benchmarks.calibrate output=runs/cpu.yaml                   # CPU: one process on each core
    python -m benchmarks.calibrate like=h200_sxm output=runs/h200.yaml    # GPU: a minute

Rates by shape, memory bandwidth, launches, the host's part of a step and the memory of a process are measured on one
device, links between all of the machine's devices. What a machine cannot measure about itself (power, links between
nodes, a data sheet's peaks) comes from the file of `like`, which the comment of its line names.
"""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.parallel.toy import process_bytes, run_ranks
from benchmarks.rates import (
    Fit,
    attention_flops_per_s,
    copy_bytes_per_s,
    elementwise_bytes_per_s,
    fit,
    launch_s,
    products,
)
from benchmarks.step_times import predicted, timed
from common.command_line import parse, run_command
from common.files import write_text
from common.values import PATH, at_least
from parallel.distributed import launch, start
from parallel.plan.hardware import GIB, Hardware, Link, MatrixProducts, Rate, read_hardware

NARROW = "vit=nano mt5=nano data.global_batch_size=1"  # a step without work for a device: the host's part
SMALL, LARGE = 2**12, {"cpu": 2**26, "cuda": 2**30}  # bytes of a collective: latency, bandwidth
SHARE_DIGITS = 3


@dataclass
class Options:
    """Measure this machine, and write it as a file of conf/hardware."""

    like: str = "cpu"
    """File of conf/hardware for what is not measured; on a GPU that of its kind, with the peaks of its data sheet."""
    name: str | None = None
    """Name of a device. Null by default: as torch has it, or `CPU core`."""
    devices: int = 0
    """Devices of this machine. 0 by default: its GPUs, or the cores that this process may use."""
    output: str | None = field(default=None, metadata=PATH)
    """File to write. Null by default: print it."""

    def __post_init__(self) -> None:
        at_least("", 0, devices=self.devices)


@dataclass(frozen=True)
class Links:
    """Seconds of all-reduces between all devices of this machine, and the memory of their communicator."""

    ranks: int
    small_s: float
    large_s: float
    large_bytes: int
    communicator_bytes: int

    def link(self) -> Link:
        """Return the link: 2 (n - 1) steps of a ring, and 2 (n - 1) / n of the bytes."""
        steps = 2 * (self.ranks - 1)
        moved = steps / self.ranks * self.large_bytes
        return Link(moved / max(self.large_s - self.small_s, 1e-9) / 1e9, 1.0, self.small_s / steps * 1e6)


def reduce_times(folder: Path, repeats: int) -> None:
    """Time all-reduces of all ranks in a world that has started; write this rank's medians."""
    this = launch()
    start(this, 300.0)
    used = _device_bytes(this.device)
    found: dict[str, float] = {}
    large = LARGE[this.device.type]
    for name, size in (("small", SMALL), ("large", large)):
        x = torch.zeros(size, dtype=torch.uint8, device=this.device).view(torch.float32)
        taken = []
        for _ in range(repeats + 2):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(x)
            if this.device.type == "cuda":
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - began)
        found[name] = statistics.median(taken[2:])
        del x
    if this.device.type == "cuda":
        torch.cuda.empty_cache()
    torch.save(found | {"bytes": _device_bytes(this.device) - used}, folder / f"{this.rank}.pt")


def _device_bytes(device: torch.device) -> int:
    """Return the bytes that are taken on a GPU, by whatever; 0 on a CPU."""
    if device.type == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def measure_links(ranks: int, device: torch.device) -> Links:
    """Measure the links between processes of this machine: the slowest rank's median."""
    each = run_ranks(ranks, reduce_times, 9)
    small, large = (max(rank[name] for rank in each) for name in ("small", "large"))
    return Links(ranks, small, large, LARGE[device.type], int(max(rank["bytes"] for rank in each)))


def overhead_bytes(device: torch.device) -> int:
    """Return the memory that this process has before any tensor: its context on a GPU, else its modules."""
    if device.type == "cpu":
        return process_bytes("VmRSS")
    before = _device_bytes(device)
    x = torch.zeros(1024, 1024, dtype=torch.bfloat16, device=device)
    (x @ x).sum().item()
    return _device_bytes(device) - before


def rate(found: Fit, fastest: float, like: Rate, on_gpu: bool) -> Rate:
    """Return the arithmetic of a type: of the data sheet's peak on a GPU, of the fastest product on a CPU."""
    peak = like.peak_tflops if on_gpu else max(fastest, found.flops_per_s) / 1e12
    return Rate(round(peak, 4), round(min(1.0, found.flops_per_s / peak / 1e12), SHARE_DIGITS))


def measure(options: Options) -> tuple[Hardware, dict[str, str]]:
    """Measure this machine; return its hardware, and by key where a number comes from."""
    device = launch({}).device
    on_gpu, like = device.type == "cuda", read_hardware(options.like)
    here = torch.cuda.device_count() if on_gpu else len(os.sched_getaffinity(0))
    devices = options.devices or here
    overhead = overhead_bytes(device)
    torch.set_num_threads(1)
    began = launch_s(device)
    units = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 1
    types = (torch.bfloat16, torch.float32)
    measured = {dtype: products(device, dtype) for dtype in types}
    fits = {dtype: fit(measured[dtype], units, device, began) for dtype in types}
    rates = {
        dtype: rate(fits[dtype], max(x.flops / x.seconds for x in measured[dtype]), own, on_gpu)
        for dtype, own in zip(types, (like.bf16, like.fp32), strict=True)
    }
    main = torch.bfloat16 if on_gpu else torch.float32  # the type whose shapes, attention and traffic the file holds
    bandwidth = like.memory_gb_per_s if on_gpu else copy_bytes_per_s(device) / 1e9
    moved = elementwise_bytes_per_s(device, main) / 1e9
    total = torch.cuda.get_device_properties(device).total_memory if on_gpu else _machine_bytes() / devices
    made = replace(
        like,
        name=options.name or (torch.cuda.get_device_name(device) if on_gpu else "CPU core"),
        devices_per_node=devices,
        memory_gib=round(total / GIB, 1),
        overhead_gib=round(overhead / GIB, 2),
        bf16=rates[torch.bfloat16],
        fp32=rates[torch.float32],
        matmul=MatrixProducts(fits[main].tile, units, fits[main].ramp),
        attention_efficiency=round(
            min(1.0, attention_flops_per_s(device, main) / rates[main].peak_tflops / 1e12), SHARE_DIGITS
        ),
        memory_gb_per_s=round(bandwidth, 1),
        memory_efficiency=round(min(1.0, moved / bandwidth), SHARE_DIGITS),
        launch_us=round(began * 1e6, 2),
    )
    sources = {name: _errors(fits[dtype]) for name, dtype in zip(("bf16", "fp32"), types, strict=True)}
    sources["power_w"] = sources["network"] = f"taken from {options.like}"
    if here > 1:
        links = measure_links(devices, device)
        made.node = links.link()
        made.communicator_mib = round(links.communicator_bytes / 2**20)
    else:
        sources["node"] = sources["communicator_mib"] = f"taken from {options.like}: one device has no link"
    made.host_ms = host_ms(made)
    return made, sources


def host_ms(hardware: Hardware) -> float:
    """Return the milliseconds of a step of a tiny model beyond its predicted work."""
    (found,) = run_ranks(1, timed, NARROW, 5)
    kind = "wall" if torch.cuda.is_available() else "cpu"
    work = predicted(NARROW, 1, replace(hardware, host_ms=0.0)).seconds
    return round(max(0.0, statistics.median(found[kind]) - work) * 1e3, 1)


def _machine_bytes() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _errors(found: Fit) -> str:
    """Return the errors of a fit over the products, in words."""
    ordered = sorted(found.errors)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return f"measured: {len(ordered)} products, 8 of 10 within {low:+.0%} and {high:+.0%} of the fit"


def to_yaml(hardware: Hardware, sources: dict[str, str]) -> str:
    """Return the text of a file of conf/hardware, with the source of every number."""
    plain = "measured"
    lines = [
        f"# Measured on this machine by `python -m benchmarks.calibrate`, {datetime.now(UTC):%d %B %Y}; "
        f"torch {torch.__version__}.",
        f"name: {hardware.name}",
    ]
    for key, value in vars(hardware).items():
        if key == "name":
            continue
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
        if hasattr(value, "__dict__"):
            text = "{" + ", ".join(f"{k}: {v:.4g}" for k, v in vars(value).items()) + "}"
        lines.append(f"{key}: {text} # {sources.get(key, plain)}")
    return "\n".join(lines) + "\n"


def main(options: Options) -> None:
    """Measure, and write or print the file."""
    began = time.perf_counter()
    text = to_yaml(*measure(options))
    if options.output:
        write_text(Path(options.output), text)
        print(f"{options.output} written in {time.perf_counter() - began:.0f} s:")
    print(text, end="")


def run(words: Sequence[str]) -> None:
    """Parse the words and measure."""
    main(parse(words, Options))


if __name__ == "__main__":
    run_command(run)
