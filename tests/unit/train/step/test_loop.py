"""The loop skips steps, ends runs and saves, on an engine with given losses."""

import gc
import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import Interrupted, RunStopped, StorageFailed
from data.examples import ExampleInfo
from data.objectives import NAMES
from data.packing import Rows, RowShape, micro_batches, pack
from data.stream import StepData
from model.batch import MicroBatch
from model.loss import LossTotals
from model.pali import plan_on_meta
from parallel.checkpoint.checkpointer import Checkpointer, NotFinite
from parallel.checkpoint.together import SaveFailed, SaveStalled
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.engine.base import Engine
from parallel.engine.build import build_engine
from parallel.layout import Layout
from tests.unit.gpu_on_meta import META, Waits, fake_group
from tests.unit.model.examples import MODEL, PALI
from tests.unit.train.ranks import layout
from train.config import CheckpointConfig, GuardConfig, Phase, RunConfig, RunSettings, ScheduleConfig
from train.phases import Span
from train.run.checkpoints import RunCheckpoints
from train.run.run import Run
from train.run.skipped_batches import NAME, SkippedBatches
from train.step.loop import Loop

SHAPE = RowShape(80, 16, 1, 112, 64)


class FakeEngine:
    """Return the given losses step by step (the first is the dry run's), and record all calls."""

    def __init__(self, losses: Sequence[float], norm: float = 1.0) -> None:
        self.losses, self.norm, self.calls = iter(losses), norm, []  # type: ignore[var-annotated]
        self.blueprint = SimpleNamespace(plan=None)  # set by `loop`
        self.parted: str | None = None
        self.frozen = 0  # objects that garbage collections leave out

    def forward_backward(self, micro_batches: list[MicroBatch], num_targets: int) -> LossTotals:
        tokens = torch.zeros(4, len(NAMES))
        tokens[3, 0] = 1
        tokens[0, 0] = next(self.losses)
        return LossTotals(*tokens)

    def measure(self, totals: LossTotals) -> tuple[LossTotals, float]:
        return totals, self.norm

    def update(self, rate: float) -> float:
        self.calls.append(("update", rate))
        self.frozen = gc.get_freeze_count()
        return self.norm

    def discard(self) -> None:
        self.calls.append(("discard", None))

    def parted_parameter(self) -> str | None:
        return self.parted


class FakeReader:
    prefetch = 0

    def read(self, step: int) -> StepData[Rows]:
        rows, _ = pack([], SHAPE)
        info = ExampleInfo("vq2a", "vqa", f"key{step}", "shard", "en", "What?", "red", step)
        return StepData(micro_batches(rows, 2, SHAPE), [info])


def loop(
    engine: FakeEngine | Engine, folder: Path, steps: int, extra: dict[str, Any] | None = None, **guard: Any
) -> tuple[Loop, SimpleNamespace]:
    config = RunConfig(
        run=RunSettings(folder=str(folder), steps=steps, guard=GuardConfig(**guard)),
        schedule=ScheduleConfig(name="constant", peak=0.5, warmup_steps=0),
        checkpoint=CheckpointConfig(every_steps=4),
    )
    config.model.image_size = 112
    if isinstance(engine, FakeEngine):
        engine.blueprint.plan = plan_on_meta(config.pali)
    run = SimpleNamespace(
        lines=[], saved=[], alerts=[], folder=folder, is_main_rank=True,
        checkpoints=SimpleNamespace(save_due=lambda: False, settle=lambda: None, not_finite=lambda engine: None),
        signals=SimpleNamespace(requested=False),
        records=SimpleNamespace(note=lambda text: None),
        layout=layout(),
    )  # fmt: skip
    run.skipped_batches = SkippedBatches()
    run.records.alert = lambda title, text: run.alerts.append(title)
    run.records.record = run.lines.append
    run.save = lambda engine, step, extra: run.saved.append((step, extra))
    validation = SimpleNamespace(due=lambda step: False)
    span = Span("mini", Phase(image_size=112, learning_rate_factor=0.5), 1, steps)
    return Loop(config, span, run, engine, FakeReader(), validation, extra or {}), run  # type: ignore[arg-type]


def test_steps_are_taken_measured_and_saved(tmp_path: Path) -> None:
    engine = FakeEngine([9.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    trained, run = loop(engine, tmp_path, steps=5)
    assert trained.train(0) == 5
    assert [line["step"] for line in run.lines] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in run.lines] == [5.0, 4.0, 3.0, 2.0, 1.0]
    assert engine.calls == [("discard", None)] + [("update", 0.25)] * 5
    assert [step for step, _ in run.saved] == [4, 5]
    assert run.saved[-1][1] == {"guard": [5.0, 4.0, 3.0, 2.0, 1.0], "phase": "mini"}


def test_the_dry_run_fails_before_anything_is_recorded_and_reads_nothing_twice(tmp_path: Path) -> None:
    broken = FakeEngine([])  # its first forward pass fails
    trained, run = loop(broken, tmp_path, steps=5)
    with pytest.raises(StopIteration):
        trained.train(0)
    assert not run.lines and not run.saved and not broken.calls
    trained, run = loop(FakeEngine([9.0, 5.0, 4.0]), tmp_path, steps=2)
    read = trained.reader.reader.read
    steps: list[int] = []
    trained.reader.reader.read = lambda step: steps.append(step) or read(step)  # type: ignore
    trained.train(0)
    assert steps == [1, 2]


def test_a_bad_loss_is_skipped_and_its_examples_are_kept(tmp_path: Path) -> None:
    engine = FakeEngine([9.0, 5.0, math.nan, 3.0])
    trained, run = loop(engine, tmp_path, steps=3)
    trained.train(0)
    assert [call for call, _ in engine.calls] == ["discard", "update", "discard", "update"]
    assert run.lines[1]["guard"] == "loss is not finite" and run.lines[1]["grad_norm"] is None
    assert '"key2"' in (tmp_path / "bad_batch_step_00000002.json").read_text(encoding="utf-8")


def test_a_step_without_any_target_changes_nothing_and_is_counted(tmp_path: Path) -> None:
    engine = FakeEngine([9.0, 5.0, 0.0, 0.0, 3.0])
    forward_backward = engine.forward_backward

    def without_targets(micro_batches: list[MicroBatch], num_targets: int) -> LossTotals:
        totals = forward_backward(micro_batches, num_targets)
        return LossTotals(*torch.zeros(4, len(NAMES))) if totals.nll.sum() == 0 else totals

    engine.forward_backward = without_targets  # type: ignore[method-assign]
    trained, run = loop(engine, tmp_path, steps=4, max_in_a_row=1)
    trained.train(0)
    assert [call for call, _ in engine.calls] == ["discard", "update", "discard", "discard", "update"]
    assert [line["loss"] for line in run.lines] == [5.0, None, None, 3.0]
    assert [line.get("empty_steps") for line in run.lines] == [None, 1, 2, None]
    assert run.lines[1]["guard"] == "no target token" and run.lines[1]["grad_norm"] is None
    assert run.alerts == ["empty step"] and trained.skipped.state == {"guard": [5.0, 3.0]}
    assert run.saved[-1][1]["empty_steps"] == 2 and not list(tmp_path.glob("bad_batch*"))


def test_many_bad_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    trained, run = loop(FakeEngine([9.0] + [math.inf] * 9), tmp_path, steps=9, max_in_a_row=3)
    with pytest.raises(RunStopped, match="stopped at step 3: 3 steps in a row"):
        trained.train(0)
    assert len(run.lines) == 3 and not run.saved


def test_a_gradient_that_is_not_finite_counts_as_a_bad_step(tmp_path: Path) -> None:
    trained, _ = loop(FakeEngine([9.0] * 9, norm=math.nan), tmp_path, steps=9, max_in_a_row=2)
    with pytest.raises(RunStopped, match="gradient is not finite"):
        trained.train(0)


def test_many_bad_steps_in_a_row_send_the_run_back_as_often_as_it_may(tmp_path: Path) -> None:
    losses = [9.0, 5.0, 4.0] + [math.nan] * 9
    trained, run = loop(FakeEngine(losses), tmp_path, steps=9, max_in_a_row=2, roll_back=1)
    went: list[tuple[int, list[int]]] = []
    run.roll_back = lambda last_good, bad: went.append((last_good, list(bad))) or 0
    assert trained.train(0) == 0
    assert went == [(2, [3, 4])] and run.alerts == ["skipped step", "skipped step", "roll-back"]
    trained, run = loop(FakeEngine(losses), tmp_path, steps=9, max_in_a_row=2, roll_back=1)
    run.skipped_batches.roll_backs = 1
    with pytest.raises(RunStopped, match="stopped at step 4: 2 steps in a row"):
        trained.train(0)


def test_the_batch_whose_update_spoiled_the_weights_is_left_out_too(tmp_path: Path) -> None:
    trained, run = loop(FakeEngine([9.0, 5.0, 4.0] + [math.nan] * 9), tmp_path, steps=9, max_in_a_row=2, roll_back=1)
    run.skipped_batches.batches = [1]
    run.checkpoints.not_finite = lambda engine: "patches.kernel"
    went: list[tuple[int, list[int]]] = []
    alerts: list[str] = []
    run.roll_back = lambda last_good, bad: went.append((last_good, list(bad))) or 0
    run.records.alert = lambda title, text: alerts.append(text)
    assert trained.train(0) == 0
    assert went == [(1, [3, 4, 5])] and "after step 2 had made patches.kernel not finite; their" in alerts[-1]


def test_parted_replicas_are_not_saved(tmp_path: Path) -> None:
    engine = FakeEngine([9.0, 5.0, 4.0])
    trained, run = loop(engine, tmp_path, steps=2)
    engine.parted = "head.weight"
    with pytest.raises(RunStopped, match=r"step 2 is not written, because head\.weight differs"):
        trained.train(0)
    assert run.saved == []


def test_objects_of_the_start_are_not_searched_for_garbage(tmp_path: Path) -> None:
    engine = FakeEngine([9.0, 5.0])
    trained, _ = loop(engine, tmp_path, steps=1)
    before = gc.get_freeze_count()
    trained.train(0)
    assert engine.frozen > 10_000 and gc.get_freeze_count() <= before


def test_a_step_on_a_gpu_waits_once_and_nothing_else_of_it_does(tmp_path: Path, waits: Waits) -> None:
    """From its data to its line of metrics, with `meta` in the place of the GPU."""
    one = fake_group(0, 1)
    model = replace(PALI, model=replace(MODEL, image_size=112), num_objectives=len(NAMES))
    gpu = Layout(ParallelConfig(), META, 0, 1, one, one, one, one, one)
    trained, run = loop(build_engine(model, OptimizerConfig(), gpu, precision="bf16", seed=None), tmp_path, steps=2)
    trained.warn_of_rare_components()
    trained.dry_run(1)
    for step in (1, 2):
        waits.lines.clear()
        trained.step(step)
        assert waits.lines == {"parallel/engine/base.py: *values, squared = message.tolist()": 1}
    assert [line["grad_norm"] for line in run.lines] == [1.0, 1.0], "a value of `meta` is read as 1"


def test_left_out_batches_are_passed_over(tmp_path: Path) -> None:
    trained, run = loop(FakeEngine([9.0, 5.0, math.nan]), tmp_path, steps=2)
    run.skipped_batches.batches = [2, 3]
    trained.train(0)
    assert '"key4"' in (tmp_path / "bad_batch_step_00000002.json").read_text(encoding="utf-8")


def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(tmp_path: Path) -> None:
    trained, run = loop(FakeEngine([9.0, 5.0, 4.0, 3.0]), tmp_path, steps=9)
    record = run.records.record
    run.records.record = lambda line: (record(line), setattr(run.signals, "requested", line["step"] == 2))
    with pytest.raises(Interrupted, match="Interrupted after step 3"):
        trained.train(0)
    assert [step for step, _ in run.saved] == [3]


def test_nothing_is_saved_while_steps_are_distrusted_and_what_was_due_follows(tmp_path: Path) -> None:
    losses = [9.0, 5.0, 4.0, math.nan, math.nan, 3.0, 2.0, 1.0]
    trained, run = loop(FakeEngine(losses), tmp_path, steps=7)
    run.checkpoints.save_due = lambda: len(run.lines) == 2  # minutes have passed, as step 3 begins
    trained.train(0)
    assert [(step, extra.get("bad")) for step, extra in run.saved] == [(5, None), (7, None)]


def test_a_signal_within_a_row_keeps_the_row_and_the_next_process_counts_on(tmp_path: Path) -> None:
    trained, run = loop(FakeEngine([9.0, 5.0, math.nan, math.nan]), tmp_path, steps=9, max_in_a_row=3)
    record = run.records.record
    run.records.record = lambda line: (record(line), setattr(run.signals, "requested", line["step"] == 2))
    with pytest.raises(Interrupted, match="Interrupted after step 3"):
        trained.train(0)
    ((step, extra),) = run.saved
    assert step == 3 and extra == {"guard": [5.0], "phase": "mini", "bad": [2, 3]}
    resumed, again = loop(FakeEngine([9.0, math.nan]), tmp_path, steps=9, extra=extra, max_in_a_row=3, roll_back=1)
    went: list[tuple[int, list[int]]] = []
    again.roll_back = lambda last_good, bad: went.append((last_good, list(bad))) or 0
    assert resumed.train(3) == 0 and went == [(1, [2, 3, 4])]


def test_the_end_of_a_phase_within_a_row_is_saved_as_such(tmp_path: Path) -> None:
    trained, run = loop(FakeEngine([9.0, 5.0, 4.0, math.nan]), tmp_path, steps=3)
    alerts: list[str] = []
    run.records.note = alerts.append
    assert trained.train(0) == 3
    assert [(step, extra["bad"]) for step, extra in run.saved] == [(3, [3])]
    assert alerts == ["The weights are those of step 2: all after it were skipped."]


@pytest.mark.parametrize(("kept", "goes_to"), [([4, 8], 4), ([8], None), ([], None)])
def test_without_a_good_checkpoint_the_run_stops_with_nothing_forgotten(
    tmp_path: Path, kept: list[int], goes_to: int | None
) -> None:
    checkpointer = Checkpointer(tmp_path)
    for step in kept:
        checkpointer.path(step).mkdir()
    layout = SimpleNamespace(broadcast_from_main=lambda read: read(), barrier=lambda: None)
    checkpoints = RunCheckpoints.__new__(RunCheckpoints)
    vars(checkpoints).update(checkpointer=checkpointer, layout=layout, config=RunConfig())
    run = SimpleNamespace(
        checkpoints=checkpoints, folder=tmp_path, skipped_batches=SkippedBatches(), is_main_rank=True, layout=layout
    )
    if goes_to is None:
        with pytest.raises(
            RunStopped, match=r"stopped at step 9: 2 steps in a row.* no checkpoint of step 7 or before"
        ):
            Run.roll_back(run, 7, [8, 9])  # type: ignore[arg-type]
        assert (
            checkpointer.steps() == kept and run.skipped_batches == SkippedBatches() and not (tmp_path / NAME).exists()
        )
        assert Run.roll_back(run, 0, [1, 2]) == 0, "with no step to go back to, the run begins anew"  # type: ignore
    else:
        for failed, raised in ((SaveFailed("the disk"), RunStopped), (SaveStalled("the disk"), StorageFailed)):
            checkpointer.writing = Future()
            checkpointer.writing.set_exception(failed)
            with pytest.raises(raised, match="the disk") as ended:
                Run.roll_back(run, 7, [8, 9])  # type: ignore[arg-type]
            assert not getattr(ended.value, "alone")  # noqa: B009
        checkpointer.writing = Future()
        checkpointer.writing.set_exception(NotFinite("the checkpoint of step 8 is not written"))
        assert Run.roll_back(run, 7, [8, 9]) == goes_to and run.skipped_batches == SkippedBatches([8, 9], 1)  # type: ignore
