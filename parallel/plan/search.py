"""Search the layouts of a cluster: every division of its ranks, each with its best micro-batch and recomputation.

Layouts are priced in three passes, so that 1,024 ranks take seconds: memory, a bound that no schedule can beat, and a
played schedule for those whose bound is below the best found. The result is that of playing all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from common.errors import ConfigurationError
from model.config import PaLIConfig
from model.costs import BatchShape, Unit, UnitCost, unit_costs
from model.pali import plan_on_meta
from parallel import layout
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.plan.hardware import GIB, Hardware
from parallel.plan.memory import MemoryModel, StepShape
from parallel.plan.peak import Peak, PeakModel
from parallel.plan.recompute import mark_recomputed
from parallel.plan.step_time import StepModel, StepTime
from parallel.plan.unit_info import UnitInfo, unit_infos

TENSORS, VIRTUAL = (1, 2, 4, 8), (1, 2)
PIPELINES = (1, 2, 4, 8, 16)
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
RECOMPUTE = ("none", "attention", "block")
HEADROOM = 0.97  # share of a device's memory that a plan may fill: allocators fragment


@dataclass(frozen=True)
class Rows:
    """The rows of a phase: global batch in examples, and lengths."""

    global_batch_size: int
    images_per_row: int
    encoder_length: int
    decoder_length: int


@dataclass(frozen=True)
class PhasePlan:
    """Hold what a plan needs of a phase: its model as it is frozen, its rows and its share of the run's steps."""

    name: str
    config: PaLIConfig
    frozen: tuple[str, ...]
    rows: Rows
    steps: int


@dataclass(frozen=True)
class PhaseChoice:
    """One phase of a layout, predicted."""

    parallel: ParallelConfig
    starts: tuple[int, ...]
    cut: tuple[str, ...]
    time: StepTime
    peaks: tuple[Peak, ...]
    mfu: float

    @property
    def memory_bytes(self) -> float:
        """Return the bytes of the fullest rank."""
        return max(peak.total for peak in self.peaks)


@dataclass(frozen=True)
class Choice:
    """A layout for all phases; `seconds` is the run's, or a step's where there is one phase."""

    phases: dict[str, PhaseChoice]
    seconds: float

    @property
    def parallel(self) -> ParallelConfig:
        """Return the settings of the first phase; the degrees are those of all."""
        return next(iter(self.phases.values())).parallel


@dataclass
class Search:
    """Find the fastest layouts of a model on `gpus` devices; `fused`: T5's attention is one kernel."""

    phases: Sequence[PhasePlan]
    optimizer: OptimizerConfig
    hardware: Hardware
    gpus: int
    base: ParallelConfig = field(default_factory=ParallelConfig)
    element_bytes: int = 2
    fused: bool = True
    on_gpu: bool = True
    num_streams: int | None = None
    """Streams that a data-parallel size must divide; None: any."""
    headroom: float = HEADROOM
    played: int = 0
    rejected: dict[str, float] = field(default_factory=dict)
    """Smallest bytes of the fullest rank, by phase, over layouts that do not fit."""
    _plans: dict[str, list[tuple[str, Unit]]] = field(default_factory=dict)
    _infos: dict[str, list[UnitInfo]] = field(default_factory=dict)
    _costs: dict[Any, list[UnitCost]] = field(default_factory=dict)
    _times: dict[Any, tuple[dict[Any, Any], dict[Any, Any], dict[Any, Any]]] = field(default_factory=dict)
    _flops: dict[str, float] = field(default_factory=dict)

    def run(self, most: int = 10, exhaustive: bool = False, below_s: float = float("inf")) -> list[Choice]:
        """Return the `most` fastest layouts that take less than `below_s`, best first; none if none fits.

        `exhaustive` plays every layout.
        """
        found: list[Choice] = []
        worst = below_s
        for degrees in self.degrees():
            made: dict[str, PhaseChoice] = {}
            seconds = 0.0
            for phase in self.phases:
                best = self._best(phase, degrees, exhaustive, (worst - seconds) / max(phase.steps, 1))
                if best is None:
                    break
                made[phase.name] = best
                seconds += phase.steps * best.time.seconds
            else:
                found.append(Choice(made, seconds))
                found.sort(key=lambda choice: choice.seconds)
                del found[most:]
                if len(found) == most and not exhaustive:
                    worst = found[-1].seconds
        return found

    def degrees(self) -> Iterator[ParallelConfig]:
        """Yield the divisions of the ranks that the model allows, simplest first."""
        for pipeline in PIPELINES:
            for virtual in VIRTUAL if pipeline > 1 else (1,):
                for tensor in TENSORS:
                    for sequence in (True, False) if tensor > 1 else (False,):
                        yield from self._zero(pipeline, virtual, tensor, sequence)

    def _zero(self, pipeline: int, virtual: int, tensor: int, sequence: bool) -> Iterator[ParallelConfig]:
        for stage in (0, 1, 2, 3):
            try:
                made = replace(
                    self.base, tensor=tensor, pipeline=pipeline, virtual_stages=virtual, sequence=sequence,
                    zero_stage=stage, gather="micro_batch", reduce="step", cut=[], memory_gib=None, recompute="none",
                )  # fmt: skip
            except ConfigurationError:
                continue  # an option of the settings needs a higher stage
            if stage and self.gpus <= tensor * pipeline:
                continue  # one replica: nothing to divide
            if tensor <= self.hardware.devices_per_node and self._is_possible(made):
                yield made

    def _is_possible(self, parallel: ParallelConfig) -> bool:
        if self.gpus % parallel.replica_size:
            return False
        data = parallel.data_parallel_size(self.gpus)
        units = self.costs(self.phases[0], parallel)[1]
        if parallel.pipeline * parallel.virtual_stages > len(units):
            return False
        try:
            for phase in self.phases:
                layout.check(parallel, phase.config, self.gpus)
        except ConfigurationError:
            return False
        if self.num_streams and self.num_streams % data:
            return False
        return all(phase.rows.global_batch_size % data == 0 for phase in self.phases)

    def _options(self, phase: PhasePlan, degrees: ParallelConfig) -> Iterator[ParallelConfig]:
        data = degrees.data_parallel_size(self.gpus)
        rows = -(-phase.rows.global_batch_size // (data * max(1, phase.rows.images_per_row)))
        gathers = ("micro_batch", "step") if degrees.zero_stage == 3 else ("micro_batch",)
        # Stage 2 that sums once a step is stage 1.
        sums = (("step",), ("step",), ("micro_batch",), ("step", "micro_batch"))[degrees.zero_stage]
        for micro in MICRO_BATCHES:
            if micro > rows:
                return
            for recompute in RECOMPUTE:
                for gather, reduce in product(gathers, sums if micro < rows else sums[:1]):
                    yield replace(degrees, micro_batch_size=micro, recompute=recompute, gather=gather, reduce=reduce)

    def _best(self, phase: PhasePlan, degrees: ParallelConfig, exhaustive: bool, worst: float) -> PhaseChoice | None:
        """Return the fastest options of a phase under these degrees that fit, None if none fits or all are slower."""
        priced: list[tuple[float, int, StepModel, list[int]]] = []
        for parallel in self._options(phase, degrees):
            model, starts = self.step_model(phase, parallel)
            bound = model.lower_bound_s(starts)
            if exhaustive or bound < worst:
                priced.append((bound, len(priced), model, starts))
        best: PhaseChoice | None = None
        for bound, _, model, starts in sorted(priced, key=lambda each: each[:2]):
            if not exhaustive and best is not None and bound >= best.time.seconds:
                break
            peaks = self.peaks(model, starts)
            if not self.fits(phase, peaks):
                continue
            time = model.time(starts)
            self.played += 1
            if time.seconds < (best.time.seconds if best else worst):
                best = self._choice(phase, model, starts, time, peaks)
        return best

    def fits(self, phase: PhasePlan, peaks: Sequence[Peak]) -> bool:
        """Return whether every rank fits; remember the least that did not."""
        most = max(peak.total for peak in peaks)
        if most <= self.hardware.memory_gib * GIB * self.headroom:
            return True
        self.rejected[phase.name] = min(self.rejected.get(phase.name, float("inf")), most)
        return False

    def step_model(self, phase: PhasePlan, parallel: ParallelConfig) -> tuple[StepModel, list[int]]:
        """Return the model of a step and the cut of its units; nothing is played."""
        data = parallel.data_parallel_size(self.gpus)
        rows, micro = phase.rows, parallel.micro_batch_size
        shape = BatchShape(
            micro * rows.images_per_row, phase.config.tokens_per_image, micro, rows.encoder_length,
            rows.decoder_length, self.element_bytes,
        )  # fmt: skip
        step = StepShape(shape, -(-rows.global_batch_size // (data * micro * max(1, rows.images_per_row))))
        costs, infos = self.costs(phase, parallel, shape)
        times, cuts, messages = self._times.setdefault(phase.name, ({}, {}, {}))
        model = StepModel(
            self.hardware, parallel, self.optimizer, step, data, costs, infos, self.fused, times, cuts, messages
        )
        starts = model.starts() if parallel.pipeline > 1 else [0]
        return model, starts

    def peaks(self, model: StepModel, starts: Sequence[int]) -> list[Peak]:
        """Return the memory of every pipeline rank."""
        memory = MemoryModel(model.parallel, self.optimizer, model.step, model.data_parallel_size)
        return PeakModel(memory, self.hardware, model.costs, model.infos, self.fused, self.on_gpu).peaks(starts)

    def costs(
        self, phase: PhasePlan, parallel: ParallelConfig, shape: BatchShape | None = None
    ) -> tuple[list[UnitCost], list[UnitInfo]]:
        """Return the costs of a phase's units under a layout's recomputation, made once for each shape."""
        if phase.name not in self._plans:
            plan = plan_on_meta(phase.config, phase.frozen)
            self._plans[phase.name] = list(plan.units())
            self._infos[phase.name] = unit_infos(plan.units(), self.optimizer)
        infos, key = self._infos[phase.name], (phase.name, parallel.recompute, shape)
        if key not in self._costs:
            marked = [(name, copy(unit)) for name, unit in self._plans[phase.name]]
            mark_recomputed(marked, parallel)
            self._costs[key] = list(unit_costs(marked, shape or BatchShape(0, 1, 0, 0, 0)))
        return self._costs[key], infos

    def _choice(
        self, phase: PhasePlan, model: StepModel, starts: Sequence[int], time: StepTime, peaks: Sequence[Peak]
    ) -> PhaseChoice:
        names = tuple(model.infos[start].name for start in starts[1:])
        peak = self.hardware.rate(self.element_bytes).peak_tflops * 1e12
        mfu = self.step_flops(phase) / (time.seconds * self.gpus * peak)
        return PhaseChoice(model.parallel, tuple(starts), names, time, tuple(peaks), mfu)

    def step_flops(self, phase: PhasePlan) -> float:
        """Return the FLOPs of a phase's step: backward only for what is trained, no recomputation."""
        if phase.name not in self._flops:
            rows = phase.rows
            number = -(-rows.global_batch_size // max(1, rows.images_per_row))
            shape = BatchShape(rows.images_per_row, phase.config.tokens_per_image, 1, rows.encoder_length,
                               rows.decoder_length, self.element_bytes)  # fmt: skip
            none = replace(self.base, recompute="none")
            self._flops[phase.name] = number * sum(cost.training_flops for cost in self.costs(phase, none, shape)[0])
        return self._flops[phase.name]


def smallest(make: Callable[[int], Search], gpus: int, most: int = 16384) -> int | None:
    """Return the smallest number of devices above `gpus`, by doubling, on which some layout fits."""
    number = gpus
    while number < most:
        number *= 2
        if make(number).run(most=1):
            return number
    return None
