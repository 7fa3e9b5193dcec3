"""Greedy decoding over pipeline stages: the output of each stage is broadcast to all ranks of the pipeline."""

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

    def next(self, token: Tensor) -> Tensor:
        """See Decoder.next."""
        stage = self._find_stage("bridge")
        shape = (1, self.batch.num_rows, self.pipeline.carry_plan.d_model)
        x = token.new_empty(shape, dtype=self.pipeline.dtype)
        x = self._share(self.embed(token) if stage in self.pipeline.local_stages else x, stage)
        for stage, names in enumerate(self.pipeline.stages):
            blocks = [name for name in names if name.startswith("decoder_block")]
            if blocks:
                x = self._share(self.decode(x, blocks) if stage in self.pipeline.local_stages else x, stage)
        stage = self._find_stage("head")
        predicted = self.predict(x) if stage in self.pipeline.local_stages else token.new_empty(self.batch.num_rows)
        return self._share(predicted, stage)

    def _find_stage(self, name: str) -> int:
        return next(stage for stage, names in enumerate(self.pipeline.stages) if name in names)

    def _share(self, x: Tensor, stage: int) -> Tensor:
        """Broadcast x from the rank of `stage` to all ranks of the pipeline."""
        x = x.contiguous()
        dist.broadcast(x, group=self.group, group_src=stage % self.group.size())
        return x
