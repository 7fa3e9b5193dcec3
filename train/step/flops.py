"""How much arithmetic a step is, and how much the device could do: what `tflops_per_device` and `mfu` are made of."""

from functools import cached_property

import torch

from model.costs import BatchShape, batch_flops
from model.pali import PaLI, freeze, units
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
    """Model FLOPs of a phase: backward only for what is trained; padding and recomputation do not count."""

    def __init__(self, config: RunConfig, frozen: list[str]) -> None:
        self.config = config
        self.frozen = frozen

    @cached_property
    def plan(self) -> PaLI:
        """The units on `meta`, frozen as in the phase."""
        with torch.device("meta"):
            plan = PaLI(units(self.config.vit, self.config.mt5, self.config.model, num_objectives=1))
        freeze(plan, self.frozen)
        return plan

    def step(self, examples: int, images: int, encoder_tokens: int, decoder_tokens: int) -> float:
        """FLOPs of one step; tokens are summed over its examples, which are taken to be equally long."""
        if not examples:
            return 0.0
        shape = BatchShape(
            images=images,
            vision_tokens=self.config.vit.num_tokens(self.config.model.image_size),
            rows=examples,
            encoder_tokens=round(encoder_tokens / examples),
            decoder_tokens=round(decoder_tokens / examples),
        )
        return batch_flops(self.plan.units(), shape)


def peak_tflops(config: RunConfig, device: torch.device) -> float | None:
    """Peak of one device in TFLOP/s for the run's precision: as configured, or by the device's name, or None (CPUs)."""
    if config.run.peak_tflops is not None:
        return config.run.peak_tflops
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    found = next((peaks for known, peaks in PEAK_TFLOPS.items() if known in name), None)
    return None if found is None else found[0 if config.run.precision == "bf16" else 1]
