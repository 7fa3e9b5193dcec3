"""Weights in and out of a model by the names of logical tensors.

`files` reads and writes files, `table` translates names, and each foreign format has a file of its own (`mt5`,
`siglip`, `big_vision`).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from common.errors import ConfigurationError
from model.layers import parameter_parts
from model.pali import local_block


def logical_tensors(
    module: nn.Module, select: Callable[[nn.Parameter], Tensor | None] = lambda p: p.detach()
) -> dict[str, Tensor]:
    """Return logical name -> whole tensor, of a model without tensor parallelism.

    `select` maps a parameter to a tensor of its size, such as its gradient, or to None to leave it out.
    """
    tensors = {}
    for parameter, part in parameter_parts(module):
        assert part.block == part.shape, "tensor parallel: this rank holds only a block"
        selected = select(parameter)
        if selected is not None:
            tensors[part.name] = local_block(selected, part)
    return tensors


@torch.no_grad()
def load(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy this rank's block of every tensor whose name the module has; other tensors are skipped.

    Works for any tensor-parallel size, and for one pipeline stage. Position embeddings of another resolution are
    resampled. Raises ConfigurationError for a shape that does not fit.
    """
    for parameter, part in parameter_parts(module):
        if part.name not in tensors:
            continue
        tensor = tensors[part.name]
        if not part.fits(tensor.shape):
            raise ConfigurationError(
                f"{part.name} is {list(tensor.shape)} in the checkpoint but {list(part.shape)} in the model; "
                "choose the vit= or mt5= size it was made with."
            )
        local_block(parameter, part).copy_(part.resampled(tensor)[part.slices])
