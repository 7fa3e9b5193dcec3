"""A run is saved under one layout and resumed under another, with one continuous curve; saving may fail."""

import json
import math
import os
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.planner import ReadItem

from benchmarks.world import results_file, run_world
from common.errors import ConfigurationError
from model.config import ModelConfig
from model.vit import resample_position
from parallel.checkpoint import checkpointer as checkpoint
from parallel.checkpoint.checkpointer import Checkpointer
from parallel.checkpoint.stored_weights import StoredWeights
from parallel.checkpoint.together import SaveFailed
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.distributed import launch
from parallel.engine.base import Engine
from parallel.engine.build import build_engine
from parallel.layout import Layout
from tests.distributed import problem
from tests.distributed.long_updates import shapes
from tests.distributed.problem import FROZEN_VIT, Case, train, weight_deviation, weights

STEPS_EACH = 5
CHAIN = [
    Case(tensor=2, pipeline=2, data=2, zero_stage=3, sequence=True),
    Case(),
    Case(pipeline=3, data=2, zero_stage=1),
    Case(tensor=4, data=2, zero_stage=2),
]
OPTIMIZERS = ("adafactor", "adamw")
OFFLOADS: list[tuple[int, dict[str, str]]] = [
    (0, {}),
    (2, {"offload_optimizer": "nvme"}),
    (3, {"offload_optimizer": "nvme", "offload_parameters": "nvme"}),
]


def uninterrupted(folder: Path) -> None:
    for optimizer in OPTIMIZERS:
        case = Case(optimizer=optimizer)
        engine = case.engine(case.layout())
        torch.save(train(engine, range(STEPS_EACH * len(CHAIN))), results_file(folder, optimizer))
        with engine.averaged():
            torch.save(weights(engine), results_file(folder, f"{optimizer}_straight_averages"))


@contextmanager
def elements_read() -> Iterator[list[int]]:
    """How many elements of weights this rank takes from a checkpoint, once it has taken any."""
    read: list[int] = []
    resolve = checkpoint._Planner.resolve_tensor

    def counting(planner: checkpoint._Planner, item: ReadItem) -> Tensor:
        found = resolve(planner, item)
        if item.dest_index.fqn.startswith("weights/"):
            read[:] = [sum(read) + found.numel()]
        return found

    with patch.object(checkpoint._Planner, "resolve_tensor", counting):
        yield read


def assert_reads_without_an_engine(folder: Path, optimizer: str, step: int, loaded: dict[str, Tensor]) -> None:
    """Read what eight ranks wrote as `train.export` does: the bits that a whole engine has loaded from there."""
    run = folder / f"run_{optimizer}"
    run.mkdir()
    (run / "checkpoints").symlink_to(folder / optimizer)
    found, averages = (
        {name: tensor.read() for name, tensor in StoredWeights(run, step, average).tensors.items()}
        for average in (False, True)
    )
    assert found.keys() == loaded.keys()
    assert not any(torch.equal(averages[name], values) for name, values in found.items())
    assert all(torch.equal(found[name], values) for name, values in loaded.items())


def link(folder: Path, number: int, case: Case) -> None:
    for optimizer in OPTIMIZERS:
        layout = case.layout()
        engine = replace(case, optimizer=optimizer).engine(layout)
        checkpointer = Checkpointer(folder / optimizer, keep_last=2)
        held = sum(values.numel() for _, values in engine.held_weights())
        with elements_read() as read:
            loaded = checkpointer.load_latest(engine)
        assert loaded is None or read == [held], "a rank reads what it holds, and nothing else"
        assert case.world_size == 1 or held < sum(map(torch.Size.numel, shapes(problem.MODEL.image_size).values())) / 2
        first = 0 if loaded is None else loaded[0]
        assert first == number * STEPS_EACH
        if loaded is not None:
            assert loaded[1] == {"note": number - 1}
            assert set(engine.optimizer.ages.values()) == {first}
            if case.world_size == 1:
                assert_reads_without_an_engine(folder, optimizer, first, weights(engine))
        curve = train(engine, range(first, first + STEPS_EACH))
        with engine.averaged():
            averages = weights(engine)
        checkpointer.save(engine, first + STEPS_EACH, {"note": number})
        checkpointer.wait()
        if layout.rank == 0:
            torch.save(curve, results_file(folder, f"{optimizer}_{number}"))
            torch.save(averages, results_file(folder, f"{optimizer}_averages"))


def test_the_curve_continues_under_any_layout(tmp_path: Path) -> None:
    run_world(1, uninterrupted, tmp_path)
    for number, case in enumerate(CHAIN):
        run_world(case.world_size, link, tmp_path, number, case)
    for optimizer in OPTIMIZERS:
        curve = [torch.load(results_file(tmp_path, f"{optimizer}_{number}")) for number in range(len(CHAIN))]
        flat = [pair for part in curve for pair in part]
        found, expected = (torch.tensor(c) for c in (flat, torch.load(results_file(tmp_path, optimizer))))
        loss, norm = ((found - expected).abs() / expected).amax(0).tolist()
        print(f"{optimizer}: losses within {loss:.1e}, gradient norms within {norm:.1e}, relative")
        assert max(loss, norm) <= 1e-5
        averages, wanted = (
            torch.load(results_file(tmp_path, f"{optimizer}_{kind}")) for kind in ("averages", "straight_averages")
        )
        assert averages.keys() == wanted.keys()
        for name, values in wanted.items():
            assert weight_deviation(name, averages[name], values) <= 1e-5, name
        assert [f.name for f in sorted((tmp_path / optimizer).iterdir())] == [
            "latest",
            *(f"step_{STEPS_EACH * links:08d}" for links in (len(CHAIN) - 1, len(CHAIN))),
        ]


def through_a_pipeline(folder: Path) -> None:
    """Ages of one stage reach the checkpoint, and a fault that one stage finds reaches every rank."""
    case = Case(pipeline=2, zero_stage=1)
    layout = case.layout()
    engine = case.engine(layout)
    checkpointer = Checkpointer(folder)
    train(engine, range(1))
    checkpointer.save(engine, 1, {})
    checkpointer.wait()
    ages = json.loads((folder / "step_00000001" / "state.json").read_text(encoding="utf-8"))["ages"]
    assert ages.keys() == weights(engine).keys() and set(ages.values()) == {1}

    larger = build_engine(
        replace(problem.PALI, model=ModelConfig(image_size=56)),
        OptimizerConfig(),
        layout,
    )
    assert checkpointer.load_latest(larger) == (1, {})
    before, now = weights(engine), weights(larger)
    for name, values in now.items():
        assert torch.equal(values, resample_position(before[name], 16) if name == "patches.position" else before[name])

    # Interleaved stages take any number of micro-batches, though the schedule takes even numbers only.
    interleaved = replace(case, schedule="interleaved").engine(layout)
    batches, plain = problem.micro_batches(0), case.engine(layout)
    for number in (1, 3, 5, 7):
        targets = sum(batch.num_targets for batch in batches[:number])
        both = [e.forward_backward(batches[:number], targets) for e in (interleaved, plain)]
        assert both[0].tokens.sum() == targets
        torch.testing.assert_close(both[0].loss, both[1].loss, rtol=1e-5, atol=0)
        assert interleaved.update(1e-3) == pytest.approx(plain.update(1e-3), rel=1e-5)

    # Only the vision tower differs, and with it only the first stage.
    deeper = build_engine(
        replace(problem.PALI, vit=replace(problem.VIT, depth=3)),
        OptimizerConfig(),
        layout,
    )
    with pytest.raises(ConfigurationError, match=r"another model: vit_block_2.* is missing there"):
        checkpointer.load_latest(deeper)
    frozen_weights_are_written_once(folder / "frozen")


def frozen_weights_are_written_once(folder: Path) -> None:
    """Two layouts save three times; the last checkpoint is whole though the first one is removed."""
    first, other = (Case(freeze=FROZEN_VIT, **sizes) for sizes in ({"pipeline": 2}, {"tensor": 2, "zero_stage": 1}))
    engine, checkpointer = first.engine(first.layout()), Checkpointer(folder, keep_last=2)
    for step in (1, 2):
        train(engine, range(step - 1, step))
        checkpointer.save(engine, step, {})
    checkpointer.wait()
    expected = weights(engine)
    engine = other.engine(other.layout())
    checkpointer = Checkpointer(folder, keep_last=2)
    assert checkpointer.load_latest(engine) == (2, {})
    checkpointer.save(engine, 3, {})
    checkpointer.wait()
    assert checkpointer.steps() == [2, 3]
    one, two = ({file.name: file.stat() for file in (checkpointer.path(step) / "frozen").iterdir()} for step in (2, 3))
    assert len(one) > 1 and {name: file.st_ino for name, file in one.items()} == {
        name: file.st_ino for name, file in two.items()
    }
    again = first.engine(first.layout())
    assert Checkpointer(folder).load_latest(again) == (3, {})
    for name, values in weights(again).items():
        assert torch.equal(values, expected[name]), name


def test_a_stage_alone_does_not_decide(tmp_path: Path) -> None:
    run_world(2, through_a_pipeline, tmp_path)


def beside_training(folder: Path) -> None:
    """What is saved is the state of its step, however late it is written; what cannot be written harms nothing."""
    for zero_stage, offload in OFFLOADS:
        options = {"zero_stage": zero_stage, **offload, "offload_folder": str(folder / "offloaded"), "timeout_s": 120}
        layout = Layout.start(ParallelConfig(**options), launch())
        engine, place = fresh(layout), folder / f"zero{zero_stage}"
        checkpointer = Checkpointer(place)
        train(engine, range(1))
        saved, written_later = weights(engine), threading.Event()
        checkpointer.thread.submit(written_later.wait)
        checkpointer.save(engine, 1, {})
        curve = train(engine, range(1, 3))
        assert not place.exists() and not checkpointer.failed
        layout.barrier()
        written_later.set()
        checkpointer.wait()
        again = fresh(layout)
        assert checkpointer.load_latest(again) == (1, {})
        assert all(torch.equal(values, saved[name]) for name, values in weights(again).items())
        assert train(again, range(1, 3)) == curve, "digit for digit"

    # A disk that takes no more, on one rank: every rank learns why, and the checkpoint before is whole.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if layout.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    checkpointer.save(engine, 3, {})
    train(engine, range(3, 4))
    with pytest.raises(SaveFailed, match=r"step 3 could not be written to .* \(rank 1: .*GiB are free") as failure:
        checkpointer.save(engine, 4, {})
    assert "\n" not in str(failure.value)
    checkpointer.wait()  # it is reported once
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    layout.barrier()
    assert sorted(f.name for f in place.iterdir()) == ["latest", "step_00000001"]
    assert checkpointer.load_latest(again) == (1, {})

    # Weights that are not finite on one rank: never published, and every rank names the weight.
    if layout.rank == 1:
        engine.held_weights()[0][1].view(-1)[0] = math.nan
    checkpointer.save(engine, 5, {})
    with pytest.raises(SaveFailed, match=r"step 5 is not written.*weights/.* is not finite \(that of step 1 stays"):
        checkpointer.wait()
    layout.barrier()
    assert sorted(f.name for f in place.iterdir()) == ["latest", "step_00000001"]

    # Who reads while the run goes on, and removes what is being read, takes what is there then.
    read = checkpoint.Checkpointer._read

    def pruned(self: Checkpointer, path: Path, layout: Layout) -> Any:
        if path.name == "step_00000001":
            layout.barrier()
            if layout.rank == 0:
                os.rename(path, path.with_name("step_00000002"))
            layout.barrier()
        return read(self, path, layout)

    with patch.object(checkpoint.Checkpointer, "_read", pruned):
        assert checkpointer.load_latest(again, weights_only=True) == (1, {})  # the same one, under its new name
    assert checkpointer.steps() == [2]


def fresh(layout: Layout) -> Engine:
    return build_engine(
        problem.PALI,
        OptimizerConfig(name="adamw", gradient_clipping=0.5),
        layout,
        precision="bf16" if layout.config.zero_stage == 3 else "fp32",
        freeze=FROZEN_VIT,
    )


def test_a_save_beside_training_is_of_its_step_and_may_fail(tmp_path: Path) -> None:
    run_world(2, beside_training, tmp_path)


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    run_world(1, link, tmp_path, 0, Case())
    folder = tmp_path / "adafactor" / f"step_{STEPS_EACH:08d}"
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest) == {f.name for f in folder.iterdir()} - {"manifest.json"}
    assert all(manifest[name]["bytes"] == (folder / name).stat().st_size for name in manifest)
