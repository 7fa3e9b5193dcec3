"""Count the arithmetic of a step and the peak of a device, for `tflops_per_device` and `mfu`."""

import torch

from common import accelerators
from model.costs import BatchShape, batch_flops
from model.pali import PaLI
from train.config import RunConfig


class FlopCounter:
    """Count a model's FLOPs: backward only for trained units, and neither padding nor recomputation.

    `plan` is the whole model as it is frozen, such as that of an engine's blueprint; its units may be on `meta`.
    """

    def __init__(self, plan: PaLI, tokens_per_image: int) -> None:
        self.plan, self.tokens_per_image = plan, tokens_per_image

    def step(self, examples: int, images: int, encoder_tokens: int, decoder_tokens: int) -> float:
        """Return the FLOPs of one step; tokens are summed over its examples, which are taken to be equally long."""
        if not examples:
            return 0.0
        shape = BatchShape(
            images=images,
            vision_tokens=self.tokens_per_image,
            rows=examples,
            encoder_tokens=round(encoder_tokens / examples),
            decoder_tokens=round(decoder_tokens / examples),
        )
        return batch_flops(self.plan.units(), shape)


def peak_tflops(config: RunConfig, device: torch.device) -> float | None:
    """Return the peak of one device in TFLOP/s for the run's precision: configured, or by its name, or None (CPUs)."""
    if config.run.peak_tflops is not None:
        return config.run.peak_tflops
    if device.type != "cuda":
        return None
    return accelerators.peak_tflops(torch.cuda.get_device_name(device), config.run.precision)
