"""Count the arithmetic of a step and the peak of a device, for `tflops_per_device` and `mfu`."""

import torch

from model.costs import BatchShape, batch_flops
from model.pali import PaLI
from train.config import RunConfig

# Dense peak in TFLOP/s from the vendor's data sheets: (bf16 with fp32 sums, fp32 as torch computes it by default).
PEAK_TFLOPS = {
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "B200": (2250.0, 75.0),
}


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
    name = torch.cuda.get_device_name(device)
    found = next((peaks for known, peaks in PEAK_TFLOPS.items() if known in name), None)
    return None if found is None else found[0 if config.run.precision == "bf16" else 1]
