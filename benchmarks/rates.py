"""Measure the rates of one device: matrix products by shape, attention, elementwise traffic, launches.

On a CPU a measurement is the CPU time of this thread, so other processes disturb it little; on a GPU it is the time
between two events of a filled stream. Each is the median of several.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from parallel.plan.unit_time import FLASH_BACKWARD

REPEATS = 7
TILES = {"cpu": (1, 8, 16, 32), "cuda": (64, 128, 256)}
RAMPS = (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# rows and (columns, inner) of the products, as those of the model's layers
SHAPES = {
    "cpu": ((64, 256, 1024), ((256, 256), (1024, 256), (256, 1024), (64, 512), (1024, 1024), (2816, 1024))),
    "cuda": ((256, 1024, 4096, 16384), ((1024, 1024), (4096, 1024), (1024, 4096), (4096, 4096), (10240, 4096))),
}
LARGE = {"cpu": 2**28, "cuda": 2**31}  # bytes of a copy, beyond any cache
STREAM = {"cpu": (1024, 768), "cuda": (16384, 4096)}  # positions and width of a residual stream
ATTENTION = {"cpu": (4, 12, 256, 64), "cuda": (16, 16, 1024, 128)}  # rows, heads, positions, width of a head


@dataclass(frozen=True)
class Product:
    """One measured product [rows, inner] x [inner, columns]."""

    rows: int
    columns: int
    inner: int
    seconds: float

    @property
    def flops(self) -> float:
        """Return the FLOPs of the product."""
        return 2.0 * self.rows * self.columns * self.inner


@dataclass(frozen=True)
class Fit:
    """The rate of products as `MatrixProducts` describes it, and its errors."""

    tile: int
    ramp: int
    flops_per_s: float
    errors: tuple[float, ...]
    """Predicted over measured seconds, minus 1, of each product."""


def seconds(run: Callable[[], object], device: torch.device, repeats: int = REPEATS) -> float:
    """Return the median seconds of one run; short ones are measured several at a time."""
    run()
    number = max(1, math.ceil(2e-3 / max(_once(run, device, 1), 1e-7)))
    return statistics.median(_once(run, device, number) for _ in range(repeats))


def _once(run: Callable[[], object], device: torch.device, number: int) -> float:
    if device.type == "cuda":
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        for _ in range(number):
            run()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended) / 1e3 / number
    before = time.thread_time()
    for _ in range(number):
        run()
    return (time.thread_time() - before) / number


def products(device: torch.device, dtype: torch.dtype) -> list[Product]:
    """Measure the three products of linear maps: outputs, gradients of inputs, gradients of weights."""
    rows, maps = SHAPES[device.type]
    found = []
    for tokens, (d_out, d_in) in itertools.product(rows, maps):
        x = torch.randn(tokens, d_in, device=device).to(dtype)
        weight = torch.randn(d_out, d_in, device=device).to(dtype)
        gradient = torch.randn(tokens, d_out, device=device).to(dtype)
        forms = [
            ((tokens, d_out, d_in), partial(linear, x, weight)),
            ((tokens, d_in, d_out), partial(torch.matmul, gradient, weight)),
            ((d_out, d_in, tokens), partial(torch.matmul, gradient.t(), x)),
        ]
        found += [Product(*shape, seconds(run, device)) for shape, run in forms]
    return found


def fit(measured: Sequence[Product], units: int, device: torch.device, launch_s: float) -> Fit:
    """Return the tile, ramp and rate with the least mean error over all products, as `Hardware.product_s` has them."""
    best: tuple[float, Fit] | None = None
    for tile, ramp in itertools.product(TILES[device.type], RAMPS):
        work = []
        for each in measured:
            tiles = math.ceil(each.rows / tile) * math.ceil(each.columns / tile)
            work.append(2.0 * max(tiles, units) * tile**2 * each.inner * (1 + ramp / each.inner))
        taken = [max(each.seconds - launch_s, 1e-9) for each in measured]
        rate = statistics.median(flops / s for flops, s in zip(work, taken, strict=True))
        errors = tuple(flops / rate / s - 1 for flops, s in zip(work, taken, strict=True))
        mean = statistics.fmean(abs(math.log1p(error)) for error in errors)
        if best is None or mean < best[0]:
            best = mean, Fit(tile, ramp, rate, errors)
    assert best is not None
    return best[1]


def copy_bytes_per_s(device: torch.device) -> float:
    """Return the bytes that a large copy reads and writes in a second."""
    source = torch.zeros(LARGE[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def elementwise_bytes_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the bytes a second of a block's elementwise operations, forward and backward.

    Counted as `parallel/plan/unit_time.py` counts: a norm, a GELU, a product and a sum read and write ten times the
    tensor, and their backward pass twice that.
    """
    x = torch.randn(STREAM[device.type], device=device).to(dtype).requires_grad_()
    other = torch.randn_like(x)

    def run() -> None:
        y = layer_norm(x, x.shape[1:])
        y = gelu(y, approximate="tanh") * other + x
        y.backward(other)
        x.grad = None

    return 3 * 10 * x.nbytes / seconds(run, device)


def attention_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOPs a second of fused attention, forward and backward."""
    rows, heads, positions, width = ATTENTION[device.type]
    query, key, value = (
        torch.randn(rows, heads, positions, width, device=device).to(dtype).requires_grad_() for _ in range(3)
    )
    gradient = torch.randn_like(query)

    def run() -> None:
        scaled_dot_product_attention(query, key, value).backward(gradient)
        query.grad = key.grad = value.grad = None

    return (1 + FLASH_BACKWARD) * 4.0 * rows * heads * positions**2 * width / seconds(run, device)


def launch_s(device: torch.device) -> float:
    """Return the seconds of an operation of one element."""
    x = torch.zeros(1, device=device)
    return seconds(lambda: x.add_(1.0), device)
