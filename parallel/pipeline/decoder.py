"""Generation over pipeline stages: the output of each stage is broadcast to all ranks of the pipeline."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from model.batch import MicroBatch
from model.generation import Decoder
from model.mt5 import Carry
from parallel.pipeline.schedule import CarrySizes, Pipeline


class PipelineDecoder(Decoder):
    """A decoder that all ranks of a pipeline call together; they get the same tokens.

    One stage computes while the others wait.
    """

    def __init__(self, pipeline: Pipeline, batch: MicroBatch) -> None:
        super().__init__(pipeline.model, batch)
        self.pipeline, self.group = pipeline, pipeline.layout.pipeline_group

    def start(self) -> None:
        """See Decoder.start."""
        carry: tuple[Tensor, ...] = ()
        for stage, names in enumerate(self.pipeline.stages):
            encoding = [name for name in names if not name.startswith(("decoder_block", "head"))]
            if not encoding:
                break
            if stage in self.pipeline.local_stages:
                carry = self.model(carry, self.batch, encoding)
            else:
                sizes = CarrySizes.from_batch(self.batch)
                expected = self.pipeline.carry_plan.after(
                    encoding[-1], sizes, self.pipeline.dtype, whole_sequences=True
                )
                carry = tuple(torch.empty_like(x, device=self.batch.images.device) for x in expected)
            carry = tuple(self._share(x, stage) for x in carry)
        self.fill_caches(Carry(*carry))

    def hidden(self, tokens: Tensor) -> Tensor:
        """See Decoder.hidden."""
        stage = self._find_stage("bridge")
        shape = (tokens.shape[1], tokens.shape[0], self.pipeline.carry_plan.d_model)
        x = tokens.new_empty(shape, dtype=self.pipeline.dtype)
        x = self._share(self.embed(tokens) if stage in self.pipeline.local_stages else x, stage)
        for stage, names in enumerate(self.pipeline.stages):
            blocks = [name for name in names if name.startswith("decoder_block")]
            if blocks:
                x = self._share(self.decode(x, blocks) if stage in self.pipeline.local_stages else x, stage)
        return x

    def at_head(
        self, compute: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, empty: tuple[Tensor, ...]
    ) -> tuple[Tensor, ...]:
        """See Decoder.at_head."""
        stage = self._find_stage("head")
        found = compute(x) if stage in self.pipeline.local_stages else empty
        return tuple(self._share(each, stage) for each in found)

    def _find_stage(self, name: str) -> int:
        return next(stage for stage, names in enumerate(self.pipeline.stages) if name in names)

    def _share(self, x: Tensor, stage: int) -> Tensor:
        """Broadcast x from the rank of `stage` to all ranks of the pipeline."""
        x = x.contiguous()
        dist.broadcast(x, group=self.group, group_src=stage % self.group.size())
        return x
