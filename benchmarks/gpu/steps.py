"""Time training steps of whole models, and summarize the kernels of one."""

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.kernels import synchronize
from benchmarks.sides import Example, Setting, hugging_face, one_per_row, ours, padded
from benchmarks.step import examples
from common.accelerators import peak_tflops
from model.attention.blocks import BLOCK
from model.costs import batch_flops
from model.describe import one_example
from model.pali import plan_on_meta

WARM_UP = 3  # steps: kernels are compiled, and the allocator's pools grow
# Names of kernels -> their kind; the first that matches.
KINDS = {
    "collectives": r"nccl",
    "copies": r"memcpy|memset",
    "attention": r"flash|fmha|attention|flex|sdpa",
    "matrix products": r"gemm|gemv|cutlass|cublas|nvjet|xmma|wgmma|addmm|::mm|::bmm|matmul|linear",
    "elementwise": r"",
}


@dataclass(frozen=True)
class Step:
    """A step to time: `examples` examples in bf16, `per_row` of them packed in a row of ours."""

    setting: Setting
    examples: int
    per_row: int
    input_tokens: int
    target_tokens: int
    repeats: int

    def halved(self) -> "Step":
        """Return the step with half of the examples."""
        return replace(self, examples=max(self.per_row, self.examples // 2))


def time_ours(step: Step, recompute: str = "none") -> dict[str, Any]:
    """Time our step, with as many examples as fit; see `_time`."""
    return _as_many_as_fit(step, lambda now: _make_ours(now, recompute), trace=True)


def time_hugging_face(step: Step) -> dict[str, Any]:
    """Time Hugging Face's step on the same examples, one a row, padded."""
    return _as_many_as_fit(step, _make_hugging_face, trace=False)


def _make_ours(step: Step, recompute: str) -> Callable[[], float]:
    batch = one_per_row(_examples(step), step.setting.model, step.per_row)
    batch = batch.padded(BLOCK) if torch.cuda.is_available() else batch
    train = ours(step.setting, "bf16", recompute)
    return lambda: train([batch])


def _make_hugging_face(step: Step) -> Callable[[], float]:
    batch = padded(_examples(step), step.setting.model.model.image_size)
    train = hugging_face(step.setting, "bf16")
    return lambda: train([batch])


def _examples(step: Step) -> list[Example]:
    """Make examples whose texts have a quarter to seven quarters of the mean length, as captions and questions do."""
    generator = torch.Generator().manual_seed(0)
    made = examples(step.setting.model, step.examples, 2 * step.input_tokens, 2 * step.target_tokens)
    for one in made:
        for ids, mean in ((one.inputs, step.input_tokens), (one.targets, step.target_tokens)):
            length = int(torch.randint(mean // 4, 2 * mean - mean // 4 + 1, (), generator=generator))
            del ids[max(2, length) :]
    return made


def _as_many_as_fit(step: Step, make: Callable[[Step], Callable[[], float]], trace: bool) -> dict[str, Any]:
    """Time a step; where memory runs out, one of half as many examples."""
    while True:
        try:
            return _time(step, make(step), trace)
        except torch.OutOfMemoryError:
            if step.examples <= step.per_row:
                raise
            step = step.halved()
        torch.cuda.empty_cache()


def _time(step: Step, train: Callable[[], float], trace: bool) -> dict[str, Any]:
    """Return seconds of a step, examples/s, TFLOP/s, MFU, memory, seconds to warm up, and the kernels of one step.

    FLOPs are the model's own: backward for what is trained only, no recomputation, no padding.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began = time.perf_counter()
    losses = [train() for _ in range(WARM_UP)]
    warm_up_s = time.perf_counter() - began
    taken = []
    for _ in range(step.repeats):
        synchronize(device)
        began = time.perf_counter()
        losses.append(train())
        synchronize(device)
        taken.append(time.perf_counter() - began)
    model, seconds = step.setting.model, statistics.median(taken)
    plan = plan_on_meta(model, step.setting.frozen)
    tflop = step.examples * batch_flops(plan.units(), one_example(model, step.input_tokens, step.target_tokens)) / 1e12
    peak = peak_tflops(torch.cuda.get_device_name(), "bf16") if device.type == "cuda" else None
    found: dict[str, Any] = {
        "examples": step.examples,
        "step_s": seconds,
        "least_s": min(taken),
        "largest_s": max(taken),
        "examples_per_s": step.examples / seconds,
        "tflops": tflop / seconds,
        "mfu": tflop / seconds / peak if peak else None,
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "warm_up_s": warm_up_s,
        "losses": losses,
    }
    return found | ({"trace": summarize(train, device)} if trace else {})


def summarize(train: Callable[[], float], device: torch.device) -> dict[str, Any]:
    """Return of one step: each kind's share in the device's busy time, the idle share, and the slowest kernels."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as found:
        began = time.perf_counter()
        train()
        synchronize(device)
        wall_us = 1e6 * (time.perf_counter() - began)
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [(event.key, float(getattr(event, name)), event.count) for event in found.key_averages()]
    kernels = [event for event in events if event[1] > 0 and not (on_gpu and event[0].startswith(("aten::", "cuda")))]
    busy = sum(us for _, us, _ in kernels)
    shares: Counter[str] = Counter()
    for key, us, _ in kernels:
        shares[next(kind for kind, names in KINDS.items() if re.search(names, key, re.IGNORECASE))] += us  # type: ignore
    slowest = sorted(kernels, key=lambda event: -event[1])[:10]
    return {
        "shares": {kind: us / busy for kind, us in shares.most_common()} if busy else {},
        "idle": max(0.0, 1 - busy / wall_us),
        "launches": sum(count for _, _, count in kernels),
        "slowest": [{"kernel": key[:100], "ms": us / 1e3, "calls": count} for key, us, count in slowest],
    }
