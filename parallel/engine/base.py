"""One interface over every layout: accumulate gradients of micro-batches, update, evaluate, generate.

The model is made in this order, and no other: groups -> units on `meta` -> tensor-parallel layers -> freeze -> initial
values -> gradient hooks -> data-parallel engine -> load a checkpoint. Freezing comes before ZeRO, which gives fp32
weights and optimizer state to trained parameters only; hooks come before ZeRO, whose own must see summed gradients.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.progress import beat
from model.batch import MicroBatch
from model.config import ModelConfig, MT5Config, ViTConfig
from model.generation import generate
from model.layers import parameter_info, parameter_parts
from model.loss import LossTotals
from model.pali import PaLI
from parallel.config import OptimizerConfig
from parallel.layout import Layout
from parallel.optimizer.adafactor import Adafactor
from parallel.optimizer.adamw import AdamW
from parallel.optimizer.base import Shard, ShardedOptimizer
from parallel.plan.blueprint import Ballast, Blueprint, draw
from parallel.plan.memory import Work
from parallel.shards import Rectangle

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Engine(ABC):
    """A model that can be trained, whoever holds its parameters.

    Subclasses say how gradients are accumulated and applied, and where the shards are. Every method is a collective.
    """

    def __init__(
        self, blueprint: Blueprint, model: PaLI, optimizer: ShardedOptimizer, sharing_group: dist.ProcessGroup
    ) -> None:
        """`sharing_group`: the ranks over which the elements of each trained logical tensor are divided."""
        self.blueprint, self.layout = blueprint, blueprint.layout
        self.model, self.optimizer = model, optimizer
        self.pipeline = None
        if len(blueprint.stages) > 1:
            from parallel.pipeline.schedule import Pipeline

            self.pipeline = Pipeline(blueprint, model, self.backward)
        trained = [part for parameter, part in parameter_parts(model) if parameter.requires_grad]
        optimizer.bind(self.shards(), {part.name: part.shape for part in trained}, sharing_group)

    gradient_scale = 1.0  # what undoes the averaging of gradients over data-parallel ranks

    @abstractmethod
    def shards(self) -> list[Shard]:
        """The flat fp32 weights that this rank updates."""

    @abstractmethod
    def frozen_pieces(self) -> list[tuple[Rectangle, Tensor]]:
        """What this rank holds of the parameters that are not trained."""

    def held_weights(self) -> list[tuple[Rectangle, Tensor]]:
        """Return this rank's pieces of every parameter: trained (fp32) or frozen (in the compute precision)."""
        trained = [(r, r.view(shard.weights.detach())) for shard in self.shards() for r in shard.rectangles]
        return trained + self.frozen_pieces()

    @abstractmethod
    def publish(self) -> None:
        """Bring the fp32 weights, after they were loaded, into the parameters that the model computes with."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch."""

    @abstractmethod
    def apply_update(self) -> float:
        """Clip and update; returns the gradient norm before clipping. Nothing changes if it is not finite."""

    def forward_backward(self, micro_batches: Sequence[MicroBatch], num_targets: int) -> LossTotals:
        """Accumulate gradients of the micro-batches; totals are summed over the data-parallel ranks.

        `num_targets`: target tokens of the step on all ranks, so that the gradient is that of the mean over all of
        them.
        """
        mean = self.blueprint.model.loss_reduction == "mean"
        scale = self.gradient_scale / (max(num_targets, 1) if mean else 1)
        batches = self._placed(micro_batches)
        self.model.train()
        if self.pipeline is not None:
            return self._reduced(self.pipeline.run(batches, train=True, loss_scale=scale))
        totals = []
        for batch in batches:
            output = self.model((), batch, loss_scale=scale)
            self.backward(output.loss)
            totals.append(output.totals)
            beat()  # a step of many micro-batches may take minutes
        return self._reduced(totals)

    def update(self, learning_rate: float) -> float:
        """Update every trained parameter; returns the global gradient norm before clipping (skipped if not finite)."""
        self.optimizer.set_learning_rate(learning_rate)
        if isinstance(ballast := getattr(self.model, "ballast", None), Ballast):
            self.backward(ballast())
        return self.apply_update()

    def discard(self) -> None:
        """Forget the accumulated gradients: a step in which the optimizer does nothing."""
        self.optimizer.skip = True
        try:
            self.update(0.0)
        finally:
            self.optimizer.skip = False

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> LossTotals:
        """Totals over the micro-batches of all data-parallel ranks, without gradients."""
        self.model.eval()
        batches = self._placed(micro_batches)
        if self.pipeline is not None:
            return self._reduced(self.pipeline.run(batches, train=False))
        return self._reduced([self.model((), batch).totals for batch in batches])

    @torch.no_grad()
    def generate(self, batch: MicroBatch, max_new_tokens: int) -> Tensor:
        """Greedy answers, int64 [B, <= max_new_tokens], EOS included then pad; one example per row of the batch."""
        batch = batch.to(self.layout.device)
        decoder = None
        if self.pipeline is not None:
            from parallel.pipeline.decoder import PipelineDecoder

            decoder = PipelineDecoder(self.pipeline, batch)
        return generate(self.model, batch, max_new_tokens, together=self.layout.data_group, decoder=decoder)

    def _placed(self, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
        """On the device, with lengths of text that sequence parallelism can divide."""
        multiple = self.layout.config.tensor if self.layout.config.sequence else 1
        return [batch.padded(multiple).to(self.layout.device) for batch in micro_batches]

    def _reduced(self, totals: list[Tensor]) -> LossTotals:
        """Summed over micro-batches and data-parallel ranks, on every rank; only a last stage has any."""
        nothing = torch.zeros(4, self.blueprint.num_objectives, device=self.layout.device)
        summed = torch.stack([nothing, *totals]).sum(0)
        if self.layout.world_size > 1:  # in one sum, so that all ranks have the same bits and judge them alike
            dist.all_reduce(summed)
        return LossTotals.from_tensor(summed / self.layout.config.tensor)


def make_optimizer(parameters: list[nn.Parameter], config: OptimizerConfig) -> ShardedOptimizer:
    """The optimizer of the configuration's name."""
    return {"adafactor": Adafactor, "adamw": AdamW}[config.name](parameters, config)


def reduce_partial_gradients(model: nn.Module, layout: Layout) -> None:
    """Sum, over the tensor-parallel group, gradients of which each rank saw its part of the sequence only.

    Norms, and everything else that is applied to sequence shards, under sequence parallelism.
    """
    for parameter in model.parameters():
        if parameter.requires_grad and parameter_info(parameter).partial_gradient:
            parameter.register_hook(lambda gradient: _summed(gradient, layout.tensor_group))


def _summed(gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
    gradient = gradient.contiguous()
    dist.all_reduce(gradient, group=group)
    return gradient


def build_engine(
    vit: ViTConfig,
    mt5: MT5Config,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    *,
    layout: Layout,
    num_objectives: int,
    precision: str = "fp32",
    freeze: Sequence[str] = (),
    seed: int | None = 0,
    work: Work | None = None,
) -> Engine:
    """The model of the configuration, laid out, initialised from `seed`, ready to train.

    Without a seed, weights are whatever the memory held, for who loads all of them next. `precision` is "fp32" or
    "bf16" (compute in bf16, fp32 weights in the optimizer). `work` is what pipeline stages are balanced for. Raises
    ConfigurationError for a freeze pattern that matches nothing, or if nothing is left to train.
    """
    from parallel.engine.replicated import ReplicatedEngine  # DeepSpeed is slow to import: only who shards pays for it

    blueprint = draw(
        vit,
        mt5,
        model,
        optimizer,
        layout=layout,
        num_objectives=num_objectives,
        dtype=DTYPES[precision],
        frozen=freeze,
        seed=seed,
        work=work,
    )
    if layout.config.zero_stage == 0:
        return ReplicatedEngine(blueprint)
    from parallel.engine.zero import ZeroEngine

    return ZeroEngine(blueprint)
