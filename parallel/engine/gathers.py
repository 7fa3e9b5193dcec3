"""Gather ZeRO-3's parameters unit by unit: one collective before a unit's pass, the next unit's on its way.

DeepSpeed 0.19.8 shards parameters (`zero.Init`), gathers lists of them in one collective, and releases them. Its own
hooks gather module by module, and are not used.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from model.pali import PaLI
from parallel.engine.buckets import is_divided
from parallel.plan.gathered import num_kept


def sharded_parameters(module: nn.Module) -> list[Any]:
    """Return the parameters that are shards on this rank."""
    return [p for p in module.parameters() if is_divided(p)]


class Gathering:
    """The sharded parameters of a unit: gathered, on their way, or released."""

    def __init__(self, unit: nn.Module, quantize: bool) -> None:
        self.parameters, self.quantize = sharded_parameters(unit), quantize
        self.handles: list[Any] | None = None
        self.begun = False  # its backward pass

    @property
    def elements(self) -> int:
        """Return the elements that are gathered."""
        return sum(p.ds_numel for p in self.parameters)

    def start(self) -> None:
        """Send for the parameters, unless they are here or on their way."""
        if self.handles is not None:
            return
        forms = defaultdict(list)  # nearby ranks may hold a second copy of some (ZeRO++): these are not mixed
        for p in self.parameters:
            if p.ds_status == ZeroParamStatus.NOT_AVAILABLE:
                forms[p.ds_secondary_tensor is None].append(p)
        self.handles = [own[0].all_gather_coalesced(own, quantize=self.quantize) for own in forms.values()]

    def wait(self) -> None:
        """Wait until the parameters are here."""
        self.start()
        for handle in self.handles or []:
            handle.wait()
        self.handles = []

    def release(self) -> None:
        """Free the parameters; shards stay."""
        if self.handles is None:
            return
        self.wait()  # what is on its way has to arrive
        for p in self.parameters:
            p.partition()
        self.handles, self.begun = None, False


class UnitGathers:
    """Gather every unit before its passes and release it after them, or hold all of them for a while.

    `stages` are the names of this rank's units by pipeline stage, `backward` those of units that have a backward pass.
    The backward pass of the last stage of the model follows at once, so its last units stay gathered until then.
    """

    def __init__(
        self, model: PaLI, stages: Sequence[Sequence[str]], backward: set[str], has_last: bool, quantize: bool
    ) -> None:
        units = dict(model.units())
        self.held = False
        self.stages: list[list[Gathering]] = []
        self.after: dict[Gathering, Gathering] = {}
        self.before: dict[Gathering, Gathering] = {}
        self.kept: set[Gathering] = set()
        self.active: list[Gathering] = []  # the stage whose backward pass runs
        for stage in stages:
            made = [(name, Gathering(units[name], quantize)) for name in stage]
            own = [(name, each) for name, each in made if each.parameters]
            gatherings = [each for _, each in own]
            self.stages.append(gatherings)
            self.after |= dict(pairwise(gatherings))
            with_backward = [each for name, each in own if name in backward]
            self.before |= {later: earlier for earlier, later in pairwise(with_backward)}
            for name, gathering in own:
                self._hook(units[name], gathering, gatherings)
        if has_last:
            last = self.stages[-1]
            number = num_kept([each.elements for each in last])
            self.kept = set(last[len(last) - number :])

    def _hook(self, unit: nn.Module, own: Gathering, stage: list[Gathering]) -> None:
        unit.register_forward_pre_hook(lambda *_: self._before_forward(own))
        unit.register_forward_hook(lambda _, inputs, outputs: self._after_forward(own, stage, inputs, outputs))

    def _before_forward(self, own: Gathering) -> None:
        own.wait()
        if own in self.after and not _in_backward():  # recomputed units are followed by none
            self.after[own].start()

    def _after_forward(self, own: Gathering, stage: list[Gathering], inputs: Any, outputs: Any) -> None:
        if self.held or _in_backward():
            return
        carried = {id(x) for x in inputs[0]}
        made = [x for x in outputs if x.requires_grad and id(x) not in carried]
        for x in made:
            x.register_hook(partial(self._before_backward, own, stage))
        if not made or own not in self.kept:
            own.release()

    def _before_backward(self, own: Gathering, stage: list[Gathering], _: Tensor) -> None:
        if self.held:
            return
        self.active, own.begun = stage, True
        for later in stage[stage.index(own) + 1 :]:
            if later.begun:  # and done: the gradient of its input has come
                later.release()
        own.wait()
        if own in self.before:
            self.before[own].start()

    def after_backward(self) -> None:
        """Release the units of the stage whose backward pass has ended."""
        if not self.held:
            for own in self.active:
                own.release()

    def keep(self) -> None:
        """Release no unit until `let_go`: each is gathered before its first forward pass."""
        self.held = True

    def hold(self) -> None:
        """Gather all units now; they stay until `let_go`."""
        self.keep()
        every = list(self._every())
        for number, own in enumerate(every):
            own.start()
            if number + 1 < len(every):
                every[number + 1].start()
            own.wait()

    def let_go(self) -> None:
        """Release all units."""
        self.held = False
        for own in self._every():
            own.release()

    def drop_second_copies(self, trained: bool = False) -> None:
        """Drop the copies on nearby ranks (ZeRO++), because weights have changed; `trained`: frozen ones have not."""
        for own in self._every():
            for p in own.parameters:
                if p.requires_grad or not trained:
                    p.ds_secondary_tensor = None

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Gather all units for the body, unless they are held already."""
        if self.held:
            yield
            return
        self.hold()
        try:
            yield
        finally:
            self.let_go()

    def _every(self) -> Iterator[Gathering]:
        return (own for stage in self.stages for own in stage)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
