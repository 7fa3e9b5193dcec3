"""Compare engines on the device: kernels and ZeRO stages have the losses of plain fp32 attention on the host."""

from dataclasses import replace
from typing import Any

import torch

from benchmarks.sides import NUM_OBJECTIVES, Setting, one_per_row, ours
from benchmarks.step import examples
from model.attention.kernels import KERNELS
from model.config import PaLIConfig
from model.pali import build

STEPS = 4
FP32, BF16 = 1e-4, 5e-2  # relative error of losses


def compare(model: PaLIConfig, device_type: str) -> dict[str, Any]:
    """Return relative errors of losses, and whether all are in bounds.

    First losses of each kernel on the device, against those on the host; then the losses of some updates under every
    ZeRO stage (DeepSpeed over the device's own communication library) and precision, against ZeRO stage 0 in fp32.
    """
    device = torch.device(device_type)
    model = replace(model, num_objectives=NUM_OBJECTIVES)
    batch = one_per_row(examples(model, 4, 16, 8), model, per_row=2)
    plain = replace(model, model=replace(model.model, attention="plain"))
    with torch.no_grad():
        expected = build(plain)((), batch).loss.item()
    errors = {}
    for kernel in KERNELS:
        pali = build(replace(model, model=replace(model.model, attention=kernel))).to(device)
        with torch.no_grad():
            errors[f"{kernel} fp32"] = abs(pali((), batch.to(device)).loss.item() / expected - 1)
    within = all(error < FP32 for error in errors.values())

    reference = _losses(model, "fp32", 0, batch)
    for precision, bound in (("fp32", FP32), ("bf16", BF16)):
        for stage in (0, 1, 2, 3):
            found = _losses(model, precision, stage, batch)
            error = max(abs(x / y - 1) for x, y in zip(found, reference, strict=True))
            errors[f"ZeRO {stage} {precision}"] = error
            within &= error < bound
    return {"errors": errors, "ok": within, "losses": reference}


def _losses(model: PaLIConfig, precision: str, zero_stage: int, batch: Any) -> list[float]:
    step = ours(Setting(model), precision, zero_stage=zero_stage)
    return [step([batch]) for _ in range(STEPS)]
