"""Send micro-batches through pipeline stages: schedules of `torch.distributed.pipelining`, over any cut of the units.

Stages send the carry only: (vision,) before mT5's bridge and `model.mt5.Carry` after it. Every rank has token ids,
masks and targets, and finds them by the number of the micro-batch. `CarryPlan` computes beforehand the shapes of the
tensors and the ones that need gradients, so stages never negotiate.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from common.progress import beat
from model.attention.bias import reach
from model.batch import MicroBatch
from model.mt5 import Bridge, Carry, DecoderBlock, EncoderBlock, HeadOutput
from model.pali import PaLI
from model.tensor_parallel import num_shared
from model.vit import Patches
from parallel.config import ParallelConfig
from parallel.plan.blueprint import Blueprint

Backward = Callable[[Tensor, bool], None]


@dataclass(frozen=True)
class CarrySizes:
    """The numbers that the shapes of a carry follow from; lengths are of whole sequences."""

    images: int
    rows: int
    encoder_length: int
    decoder_length: int

    @classmethod
    def from_batch(cls, batch: MicroBatch) -> "CarrySizes":
        """Return the sizes of a micro-batch."""
        rows, length = batch.encoder_tokens.shape
        return cls(batch.images.shape[0], rows, length, batch.decoder_tokens.shape[1])


class Pipeline:
    """This rank's stages, and the schedule that runs micro-batches through them."""

    def __init__(self, blueprint: Blueprint, model: PaLI, backward: Backward) -> None:
        """Take a model of the units of this rank's stages.

        `backward` is called with a scalar, and whether it is the last one of a step in its stage.
        """
        self.model, self.layout, self.backward = model, blueprint.layout, backward
        self.stages, self.local_stages = [stage.units for stage in blueprint.stages], blueprint.local_stages
        self.carry_plan, self.dtype = CarryPlan(blueprint.plan, blueprint.layout.config), blueprint.dtype
        self.batches: list[MicroBatch] = []
        self.totals: list[Tensor] = []
        self.loss_scale = 1.0
        self.schedules: dict[bool, tuple[tuple[CarrySizes, int], Any]] = {}
        self.voted = False
        self.interleaved = len(self.stages) > self.layout.pipeline_group.size()

    def run(self, batches: Sequence[MicroBatch], train: bool, loss_scale: float = 1.0) -> list[Tensor]:
        """Run the forward pass of all micro-batches, and the backward pass if `train`.

        The rank of the last stage returns the totals of the micro-batches, the others an empty list. A collective of
        the pipeline group.
        """
        self.batches, self.totals, self.loss_scale = list(batches), [], loss_scale
        if self.interleaved:  # this schedule takes multiples of the pipeline's size only
            self.batches += [batches[0].emptied()] * (-len(batches) % self.layout.pipeline_group.size())
        schedule = self._schedule(CarrySizes.from_batch(batches[0]), len(self.batches), train)
        numbers = torch.arange(len(self.batches))
        last = len(self.stages) - 1 in self.local_stages
        loss = {"target": numbers, "losses": []} if last else {}  # the schedule computes the loss in evaluation too
        (schedule.step if train else schedule.eval)(number=numbers, return_outputs=False, **loss)
        self.voted = True
        return self.totals

    def _schedule(self, sizes: CarrySizes, number: int, train: bool) -> Any:
        """Return the schedule for `number` micro-batches; only the newest is kept, because each has its own buffers."""
        made_for, schedule = self.schedules.get(train, (None, None))
        if made_for != (sizes, number):
            stages = [self._stage(index, sizes) for index in self.local_stages]
            few = number < len(self.stages)  # too few for 1F1B; GPipe then keeps no more activations than it would
            kind: Any = ScheduleGPipe if few or self.layout.config.schedule == "gpipe" else Schedule1F1B
            kind = ScheduleInterleaved1F1B if self.interleaved else kind
            schedule = kind(
                stages if self.interleaved else stages[0],
                number,
                loss_fn=lambda output, _: output[0],
                scale_grads=False,
            )
            self.schedules[train] = ((sizes, number), schedule)
        return schedule

    def _stage(self, index: int, sizes: CarrySizes) -> PipelineStage:
        names = self.stages[index]
        before = self.stages[index - 1][-1] if index else None
        return _Stage(
            _Forward(self, names),
            index,
            len(self.stages),
            self.layout.device,
            input_args=self.carry_plan.after(before, sizes, self.dtype),
            output_args=self.carry_plan.after(names[-1], sizes, self.dtype),
            group=self.layout.pipeline_group,
        )


class _Forward(nn.Module):
    """A stage as the schedule calls it: with the carry, and the number of the micro-batch."""

    def __init__(self, pipeline: Pipeline, names: Sequence[str]) -> None:
        super().__init__()
        self.pipeline, self.names = pipeline, names

    def forward(self, *carry: Tensor, number: Tensor) -> tuple[Tensor, ...]:
        """Run the stage's units: carry -> carry, or (loss, totals) of the last stage."""
        pipeline = self.pipeline
        output = pipeline.model(carry, pipeline.batches[int(number)], self.names, pipeline.loss_scale)
        if isinstance(output, HeadOutput):
            pipeline.totals.append(output.totals)
            output = output.loss, output.totals
        beat()
        return tuple(x.contiguous() for x in output)  # only contiguous tensors can be sent


class _Stage(PipelineStage):
    """A stage whose backward pass runs through the data-parallel engine.

    An engine takes a scalar, so a stage that is not the last gives it sum(output * gradient of the output): the
    gradient of that scalar is the stage's vector-Jacobian product.
    """

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Tensor | None = None) -> Tensor:
        """Vote for shapes that are given, with messages in the first schedule only.

        These start the communicators of neighbors. torch 2.13 votes for every schedule, which waits for the device and
        for all stages, and lengths that change make new schedules; but ours always have the shapes.
        """
        if self._pipeline.voted:
            return torch.ones(1, dtype=torch.int32)
        return super()._warmup_forward_vote(has_backward, received_acc)

    def _warmup_backward_result(self, received_result: Tensor | None = None) -> Tensor:
        """Return the result of the vote; see `_warmup_forward_vote`."""
        if self._pipeline.voted:
            return torch.ones(1, dtype=torch.int32)
        return super()._warmup_backward_result(received_result)

    @property
    def _pipeline(self) -> Pipeline:
        return cast(_Forward, self.submod).pipeline

    def backward_maybe_with_nosync(  # type: ignore[no-untyped-def]
        self, backward_type, bwd_kwargs, last_backward=False
    ):
        """Run the stage's backward pass, and return the gradients of its inputs."""
        output, inputs = bwd_kwargs["stage_output"], bwd_kwargs["input_values"]
        if not self.is_last:
            pairs = zip(output, bwd_kwargs["output_grads"], strict=True)
            terms = [(y * g).sum() for y, g in pairs if g is not None and y.requires_grad]
            output = torch.stack(terms).sum() if terms else None
        if output is not None and output.requires_grad:
            for x in inputs:
                if x.requires_grad:
                    x.retain_grad()
            self._pipeline.backward(output, last_backward)
        return tuple(_gradient(x) for x in inputs), None


def _gradient(x: Tensor) -> Tensor | None:
    """Return None if x needs no gradient, and zeros if it needs one but the stage does not use x."""
    if not x.requires_grad:
        return None
    return torch.zeros_like(x) if x.grad is None else x.grad.contiguous()


class CarryPlan:
    """The shapes of the carry after each unit, and whether its tensors need gradients."""

    def __init__(self, plan: PaLI, parallel: ParallelConfig) -> None:
        units = dict(plan.units())
        patches = next((unit for unit in units.values() if isinstance(unit, Patches)), None)
        bridge = next((unit for unit in units.values() if isinstance(unit, Bridge)), None)
        self.vision_tokens, self.width = (patches.tokens, patches.config.width) if patches is not None else (0, 0)
        self.mt5 = bridge.mt5 if bridge is not None else None
        self.d_model = self.mt5.d_model if self.mt5 is not None else 0
        last: Any = next(unit for unit in units.values() if unit.gives_loss)
        self.num_objectives: int = last.num_objectives
        self.last, self.tensor = list(units)[-1], parallel.tensor
        self.split_sequence = parallel.tensor if parallel.sequence else 1
        self.split_images = parallel.tensor if parallel.replicate_frozen_vit else 1
        self.trained: dict[str, dict[str, bool]] = {}
        self.carries: dict[str, tuple[str, ...]] = {}  # the names of the tensors after each unit
        names: tuple[str, ...] = ("vision",)
        now = dict.fromkeys((*names, *Carry._fields), False)
        for name, unit in units.items():
            self._pass(unit, now)
            names = Carry._fields if isinstance(unit, Bridge) else names
            self.trained[name], self.carries[name] = dict(now), names

    def after(
        self, name: str | None, sizes: CarrySizes, dtype: torch.dtype, whole_sequences: bool = False
    ) -> tuple[Tensor, ...]:
        """Return the carry after the unit `name` as empty tensors on `meta`; () before the first unit."""
        if name is None:
            return ()
        if name == self.last:
            return _empty((), torch.float32, True), _empty((4, self.num_objectives), torch.float32, False)
        shapes = self._shapes(sizes, 1 if whole_sequences else self.split_sequence)
        types = dict.fromkeys(shapes, dtype) | {"encoder_bias": torch.float32, "decoder_bias": torch.float32}
        return tuple(_empty(shapes[n], types[n], self.trained[name][n]) for n in self.carries[name])

    @staticmethod
    def _pass(unit: nn.Module, trained: dict[str, bool]) -> None:
        """Update the names of the tensors that need gradients, from before a unit to after it."""
        if isinstance(unit, Bridge):
            words = unit.embedding.weight.requires_grad
            ends = () if unit.vit is None else (unit.vit_norm, unit.projection)
            visual = trained["vision"] or any(p.requires_grad for module in ends for p in module.parameters())
            trained.update(
                encoder=words or visual,
                decoder=words,
                encoder_bias=unit.encoder_bias is not None and unit.encoder_bias.weight.requires_grad,
                decoder_bias=unit.decoder_bias is not None and unit.decoder_bias.weight.requires_grad,
            )
            return
        own = any(p.requires_grad for p in unit.parameters())
        if isinstance(unit, DecoderBlock):
            trained["decoder"] |= own or trained["encoder"] or trained["decoder_bias"]
        elif isinstance(unit, EncoderBlock):
            trained["encoder"] |= own or trained["encoder_bias"]
        else:
            trained["encoder"] |= own
            trained["vision"] |= own

    def _shapes(self, sizes: CarrySizes, split: int) -> dict[str, tuple[int, ...]]:
        padded = -(-self.vision_tokens // split)  # to a multiple of `split`
        tokens = self.vision_tokens if self.split_images > 1 else padded
        shapes: dict[str, tuple[int, ...]] = {
            "vision": (tokens, num_shared(sizes.images, self.split_images), self.width)
        }
        if self.mt5 is not None:
            lengths = {"encoder": sizes.encoder_length, "decoder": sizes.decoder_length}
            shapes |= {name: (length // split, sizes.rows, self.d_model) for name, length in lengths.items()}
            for name, length in lengths.items():
                distances = 1 if self.mt5.bias_per_layer else 2 * reach(length, self.mt5) - 1
                shapes[f"{name}_bias"] = self.mt5.num_heads // self.tensor, distances
        return shapes


def _empty(shape: tuple[int, ...], dtype: torch.dtype, trained: bool) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=trained)
