"""The kernels that an update launches do not grow with the layers: equal rectangles of all layers are one batch."""

from collections import Counter
from math import ceil
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.initializers import zeros
from model.layers import Part
from parallel.config import OptimizerConfig
from parallel.optimizer import adafactor
from parallel.optimizer.base import Shard
from parallel.shards import rectangles
from tests.unit.gpu_on_meta import META, Waits

# The kinds of matrices and vectors of an mT5-XXL block with tensor parallelism 4, and its layers.
BLOCK = {"query": (4096, 1024), "out": (4096, 1024), "hidden": (2560, 4096), "mlp_out": (4096, 2560), "norm": (4096,)}
LAYERS, RANKS, TENSORS = 48, 256, 30  # `TENSORS`: of a list that one kernel takes at least
VIEWS = {"view", "_unsafe_view", "unsqueeze", "slice", "select", "split_with_sizes", "t", "unbind", "detach", "expand"}


class Launches(TorchDispatchMode):
    """Count the kernels of operators that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count an operator, and run it."""
        name = func.__name__.split(".")[0]
        if name not in VIEWS and not name.startswith("_record_function"):
            several = len(args[0]) if name.startswith("_foreach") or name in ("stack", "cat") else 1
            self.counts[name] += ceil(several / TENSORS)
        return func(*args, **(kwargs or {}))


def launches(layers: int, momentum: float, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of the second update of one of 256 ranks; each has a piece of every tensor."""
    monkeypatch.setattr(adafactor, "sum_over", lambda *_: None)
    found, shapes, start = [], {}, 0
    for layer in range(layers):
        for kind, sizes in BLOCK.items():
            shape, name = torch.Size(sizes), f"{layer}.{kind}"
            count = shape.numel() // RANKS
            part = Part(name, shape, zeros, (0,) * len(shape), shape, 0)
            shapes[name], start = shape, start + count
            found += rectangles([part], 3 * count, count, start - count, counted=True)
    flat = torch.empty(start, device=META)
    optimizer = adafactor.Adafactor([torch.nn.Parameter(flat)], OptimizerConfig(momentum=momentum))
    optimizer.param_groups[0]["params"] = [flat]
    optimizer.bind([Shard(flat, found)], shapes, None)  # type: ignore[arg-type]
    flat.grad = torch.empty_like(flat)
    optimizer.step()
    with Launches() as counted:
        optimizer.step()
    return sum(counted.counts.values())


def test_an_update_launches_few_kernels(waits: Waits, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank has 240 rectangles here; counted so, one of pali_17b's 256 x 4 ranks had 10,200, and has 299."""
    few, many = launches(2, 0.0, monkeypatch), launches(LAYERS, 0.0, monkeypatch)
    assert many < 250 and many - few < LAYERS
