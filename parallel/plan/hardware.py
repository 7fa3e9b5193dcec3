"""Describe a cluster's hardware (conf/hardware), and compute the seconds of single operations on one device.

Times follow a roofline: an operation takes the longer of its arithmetic and its memory traffic, and a launch. Every
number of a file carries its source there; `python -m benchmarks.calibrate` measures them on the machine at hand.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

from omegaconf import MISSING, OmegaConf

from common.command_line import CONF
from common.errors import ConfigurationError
from common.values import above, at_least, typed

FOLDER = CONF / "hardware"
GIB = 2**30  # bytes


@dataclass
class Rate:
    """Arithmetic of one device in one number format."""

    peak_tflops: float = MISSING
    """Dense peak of the data sheet, TFLOP/s."""
    efficiency: float = MISSING
    """Share of the peak that the largest matrix products reach, 0 to 1."""


@dataclass
class MatrixProducts:
    """The rate of a matrix product as a function of its shape."""

    tile: int = MISSING
    """Rows and columns of the blocks of the result that one unit computes; smaller results leave units idle."""
    units: int = MISSING
    """Units that compute blocks side by side: streaming multiprocessors, or 1 for a CPU core."""
    ramp: int = MISSING
    """Length of the sum, in elements, at which a product reaches half of its rate."""


@dataclass
class Link:
    """A connection of one device to the others."""

    gb_per_s: float = MISSING
    """Bandwidth in one direction, GB/s (1e9 bytes)."""
    efficiency: float = MISSING
    """Share of the bandwidth that collectives reach, 0 to 1."""
    latency_us: float = MISSING
    """Microseconds of one step of a collective, whatever its size."""

    @property
    def bytes_per_s(self) -> float:
        """Return the bytes that a collective moves in a second."""
        return self.gb_per_s * 1e9 * self.efficiency


@dataclass
class Hardware:
    """One kind of cluster: equal devices, grouped into nodes."""

    name: str = MISSING
    """Name of a device."""
    devices_per_node: int = MISSING
    """Devices that the faster links join."""
    memory_gib: float = MISSING
    """Memory of one device that processes can use."""
    overhead_gib: float = MISSING
    """Memory that a process takes before any tensor: context, libraries, workspaces."""
    communicator_mib: float = MISSING
    """Memory of the buffers of one process group of several ranks."""
    power_w: float = MISSING
    """Power of one device with its share of the node."""
    bf16: Rate = field(default_factory=Rate)
    """Arithmetic in bf16 with fp32 sums."""
    fp32: Rate = field(default_factory=Rate)
    """Arithmetic in fp32 as torch computes it by default."""
    matmul: MatrixProducts = field(default_factory=MatrixProducts)
    """Dependence of matrix products on their shape."""
    attention_efficiency: float = MISSING
    """Share of the peak that attention reaches, 0 to 1."""
    memory_gb_per_s: float = MISSING
    """Memory bandwidth of the data sheet, GB/s."""
    memory_efficiency: float = MISSING
    """Share of it that elementwise operations reach, 0 to 1."""
    launch_us: float = MISSING
    """Microseconds that an operation takes whatever its size."""
    host_ms: float = MISSING
    """Milliseconds of a step on the host that no device work hides."""
    node: Link = field(default_factory=Link)
    """Links within a node."""
    network: Link = field(default_factory=Link)
    """Links between nodes, as one device's share."""

    def __post_init__(self) -> None:
        at_least("hardware.", 1, devices_per_node=self.devices_per_node)
        for name in ("attention_efficiency", "memory_efficiency"):
            check_share(f"hardware.{name}", getattr(self, name))
        for group in ("bf16", "fp32", "node", "network"):
            check_share(f"hardware.{group}.efficiency", getattr(self, group).efficiency)
        above("hardware.", 0, memory_gib=self.memory_gib, memory_gb_per_s=self.memory_gb_per_s)

    def rate(self, element_bytes: int) -> Rate:
        """Return the arithmetic of a number format by its bytes."""
        return self.bf16 if element_bytes == 2 else self.fp32

    def product_s(self, rows: float, columns: float, inner: float, element_bytes: int, count: float = 1) -> float:
        """Return the seconds of `count` products [rows, inner] x [inner, columns] in one launch.

        Arithmetic: rows and columns count in whole tiles, fewer tiles than units leave units idle, and the rate grows
        with the sum's length as inner / (inner + ramp). Traffic: both factors and the result once.
        """
        if not rows * columns * inner * count:
            return 0.0
        shape, rate = self.matmul, self.rate(element_bytes)
        tiles = ceil(rows / shape.tile) * ceil(columns / shape.tile) * count
        flops = 2.0 * max(tiles, shape.units) * shape.tile**2 * inner
        arithmetic = flops * (1 + shape.ramp / inner) / (rate.peak_tflops * 1e12 * rate.efficiency)
        traffic = element_bytes * count * (rows * inner + inner * columns + rows * columns)
        return max(arithmetic, self._traffic_s(traffic)) + self.launch_us * 1e-6

    def attention_s(self, flops: float, traffic_bytes: float, element_bytes: int, launches: int = 1) -> float:
        """Return the seconds of attention kernels of so many FLOPs that move so many bytes."""
        rate = self.rate(element_bytes)
        arithmetic = flops / (rate.peak_tflops * 1e12 * self.attention_efficiency)
        return max(arithmetic, self._traffic_s(traffic_bytes)) + launches * self.launch_us * 1e-6

    def elementwise_s(self, traffic_bytes: float, launches: float = 1) -> float:
        """Return the seconds of operations that only move bytes."""
        return self._traffic_s(traffic_bytes) + launches * self.launch_us * 1e-6

    def _traffic_s(self, traffic_bytes: float) -> float:
        return traffic_bytes / (self.memory_gb_per_s * 1e9 * self.memory_efficiency)


def check_share(name: str, value: float) -> None:
    """Raise ConfigurationError unless 0 < value <= 1."""
    if not 0 < value <= 1:
        raise ConfigurationError(f"{name}={value} is a share; set it above 0 and to 1 at most.")


def read_hardware(name: str, changes: Sequence[str] = ()) -> Hardware:
    """Read conf/hardware/<name>.yaml, or the file at that path, with changes such as `memory_gib=40`.

    Raises ConfigurationError for an unknown name, key or impossible value.
    """
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(known)}, or a file ending in .yaml."
        raise ConfigurationError(f"hardware={name} does not exist; {hint}")
    merged = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(changes)))
    return typed(Hardware, OmegaConf.to_container(merged), "hardware")
