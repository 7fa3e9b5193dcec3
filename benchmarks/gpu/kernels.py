"""Compare the kernels of T5's attention with the plain one, and time each: packed rows, forward and backward."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from model.attention.bias import bias_by_distance
from model.attention.kernels import KERNELS
from model.attention.masks import Mask
from model.config import MT5Config

# Relative error of a result or gradient in the Euclidean norm, against the plain kernel in fp64.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
KINDS = ("encoder", "decoder", "cross")


class Case:
    """Inputs of one attention: two packed examples a row, the second as long as the first."""

    def __init__(self, mt5: MT5Config, rows: int, queries: int, keys: int, kind: str, device: torch.device) -> None:
        self.mt5, self.kind, self.keys, self.queries = mt5, kind, keys, queries
        generator = torch.Generator().manual_seed(0)
        head = (rows, mt5.num_heads, mt5.d_kv)
        self.inputs = [torch.randn(n, *head, generator=generator) for n in (queries, keys, keys)]
        self.inputs[0] /= mt5.d_kv**0.5  # T5 does not scale the scores
        self.inputs += [torch.randn(mt5.relative_attention_num_buckets, mt5.num_heads, generator=generator)]
        self.gradient = torch.randn(queries, rows, mt5.inner, generator=generator)
        on_host = [(torch.arange(n) >= n // 2).long().expand(rows, n) + 1 for n in (queries, keys)]
        if kind != "cross":
            on_host[1] = on_host[0]
        host = Mask(on_host[0], on_host[1], causal=kind == "decoder")
        self.mask = host if device.type == "cpu" else host.to_device(*(x.to(device) for x in on_host))
        self.device = device

    def run(
        self, kernel: str, dtype: torch.dtype, gradients: bool = True
    ) -> tuple[Callable[[], Tensor], list[Tensor], Tensor]:
        """Return the forward pass, its inputs, and the gradient of its result."""
        given = [x.to(self.device, dtype).requires_grad_(gradients) for x in self.inputs]
        query, key, value, table = given

        def forward() -> Tensor:
            bias = None
            if self.kind != "cross":
                bias = bias_by_distance(table, self.mt5, self.keys, self.kind == "encoder")
            return KERNELS[kernel](query, key, value, bias, self.mask, False)

        return forward, given[: 3 if self.kind == "cross" else 4], self.gradient.to(self.device, dtype)


def compare(mt5: MT5Config, device_type: str, rows: int, queries: int, keys: int) -> dict[str, Any]:
    """Return the largest relative error of each kernel, type and kind of attention, and whether all are in bounds.

    Results and the gradients of query, key, value and the table of biases, against the plain kernel in fp64.
    """
    device = torch.device(device_type)
    errors, within = {}, True
    for kind in KINDS:
        case = Case(mt5, rows, queries, queries if kind != "cross" else keys, kind, device)
        exact = _results(*case.run("plain", torch.float64))
        for kernel in KERNELS:
            for dtype, bound in BOUNDS.items():
                if kernel == "flex" and device.type == "cpu":  # torch has no backward pass of flex on CPUs
                    found = [case.run(kernel, dtype, gradients=False)[0]()]
                else:
                    found = _results(*case.run(kernel, dtype))
                error = max(float((x.double() - y).norm() / y.norm()) for x, y in zip(found, exact, strict=False))
                errors[f"{kind} {kernel} {str(dtype).removeprefix('torch.')}"] = error
                within &= error < bound
    return {"errors": errors, "bounds": {str(k).removeprefix("torch."): v for k, v in BOUNDS.items()}, "ok": within}


def _results(forward: Callable[[], Tensor], inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    result = forward()
    return [result.detach(), *torch.autograd.grad(result, inputs, gradient)]


def measure(
    mt5: MT5Config, device_type: str, kernel: str, lengths: Sequence[tuple[int, int, int]], repeats: int
) -> dict[str, Any]:
    """Time a kernel on all kinds of attention; lengths: encoder and decoder positions, and rows.

    Returns `rows`: for each attention median, least and largest milliseconds of a bf16 forward and backward pass, and
    MiB beyond the inputs; or why it failed.
    """
    rows: dict[str, dict[str, Any]] = {}
    for encoder, decoder, count in lengths:
        for kind, queries, keys in (
            ("encoder", encoder, encoder), ("cross", decoder, encoder), ("decoder", decoder, decoder)
        ):  # fmt: skip
            case = Case(mt5, count, queries, keys, kind, torch.device(device_type))
            name = f"{kind}, {queries} x {keys}, {count} rows, {kernel}"
            try:
                rows[name] = _time(case, kernel, repeats)
            except (NotImplementedError, RuntimeError) as error:  # not on this device; out of memory
                rows[name] = {"failed": " ".join(str(error).split())[:100]}
    return {"rows": rows}


def _time(case: Case, kernel: str, repeats: int) -> dict[str, Any]:
    forward, inputs, gradient = case.run(kernel, torch.bfloat16)
    on_gpu, taken = case.device.type == "cuda", []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else 0
    for _ in range(repeats + 3):
        synchronize(case.device)
        began = time.perf_counter()
        torch.autograd.grad(forward(), inputs, gradient)
        synchronize(case.device)
        taken.append(1e3 * (time.perf_counter() - began))
    taken = taken[3:]
    found = {"median_ms": statistics.median(taken), "least_ms": min(taken), "largest_ms": max(taken)}
    return found | ({"memory_mib": (torch.cuda.max_memory_allocated() - before) / 2**20} if on_gpu else {})


def synchronize(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
