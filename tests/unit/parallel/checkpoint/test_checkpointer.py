"""A checkpoint in one process: what comes back, what is refused, and what becomes of a damaged one."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter

from common import progress
from common.errors import ConfigurationError, Notice, StorageFailed
from model.config import ModelConfig, MT5Config, PaLIConfig, ViTConfig
from model.vit import resample_position
from parallel.checkpoint import checkpointer as checkpoint
from parallel.checkpoint import global_plan
from parallel.checkpoint.checkpointer import Checkpointer
from parallel.checkpoint.manifest import broken_file
from parallel.checkpoint.stored_weights import StoredWeights
from parallel.checkpoint.together import SaveFailed, SaveStalled
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.distributed import Launch
from parallel.engine.base import Engine
from parallel.engine.build import build_engine
from parallel.layout import Layout
from parallel.process_groups import end_groups
from tests.unit.model.examples import MODEL, MT5, VIT, example, micro_batch


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    yield Layout.start(ParallelConfig(), Launch(0, 1, 0))
    end_groups()


def build(layout: Layout, seed: int, vit: ViTConfig = VIT, mt5: MT5Config = MT5, model: ModelConfig = MODEL) -> Engine:
    optimizer = OptimizerConfig("adamw")
    return build_engine(PaLIConfig(vit, mt5, model, 3), optimizer, layout, freeze=["patches.*"], seed=seed)


def step(engine: Engine) -> float:
    engine.forward_backward([micro_batch([[example(1)], [example(2)]])], num_targets=10)
    return engine.update(1e-2)


def state(engine: Engine) -> dict[str, Tensor]:
    own = {f"weights/{r.name}": values.clone() for r, values in engine.held_weights()}
    return own | {name: values.clone() for name, _, values in engine.optimizer.state_pieces()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(values, other[name]) for name, values in one.items())


@dataclass
class Saved:
    """A folder with the checkpoints of two steps, and what the engine was after the second, and after a third."""

    folder: Path
    state: dict[str, Tensor]
    ages: dict[str, int]
    third: tuple[float, dict[str, Tensor]]


@pytest.fixture(scope="module")
def written(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    engine, saver = build(layout, 1), Checkpointer(tmp_path_factory.mktemp("run") / "checkpoints")
    for number in (1, 2):
        step(engine)
        saver.save(engine, number, {"seen": 10 * number})
    saver.wait()
    return Saved(saver.folder, state(engine), dict(engine.optimizer.ages), (step(engine), state(engine)))


@pytest.fixture
def saved(written: Saved, tmp_path: Path) -> Saved:
    """A copy for one test alone."""
    shutil.copytree(written.folder, tmp_path / "checkpoints")
    return replace(written, folder=tmp_path / "checkpoints")


def test_all_comes_back_and_goes_on_as_it_would_have(saved: Saved, layout: Layout) -> None:
    other = build(layout, 2)
    step(other)
    assert Checkpointer(saved.folder).load_latest(other) == (2, {"seen": 20})
    assert same(state(other), saved.state) and other.optimizer.ages == saved.ages
    assert step(other) == saved.third[0] and same(state(other), saved.third[1])
    assert (saved.folder / "latest").read_text(encoding="utf-8").strip() == "step_00000002"
    assert sorted(path.name for path in saved.folder.iterdir()) == ["latest", "step_00000001", "step_00000002"]


def test_weights_alone_leave_the_optimizer(saved: Saved, layout: Layout) -> None:
    other = build(layout, 2)
    before = state(other)
    Checkpointer(saved.folder).load_latest(other, weights_only=True)
    for name, values in state(other).items():
        assert torch.equal(values, saved.state[name] if name.startswith("weights/") else before[name]), name
    assert set(other.optimizer.ages.values()) == {0}


def test_an_empty_folder_has_none(layout: Layout, tmp_path: Path) -> None:
    assert Checkpointer(tmp_path / "nowhere").load_latest(build(layout, 2)) is None


def cut_short(path: Path) -> None:
    data = next(path.glob("__0_*"))
    data.write_bytes(data.read_bytes()[:-1])


def altered(path: Path) -> None:
    data = next(path.glob("__0_*"))
    data.write_bytes(data.read_bytes()[:-1] + b"\xff")


def without(*names: str) -> Callable[[Path], None]:
    """The manifest lacks these files."""

    def damage(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        kept = {name: sums for name, sums in manifest.items() if name not in names}
        (path / "manifest.json").write_text(json.dumps(kept), encoding="utf-8")

    return damage


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (cut_short, "__0_0.distcp"),
    "altered": (altered, "__0_0.distcp"),
    "a file is missing": (lambda path: (path / "state.json").unlink(), "state.json"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json"),
    "no JSON": (lambda path: (path / "manifest.json").write_bytes(b"{"), "manifest.json"),
    "a list": (lambda path: (path / "manifest.json").write_bytes(b"[]"), "manifest.json"),
    "without a state": (without("state.json"), "manifest.json"),
    "without metadata": (without(".metadata"), "manifest.json"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_one_is_put_aside_for_the_one_before(saved: Saved, layout: Layout, kind: str) -> None:
    (damage, file), saver = DAMAGES[kind], Checkpointer(saved.folder)
    damage(saved.folder / "step_00000002")
    with pytest.warns(Notice, match=rf"step_00000002 is damaged \({file}\); loading the one before it"):
        assert saver.load_latest(build(layout, 2)) == (1, {"seen": 10})
    assert (saved.folder / "latest").read_text(encoding="utf-8").strip() == "step_00000001"
    assert (saved.folder / "step_00000002.damaged").is_dir()
    damage(saved.folder / "step_00000001")
    with (
        pytest.warns(Notice, match=rf"step_00000001 is damaged \({file}\)$"),
        pytest.raises(ConfigurationError, match=r"are damaged \(steps 1\); bring one back"),
    ):
        saver.load_latest(build(layout, 2))


@pytest.mark.parametrize(
    ("mt5", "sentence"),
    [
        (replace(MT5, d_ff=60), r"encoder_block_0\.mlp_in\.gate\.weight is 56 x 32 there and 60 x 32 here"),
        (replace(MT5, num_encoder_layers=2), r"encoder_block_2\.\S+ is missing here; give the same vit and mt5"),
        (
            replace(MT5, num_encoder_layers=4),
            r"encoder_block_3\.attention_norm\.weight is missing there and 32 here",
        ),
    ],
)
def test_that_of_another_model_is_one_sentence(saved: Saved, layout: Layout, mt5: MT5Config, sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence) as error:
        Checkpointer(saved.folder).load_latest(build(layout, 2, mt5=mt5))
    assert "\n" not in str(error.value)


def test_positions_of_another_resolution_are_resampled(saved: Saved, layout: Layout) -> None:
    larger = build(layout, 2, model=replace(MODEL, image_size=20))
    assert Checkpointer(saved.folder).load_latest(larger) == (2, {"seen": 20})  # frozen: no state, and no warning
    found, position = state(larger), saved.state["weights/patches.position"].view(16, VIT.width)
    assert torch.equal(found.pop("weights/patches.position").view(25, -1), resample_position(position, 25))
    assert all(torch.equal(values, saved.state[name]) for name, values in found.items())


def test_updates_are_counted_from_0_where_the_state_is_not_loaded(layout: Layout, tmp_path: Path) -> None:
    """The moments of trained positions have the shape of another resolution."""

    def trained(image_size: int) -> Engine:
        config = PaLIConfig(VIT, MT5, replace(MODEL, image_size=image_size), 3)
        return build_engine(config, OptimizerConfig("adamw"), layout, seed=1)

    engine, saver = trained(16), Checkpointer(tmp_path / "checkpoints")
    step(engine)
    saver.save(engine, 1, {})
    saver.wait()
    larger = trained(20)
    with pytest.warns(Notice, match=r"no optimizer state for patches.position, .* its updates are counted from 0$"):
        saver.load_latest(larger)
    assert larger.optimizer.ages == dict.fromkeys(engine.optimizer.ages, 1) | {"patches.position": 0}
    moments = {name: values for name, _, values in larger.optimizer.state_pieces() if "patches.position/" in name}
    assert len(moments) == 2 and not any(values.any() for values in moments.values())


def test_weights_that_are_not_finite_are_not_saved(saved: Saved, layout: Layout) -> None:
    engine, saver = build(layout, 2), Checkpointer(saved.folder)
    engine.shards()[0].weights[0] = torch.nan
    saver.save(engine, 3, {})
    with pytest.raises(SaveFailed, match=r"step 3 is not written .* is not finite \(that of step 2 stays the newest\)"):
        saver.wait()
    assert saver.latest_step() == 2


def test_a_checkpoint_is_trusted_unless_its_step_is_not(saved: Saved, layout: Layout) -> None:
    engine, saver = build(layout, 2), Checkpointer(saved.folder, keep_last=1)
    saver.save(engine, 3, {}, trusted=False)
    saver.wait()
    assert saver.steps() == [1, 2, 3]
    saver.save(engine, 4, {})
    saver.wait()
    assert saver.steps() == [4]


@pytest.mark.parametrize("file", ["manifest.json", "__0_0.distcp"])
def test_one_that_the_disk_fails_to_read_is_not_damaged(
    saved: Saved, layout: Layout, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Path.open

    def fails(path: Path, *arguments: Any, **named: Any) -> Any:
        if path.name == file:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return opened(path, *arguments, **named)

    monkeypatch.setattr(Path, "open", fails)
    with pytest.raises(StorageFailed, match=r"step_00000002 could not be read \(Input/output error\)") as failed:
        Checkpointer(saved.folder).load_latest(build(layout, 2))
    assert not failed.value.alone, "every rank raises it, and the first one prints it"
    assert Checkpointer(saved.folder).steps() == [1, 2]


@pytest.mark.parametrize(("code", "may_pass"), [(errno.EIO, True), (errno.ENOSPC, False)])
def test_a_save_that_the_disk_fails_may_pass_and_a_full_disk_not(
    saved: Saved, layout: Layout, code: int, may_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(code, "it fails")

    monkeypatch.setattr(FileSystemWriter, "write_data", fails)
    if may_pass:
        monkeypatch.setattr("shutil.disk_usage", fails)
    saver = Checkpointer(saved.folder)
    saver.save(build(layout, 2), 3, {})
    with pytest.raises(SaveFailed, match=r"step 3 could not be written to .* \(rank 0: .*it fails") as failed:
        saver.wait()
    assert isinstance(failed.value, SaveStalled) == may_pass and saver.steps() == [1, 2]


def inodes(checkpoint: Path) -> set[int]:
    return {file.stat().st_ino for file in (checkpoint / "frozen").iterdir()}


def test_frozen_weights_are_written_once_and_each_checkpoint_is_whole(
    written: Saved, layout: Layout, tmp_path: Path
) -> None:
    first, second = written.folder / "step_00000001", written.folder / "step_00000002"
    assert inodes(first) == inodes(second) and len(inodes(first)) == 2
    manifest = json.loads((second / "manifest.json").read_text(encoding="utf-8"))
    assert {name for name in manifest if "/" in name} == {"frozen/.metadata", "frozen/__0_0.distcp"}
    copied = Checkpointer.from_run(tmp_path)
    shutil.copytree(second, copied.path(2))
    other = build(layout, 2)
    assert copied.load_latest(other) == (2, {"seen": 20}) and same(state(other), written.state)
    read = {f"weights/{name}": tensor.read() for name, tensor in StoredWeights(tmp_path, 2).tensors.items()}
    assert "weights/patches.position" in read and same({k: v for k, v in state(other).items() if k in read}, read)
    shutil.rmtree(copied.path(2) / "frozen")
    with (
        pytest.warns(Notice, match=r"step_00000002 is damaged \(frozen/"),
        pytest.raises(ConfigurationError, match=r"All checkpoints in .* are damaged \(steps 2\); bring one back"),
    ):
        copied.load_latest(other)


def test_a_run_that_continues_links_to_the_weights_that_it_has_loaded(saved: Saved, layout: Layout) -> None:
    other, saver = build(layout, 2), Checkpointer(saved.folder)
    saver.load_latest(other)
    shutil.copytree(saver.path(2), saver.path(3).with_suffix(".partial"), copy_function=os.link)  # of a killed save
    saver.save(other, 3, {})
    saver.wait()
    assert saver.steps() == [2, 3] and inodes(saver.path(3)) == inodes(saver.path(2))
    assert broken_file(saver.path(2)) is broken_file(saver.path(3)) is None
    saver.remove(2)
    again = build(layout, 3)
    assert Checkpointer(saved.folder).load_latest(again) == (3, {}) and same(state(again), saved.state)


def test_other_frozen_weights_are_written_anew(saved: Saved, layout: Layout) -> None:
    loaded, fresh, saver = build(layout, 2), build(layout, 2), Checkpointer(saved.folder)
    saver.load_latest(loaded)
    saver.save(fresh, 3, {})
    saver.wait()
    assert not inodes(saver.path(3)) & inodes(saver.path(2))
    saver.load_latest(loaded)
    assert same(state(loaded), state(fresh))


@pytest.mark.parametrize("damage", [None, "frozen/__0_0.distcp"])
def test_without_links_or_whole_files_frozen_weights_are_written_again(
    saved: Saved, layout: Layout, damage: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    other, saver = build(layout, 2), Checkpointer(saved.folder)
    saver.load_latest(other)
    if damage is None:
        monkeypatch.setattr(os, "link", refuses)
    else:
        (saver.path(2) / damage).write_bytes(b"cut short")
    with pytest.warns(Notice, match="has no hard links") if damage is None else nullcontext():
        saver.save(other, 3, {})
        saver.wait()
    assert not inodes(saver.path(3)) & inodes(saver.path(2))
    again = build(layout, 3)
    assert Checkpointer(saved.folder).load_latest(again) == (3, {}) and same(state(again), saved.state)


def test_a_plan_is_made_once_and_in_a_process_of_its_own_where_it_is_large(
    saved: Saved, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[str] = []
    run = global_plan._run

    def counting(job: Any, arguments: list[Any], size: int) -> Any:
        jobs.append(job.__name__)
        return run(job, arguments, size)

    monkeypatch.setattr(global_plan, "AWAY_BYTES", 0)
    monkeypatch.setattr(global_plan, "_run", counting)
    other, saver = build(layout, 2), Checkpointer(saved.folder, keep_last=4)
    saver.load_latest(other)
    for number in (3, 4):
        step(other)
        saver.save(other, number, {})
    saver.wait()
    assert jobs == ["_join_plans", "_describe"] and saver.steps() == [1, 2, 3, 4]
    again = build(layout, 3)
    assert Checkpointer(saved.folder).load_latest(again) == (4, {}) and same(state(again), state(other))


def test_waiting_for_a_save_reports_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[str] = []
    written = threading.Event()  # until three reports have arrived

    def listen(place: str) -> None:
        places.append(place)
        if len(places) == 3:
            written.set()

    monkeypatch.setattr(progress, "listeners", [listen])
    monkeypatch.setattr(checkpoint, "BEAT_EVERY_S", 0.01)
    saver = checkpoint.Checkpointer(tmp_path)
    saver.writing = saver.thread.submit(written.wait, 60)
    saver.wait()
    assert written.is_set() and set(places) == {f"waiting for a checkpoint in {tmp_path}"}
