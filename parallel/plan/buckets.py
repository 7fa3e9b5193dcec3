"""Decide which units' gradients share a bucket, and follow the buckets of a rank through a backward pass."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

BUCKET_ELEMENTS = 2**22  # consecutive units share a bucket of at most so many elements; a larger unit has its own
REPLICATED_BUCKET = 2**24  # elements of an all-reduce of whole replicas, at most (64 MiB of fp32)
IN_FLIGHT = 2  # buckets that are sent at a time where whole gradients are not kept
FP32 = 4  # bytes


def joined(elements: Sequence[float]) -> list[list[int]]:
    """Return the numbers of the units of every bucket, last unit first: the order of a backward pass.

    `elements`: of each unit; a unit of none has no bucket.
    """
    found: list[list[int]] = []
    size = 0.0
    for number in reversed(range(len(elements))):
        if not elements[number]:
            continue
        if not found or size + elements[number] > BUCKET_ELEMENTS:
            found.append([])
            size = 0.0
        found[-1].append(number)
        size += elements[number]
    return found


@dataclass(frozen=True)
class Sending:
    """Describe how a rank sends gradients: to how many ranks, in how many bytes an element.

    `whole`: fp32 buckets outlive the step, because micro-batches are added up in them. `keeps_sums`: a received shard
    stays in the device's memory, as fp32.
    """

    ranks: int
    wire_bytes: int
    whole: bool
    keeps_sums: bool


def held_in_backward(elements: Sequence[float], sending: Sending) -> tuple[list[float], float]:
    """Return the most bytes of buckets while each unit's gradients come, and those still on their way after the pass.

    A bucket is filled in fp32, and sent when it is complete: as it is, or as a copy in 16 bits. At most `IN_FLIGHT` are
    on their way, but all of `whole` ones that are sent as they are. A received shard counts where it is kept.
    """
    found, received = [0.0] * len(elements), 0.0
    flying: deque[tuple[float, float]] = deque()  # (bytes, elements of the shard)
    copied = sending.wire_bytes < FP32
    for units in joined(elements):
        size = sum(elements[i] for i in units)
        buffer, copy = 0.0 if sending.whole else FP32 * size, sending.wire_bytes * size if copied else 0.0
        for i in units:
            found[i] = received + sum(sent for sent, _ in flying) + buffer
        while len(flying) >= IN_FLIGHT and (copied or not sending.whole):
            received += FP32 * sending.keeps_sums * flying.popleft()[1]
        shard = sending.wire_bytes * size / sending.ranks
        found[units[-1]] = max(found[units[-1]], received + sum(sent for sent, _ in flying) + buffer + copy + shard)
        flying.append(((copy or buffer) + shard, size / sending.ranks))
    return found, sum(sent for sent, _ in flying)
