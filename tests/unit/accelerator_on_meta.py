"""Let DeepSpeed take `meta` for its accelerator, one with streams, as a GPU has them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.comm import comm
from deepspeed.runtime.zero import linear

from tests.unit.gpu_on_meta import META


class MetaAccelerator(CPU_Accelerator):
    """An accelerator whose work is queued: streams order it, and the host waits only where it asks to."""

    def __init__(self) -> None:
        super().__init__()
        self._name = META.type
        self.recorded: list[Any] = []
        self.stream = SimpleNamespace(name="compute")

    def device_name(self, device_index: Any = None) -> str:
        """Return the name of every device: there is one."""
        return META.type

    def device(self, device_index: Any = None) -> torch.device:
        """Return the device."""
        return META

    def current_device_name(self) -> str:
        """Return the name of the device."""
        return META.type

    def set_device(self, device_index: Any) -> None:
        """Do nothing: there is one device."""

    def current_stream(self, device_index: Any = None) -> Any:
        """Return the only stream in which a test computes."""
        return self.stream

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        """Return whether a tensor is on the device."""
        return tensor.device == META

    def is_synchronized_device(self) -> bool:
        """Return False, as for a GPU: results of a call may come later."""
        return False

    def resolves_data_dependency(self) -> bool:
        """Return False, as for a GPU."""
        return False


def use_meta(monkeypatch: pytest.MonkeyPatch) -> MetaAccelerator:
    """Make `meta` DeepSpeed's accelerator for a test."""
    accelerator = MetaAccelerator()
    monkeypatch.setattr(real_accelerator, "ds_accelerator", accelerator)
    monkeypatch.setattr(comm, "cdb", None)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: accelerator.recorded.append(stream))
    monkeypatch.setattr(linear, "get_accelerator", CPU_Accelerator)  # `meta` has no autocast
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return accelerator
