"""Define PaLI as a list of units.

The units are patches, vit_block x N, bridge, encoder_block x N, encoder_norm, decoder_block x N, head. An mT5 that is
pretrained alone begins with the bridge; a ViT ends there, and a classifier follows.
"""

import hashlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import ConfigurationError
from model.batch import MicroBatch
from model.classifier import CLASSIFIERS
from model.config import PaLIConfig
from model.costs import Unit
from model.dropout import seed_unit
from model.initializers import draw_block
from model.layers import Part, parameter_parts
from model.mt5 import Bridge, DecoderBlock, EncoderBlock, EncoderNorm, Head
from model.tensor_parallel import TensorParallel
from model.vit import Patches, ViTBlock, ViTNorm

Units = dict[str, Unit]


def units(config: PaLIConfig, parallel: TensorParallel | None = None) -> Units:
    """Make the units on the current default device: name -> unit, in the order of the forward pass.

    A unit has the shapes of this rank's blocks in the tensor-parallel group; without one, it holds all of its tensors.
    """
    vit, mt5, model = config.vit, config.mt5, config.model
    parallel = parallel or TensorParallel()
    made: Units = {}
    if config.tower != "mt5":
        made = {
            "patches": Patches(vit, model, parallel),
            **{f"vit_block_{i}": ViTBlock(vit, model.image_size, parallel.for_vit()) for i in range(vit.depth)},
        }
    if config.tower == "vit":
        classifier = CLASSIFIERS[config.classifier.head]
        last = classifier(vit, model.image_size, config.classifier, config.num_objectives, parallel)
        return made | {"bridge": ViTNorm(vit, parallel), "classifier": last}
    return {
        **made,
        "bridge": Bridge(None if config.tower == "mt5" else vit, mt5, model, parallel),
        **{f"encoder_block_{i}": EncoderBlock(mt5, model, parallel) for i in range(mt5.num_encoder_layers)},
        "encoder_norm": EncoderNorm(mt5, model, parallel),
        **{f"decoder_block_{i}": DecoderBlock(mt5, model, parallel) for i in range(mt5.num_decoder_layers)},
        "head": Head(mt5, model, config.num_objectives, parallel),
    }


class PaLI(nn.Module):
    """Run consecutive units: the whole model, or one pipeline stage.

    Forward: (carry of the unit before, () before the first), batch -> carry of the last unit, which is a `HeadOutput`
    after the last. `names` runs only these units: one of several stages on a rank. `loss_scale` multiplies the head's
    loss. A batch with a `dropout_seed` gets the same dropout from any cut into stages, and when it is recomputed.
    """

    def __init__(self, units: Units) -> None:
        super().__init__()
        for name, unit in units.items():
            self.add_module(name, unit)

    def units(self) -> Iterator[tuple[str, Unit]]:
        """Yield (name, unit) in the order of the forward pass."""
        return ((name, child) for name, child in self.named_children() if isinstance(child, Unit))

    def forward(
        self,
        carry: tuple[Tensor, ...],
        batch: MicroBatch,
        names: Sequence[str] | None = None,
        loss_scale: float = 1.0,
    ) -> tuple[Tensor, ...]:
        """See the class."""
        last: Unit | None = None
        for name, unit in self.units():
            if names is None or name in names:
                if batch.dropout_seed is not None and unit.training:
                    seed_unit(batch.dropout_seed, name)  # before `checkpoint`, which restores this state
                if isinstance(unit, DecoderBlock) and not isinstance(last, DecoderBlock):
                    carry = unit.gather(carry)
                carry, last = self.run(unit, carry, batch, loss_scale), unit
        return last.ungather(carry) if isinstance(last, DecoderBlock) else carry

    def run(
        self, unit: Unit, carry: tuple[Tensor, ...], batch: MicroBatch, loss_scale: float = 1.0
    ) -> tuple[Tensor, ...]:
        """Run one unit: without autograd if nothing at or before it is trained, recomputed if it is marked so."""
        inputs = (carry, batch, loss_scale) if unit.gives_loss else (carry, batch)
        trained = unit.trained or any(x.requires_grad for x in carry)
        if not (trained and torch.is_grad_enabled()):
            with torch.no_grad():
                return unit(*inputs)
        if unit.recompute == "block":
            return checkpoint(unit, *inputs, use_reentrant=False)
        return unit(*inputs)

    def train(self, mode: bool = True) -> "PaLI":
        """Set training mode of the trained units; frozen units stay in evaluation mode."""
        for _, unit in self.units():
            unit.train(mode and unit.trained)
        self.training = mode
        return self


def freeze(module: nn.Module, patterns: Iterable[str]) -> None:
    """Stop training every parameter whose name (`vit_block_0.mlp_in.weight`) matches a shell pattern.

    Raises ConfigurationError for a pattern that matches no parameter, because a typing mistake would silently train the
    wrong ones.
    """
    names = dict(module.named_parameters())
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigurationError(
                f"The freeze pattern {pattern!r} matches no parameter; write a shell pattern of names such as "
                f"{next(iter(names))!r}."
            )
        for name in matched:
            names[name].requires_grad_(False)


@torch.no_grad()
def initialize(module: nn.Module, seed: int, name: str = "", given: Collection[str] = ()) -> None:
    """Fill every parameter of a module of that name in place, except the logical tensors of `given`.

    The value of a logical tensor depends on (seed, name) alone, not on the layout.
    """
    for parameter, part in parameter_parts(module, name):
        if part.name in given:
            continue
        local_block(parameter, part).copy_(initial_block(part, seed))


def initial_block(part: Part, seed: int) -> Tensor:
    """Return this rank's block of the initial value of a logical tensor, fp32 on the CPU."""
    digest = hashlib.sha256(f"{seed}/{part.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return draw_block(part.initialize, part.shape, part.slices, generator)


def local_block(parameter: Tensor, part: Part) -> Tensor:
    """Return the view of `part` in a parameter, or in a tensor of its size such as its gradient."""
    return parameter.detach().flatten()[part.start : part.start + part.block.numel()].view(part.block)


def plan_on_meta(config: PaLIConfig, frozen: Iterable[str] = (), parallel: TensorParallel | None = None) -> PaLI:
    """Make the whole model on `meta`: shapes without memory; parameters that match a `frozen` pattern are frozen.

    Raises ConfigurationError as `freeze` does.
    """
    with torch.device("meta"):
        plan = PaLI(units(config, parallel))
    freeze(plan, frozen)
    return plan


def build(config: PaLIConfig, seed: int = 0) -> PaLI:
    """Make the whole model in one process, initialized from a seed."""
    whole = PaLI(units(config))
    initialize(whole, seed)
    return whole
