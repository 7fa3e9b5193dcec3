"""Sum gradients over data-parallel ranks: each bucket is reduce-scattered while the backward pass goes on below it.

Micro-batches are added up in fp32 and whole. In the last one of a step a bucket is sent as soon as its parameters have
their gradients, so a step sends gradients once. With `parallel.reduce: micro_batch` each micro-batch sends its own, and
only shards are kept.
"""

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.engine.buckets import Bucket
from parallel.layout import Layout
from parallel.plan.buckets import IN_FLIGHT

Send = Callable[[Bucket, Tensor], tuple[dist.Work | None, Tensor]]


class Stage:
    """The buckets of one pipeline stage, in the order of its backward pass, and how far the pass that runs has come.

    Ranks send in this order, whatever the order in which their gradients come.
    """

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.buckets = list(buckets)
        self.missing: list[int] = []
        self.sent, self.begun = 0, False

    def begin(self) -> None:
        """Start a backward pass, in which every parameter may get a gradient."""
        self.missing = [len(bucket.parameters) for bucket in self.buckets]
        self.sent, self.begun = 0, False


class Reducer:
    """Take gradients as autograd makes them, and leave each bucket's sum over the ranks in `bucket.gradient`."""

    def __init__(self, stages: Sequence[Sequence[Bucket]], layout: Layout, send: Send | None = None) -> None:
        """Add hooks to the parameters. `send` starts a reduce-scatter of a bucket's buffer and returns its result."""
        self.layout, self.send = layout, send or self._reduce_scatter
        self.stages = [Stage(buckets) for buckets in stages]
        self.every_pass = layout.config.reduce == "micro_batch"
        self.wire = torch.bfloat16 if layout.config.reduce_dtype == "bf16" else torch.float32
        self.reducing = True
        self.buffers: dict[Bucket, Tensor] = {}  # whole fp32 gradients
        self.written: dict[Bucket, set[int]] = {}  # parameters whose gradient the buffer holds
        self.kept: set[Bucket] = set()  # buckets whose buffers outlive a step: micro-batches are added up in them
        self.flying: deque[tuple[dist.Work | None, Bucket, Tensor, Tensor]] = deque()
        for stage in self.stages:
            for index, bucket in enumerate(stage.buckets):
                for number, parameter in enumerate(bucket.parameters):
                    parameter.register_post_accumulate_grad_hook(partial(self._take, stage, index, number))

    def backward(self, loss: Tensor, last: bool) -> None:
        """Run a backward pass; `last`: no other one of the step adds to the same parameters."""
        self.reducing = last or self.every_pass
        for stage in self.stages:
            stage.begin()
        loss.backward()
        for stage in self.stages:
            if self.reducing and stage.begun:  # the other stages of this rank have passes of their own
                self._send_rest(stage)

    @torch.no_grad()
    def finish(self) -> None:
        """End a step: send what no backward pass has sent, wait for every sum, and join those of copies."""
        for stage in self.stages:
            for bucket in stage.buckets:
                if bucket.gradient is None and all(bucket is not flying for _, flying, *_ in self.flying):
                    self._reduce(bucket)
        while self.flying:
            self._receive()
        self._join_copies()

    def _take(self, stage: Stage, index: int, number: int, parameter: Tensor) -> None:
        """Move a new gradient into its bucket; send the buckets that are complete."""
        bucket = stage.buckets[index]
        if bucket not in self.buffers:
            self.buffers[bucket] = torch.zeros(bucket.numel, device=parameter.device)
            if not self.reducing:
                self.kept.add(bucket)
        written = self.written.setdefault(bucket, set())
        assert parameter.grad is not None
        bucket.fill(self.buffers[bucket], number, parameter.grad, add=number in written)
        written.add(number)
        parameter.grad = None
        stage.begun = True
        stage.missing[index] -= 1
        while self.reducing and stage.sent < len(stage.buckets) and stage.missing[stage.sent] == 0:
            self._reduce(stage.buckets[stage.sent])
            stage.sent += 1

    def _send_rest(self, stage: Stage) -> None:
        with torch.no_grad():
            for bucket in stage.buckets[stage.sent :]:
                self._reduce(bucket)

    def _reduce(self, bucket: Bucket) -> None:
        buffer = self.buffers.get(bucket)
        if buffer is None:
            buffer = torch.zeros(bucket.numel, device=bucket.parameters[0].device)
        written = self.written.pop(bucket, set())
        if bucket in self.kept:
            for number in {*range(len(bucket.parameters))} - written:
                bucket.clear(buffer, number)
        else:
            self.buffers.pop(bucket, None)
        while len(self.flying) >= IN_FLIGHT and (bucket not in self.kept or self.wire != torch.float32):
            self._receive()
        sent = buffer.to(self.wire) if bucket.ranks > 1 else buffer
        work, summed = self.send(bucket, sent)
        self.flying.append((work, bucket, sent, summed))

    def _reduce_scatter(self, bucket: Bucket, buffer: Tensor) -> tuple[dist.Work | None, Tensor]:
        if bucket.ranks == 1:
            return None, buffer
        shard = buffer.new_empty(bucket.shard_size)
        return dist.reduce_scatter_tensor(shard, buffer, group=self.layout.data_group, async_op=True), shard

    def _receive(self) -> None:
        """Wait for the oldest sum, and add it to those of earlier micro-batches."""
        work, bucket, _, shard = self.flying.popleft()
        if work is not None:
            work.wait()
        shard = shard.to(bucket.weights.device, torch.float32)
        bucket.gradient = shard if bucket.gradient is None else bucket.gradient.add_(shard)

    def _join_copies(self) -> None:
        """Make gradients equal, to the last bit, where every tensor-parallel rank holds the parameter whole.

        One message a step, in fp32, for this rank's shards of all of them: partial gradients are summed, and of whole
        ones that of rank 0 is taken.
        """
        group, first = self.layout.tensor_group, self.layout.tensor_parallel_rank == 0
        copies = [copy for stage in self.stages for bucket in stage.buckets for copy in bucket.copies()]
        if group.size() == 1 or not copies:
            return
        flat = torch.cat([shard * (first or partial) for shard, partial in copies]).to(self.layout.device)
        dist.all_reduce(flat, group=group)
        shards = [shard for shard, _ in copies]
        torch._foreach_copy_(shards, list(flat.to(shards[0].device).split([len(shard) for shard in shards])))
