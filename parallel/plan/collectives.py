"""Compute the seconds of collectives from their algorithm's steps, bytes and links.

A ring of n ranks moves (n - 1) / n of the whole tensor over every link, in n - 1 steps (all-gather, reduce-scatter),
or twice that (all-reduce); a tree takes 2 log2(n) steps instead, at the same bytes (NCCL takes the faster one for an
all-reduce). Between nodes, as many rings run side by side as the group has ranks in a node, each over its own port.
"""

from dataclasses import dataclass
from math import ceil, log2
from typing import NamedTuple

from parallel.plan.hardware import Hardware


@dataclass(frozen=True)
class Group:
    """A process group: its ranks, and the ranks of it that share a node."""

    size: int
    per_node: int

    @classmethod
    def from_stride(cls, size: int, stride: int, devices_per_node: int) -> "Group":
        """Return the group of ranks 0, stride, 2 stride, ... on consecutive devices of nodes."""
        return cls(size, max(1, min(size, devices_per_node // stride)))

    @property
    def nodes(self) -> int:
        """Return the nodes that the group spans."""
        return ceil(self.size / self.per_node)


@dataclass(frozen=True)
class Placement:
    """The process groups of a layout: tensor-parallel ranks adjacent, then data-parallel ones, then the pipeline's."""

    tensor: Group
    data: Group
    stage: Group
    pipeline: Group

    @classmethod
    def from_degrees(cls, tensor: int, data: int, pipeline: int, devices_per_node: int) -> "Placement":
        """Place the groups as Megatron-Core orders ranks (`tp-cp-ep-dp-pp`)."""
        return cls(
            tensor=Group.from_stride(tensor, 1, devices_per_node),
            data=Group.from_stride(data, tensor, devices_per_node),
            stage=Group.from_stride(tensor * data, 1, devices_per_node),
            pipeline=Group.from_stride(pipeline, tensor * data, devices_per_node),
        )


ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER = "all-gather", "all-reduce", "reduce-scatter"


class Exchange(NamedTuple):
    """A collective of a group: its kind, the bytes of its whole tensor, and seconds of work that run beside it."""

    kind: str
    whole_bytes: float
    beside_s: float = 0.0


def exposed_s(exchange: Exchange, group: Group, hardware: Hardware) -> float:
    """Return the seconds of a collective that no work hides."""
    seconds = {ALL_GATHER: all_gather_s, ALL_REDUCE: all_reduce_s, REDUCE_SCATTER: reduce_scatter_s}[exchange.kind]
    return max(0.0, seconds(exchange.whole_bytes, group, hardware) - exchange.beside_s)


def all_gather_s(whole_bytes: float, group: Group, hardware: Hardware) -> float:
    """Return the seconds in which every rank receives the shares of all others; `whole_bytes`: of all shares."""
    return _ring_s(whole_bytes, group, hardware)


def reduce_scatter_s(whole_bytes: float, group: Group, hardware: Hardware) -> float:
    """Return the seconds in which every rank receives its share of the sum; `whole_bytes`: of all shares."""
    return _ring_s(whole_bytes, group, hardware)


def all_reduce_s(whole_bytes: float, group: Group, hardware: Hardware) -> float:
    """Return the seconds in which every rank receives the whole sum."""
    if group.size == 1:
        return 0.0
    steps = min(2 * _ring_latency_s(group, hardware), _tree_latency_s(group, hardware))
    return 2 * _moved_s(whole_bytes, group, hardware) + steps


def message_s(size_bytes: float, group: Group, hardware: Hardware) -> float:
    """Return the seconds of a message between neighbors of a pipeline."""
    link = hardware.node if group.per_node > 1 and group.nodes == 1 else hardware.network
    return size_bytes / link.bytes_per_s + link.latency_us * 1e-6


def _ring_s(whole_bytes: float, group: Group, hardware: Hardware) -> float:
    if group.size == 1:
        return 0.0
    return _moved_s(whole_bytes, group, hardware) + _ring_latency_s(group, hardware)


def _moved_s(whole_bytes: float, group: Group, hardware: Hardware) -> float:
    bandwidth = hardware.node.bytes_per_s
    if group.nodes > 1:
        ports = hardware.network.bytes_per_s * group.per_node
        bandwidth = min(bandwidth, ports) if group.per_node > 1 else ports
    return whole_bytes * (group.size - 1) / group.size / bandwidth


def _ring_latency_s(group: Group, hardware: Hardware) -> float:
    within, between = group.size - group.nodes, group.nodes - 1
    return (within * hardware.node.latency_us + between * hardware.network.latency_us) * 1e-6


def _tree_latency_s(group: Group, hardware: Hardware) -> float:
    within = 2 * (group.per_node - 1) * hardware.node.latency_us
    return (within + 2 * ceil(log2(group.nodes)) * hardware.network.latency_us) * 1e-6
