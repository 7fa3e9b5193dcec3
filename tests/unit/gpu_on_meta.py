"""Let the `meta` device take the place of the GPU, so that a machine without one runs the path of a GPU.

Every branch on `is_cuda` is taken. An operator that mixes host and device tensors raises, and each place where the host
waits for the device is recorded.
"""

import linecache
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeProcessGroup
from torch._higher_order_ops.flex_attention import flex_attention as flex_operator
from torch._higher_order_ops.flex_attention import flex_attention_backward as flex_backward_operator
from torch.distributed.distributed_c10d import _world as world
from torch.nn.attention import flex_attention as flex
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from model.megatron import parallel_state  # before any other part of Megatron

from megatron.core.utils import GlobalMemoryBuffer  # isort: skip

META = torch.device("meta")
ROOT = Path(__file__).parents[2]
FLEX_AS_OPERATORS = sys.modules["torch._higher_order_ops.flex_attention"].__file__
OURS = tuple(str(ROOT / folder) for folder in ("common", "model", "parallel", "train"))


class Waits(TorchDispatchMode):
    """Count the waits of the host for the device, by line of source: {"model/loss.py: x.item()": 2}.

    A value that the host reads is 1. A copy from pageable host memory waits too, unless it is `non_blocking`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()

    def record(self) -> None:
        """Count a wait at the innermost line of this project; what takes the place of flex's kernel does not count."""
        frame = sys._getframe(1)
        while not frame.f_code.co_filename.startswith(OURS):
            if frame.f_code.co_filename == FLEX_AS_OPERATORS:
                return
            if frame.f_back is None:
                raise AssertionError("the host waits for the device outside of this project")
            frame = frame.f_back
        name = Path(frame.f_code.co_filename).relative_to(ROOT).as_posix()
        self.lines[f"{name}: {linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()}"] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator of torch: see the class."""
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        on_device = any(x.device == META for x in tensors)
        if func is torch.ops.aten._local_scalar_dense.default and on_device:
            self.record()
            return torch.ones((), dtype=args[0].dtype).item()
        if func is torch.ops.aten._to_copy.default:
            return self._convert(func, args, kwargs)
        if func is torch.ops.aten.copy_.default:
            if (args[0].device == META) != (args[1].device == META):
                assert args[0].device == META, "values of a meta tensor cannot be written to the host"
                if args[1].dim() and not (kwargs.get("non_blocking") or args[2:]):
                    self.record()
        elif on_device and func.namespace != "c10d":
            mixed = [x for x in tensors if x.device != META and x.dim()]
            assert not mixed, f"{func} takes a host tensor of {tuple(mixed[0].shape)} with a device tensor"
        return func(*args, **kwargs)

    def _convert(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Copy between host and device, or to another dtype."""
        source, target = args[0], torch.device(kwargs.get("device") or args[0].device)
        if source.device == META and target != META:
            self.record()
            return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        if source.device != META and target == META and not kwargs.get("non_blocking"):
            self.record()
        return func(*args, **kwargs)


def _without_mode(operator: Any) -> Callable[..., Any]:
    return lambda mode, *args, **kwargs: operator(*args, **kwargs)


for _operator in (flex_operator, flex_backward_operator):
    _operator.py_impl(Waits)(_without_mode(_operator))  # a mode needs a rule for each higher-order operator


@contextmanager
def meta_as_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Waits]:
    """Let `meta` take the place of the GPU within the context, and yield the waits of all that runs in it."""
    mode = Waits()
    made, new = torch.tensor, Tensor.new_tensor

    def tensor(*args: Any, **kwargs: Any) -> Tensor:
        if torch.device(kwargs.get("device") or "cpu") == META:
            mode.record()
        return made(*args, **kwargs)

    def new_tensor(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.device(kwargs.get("device") or self.device) == META:
            mode.record()
        return new(self, *args, **kwargs)

    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(Tensor, "new_tensor", new_tensor)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: self.device == META))
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr("model.attention.kernels.compiled_flex", lambda: flex_as_operators)
    monkeypatch.setattr("model.recompute._compiled", lambda function: function)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: META)
    monkeypatch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", GlobalMemoryBuffer())
    before, maps = dist.group.WORLD, (world.pg_map, world.pg_group_ranks)
    kept = [dict(groups) for groups in maps]
    dist.group.WORLD = fake_group(0, 2)  # Megatron looks whether a world has started
    try:
        with mode:
            yield mode
    finally:
        dist.group.WORLD = before
        for groups, own in zip(maps, kept, strict=True):  # torch's profiler describes every group that it finds
            groups.clear()
            groups.update(own)


def flex_as_operators(*args: Any, **kwargs: Any) -> Tensor:
    """Run flex_attention as torch's operators, which have its gradients; only Dynamo passes captured tensors on."""
    with _disable_current_modes():
        return flex.flex_attention(*args, **kwargs)


def fake_group(rank: int, size: int, name: str = "", ranks: Sequence[int] = ()) -> dist.ProcessGroup:
    """Make a process group of `size` ranks whose collectives do nothing; it needs no world.

    `ranks`: its numbers in the world, for callers that look them up (torch's pipelines, DeepSpeed).
    """
    group = dist.ProcessGroup(FakeStore(), rank, size)
    backend = FakeProcessGroup._create_internal(rank, size)
    kind = dist.ProcessGroup.BackendType.CUSTOM
    group._set_default_backend(kind)
    for device in (META, torch.device("cpu")):
        group._register_backend(device, kind, backend)
    if name:
        group._set_group_name(name)
        world.pg_map[group] = "fake", FakeStore()
        world.pg_group_ranks[group] = {number: i for i, number in enumerate(ranks)}
    return group
