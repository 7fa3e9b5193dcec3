"""Compute the learning rate of a step."""

import math

from train.config import ScheduleConfig


def learning_rate(schedule: ScheduleConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of update `step` (from 1) of `total_steps`.

    Linear warm-up reaches `peak` at step `warmup_steps`; then
    rsqrt: peak * sqrt(warmup / step) (T5X `linear_warmup * rsqrt_normalized_decay`; PaLI: peak 1e-2, warm-up 1000);
    linear_decay and cosine: to `end_fraction` * peak at `total_steps`; constant: peak.
    The last `cooldown_steps` are multiplied by a line that falls to zero (ViT-e's recipe).
    """
    warmup = schedule.warmup_steps
    if step <= warmup:
        rate = schedule.peak * step / warmup
    elif schedule.name == "rsqrt":
        rate = schedule.peak * math.sqrt(max(warmup, 1) / step)
    elif schedule.name == "constant":
        rate = schedule.peak
    else:
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        left = 1.0 - done if schedule.name == "linear_decay" else 0.5 * (1.0 + math.cos(math.pi * done))
        rate = schedule.peak * (schedule.end_fraction + (1.0 - schedule.end_fraction) * left)
    if schedule.cooldown_steps:
        rate *= min(1.0, max(0.0, (total_steps - step) / schedule.cooldown_steps))
    return rate
