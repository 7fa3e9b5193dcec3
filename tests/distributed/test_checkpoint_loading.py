"""Loading in a world of two ranks: damage, other resolutions, frozen parts and models; steps that are skipped.

One world runs all checks, one after another, and leaves the name of each that has passed.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.world import run_world
from common.errors import ConfigurationError
from model.config import ModelConfig
from model.vit import resample_position
from parallel.checkpoint.checkpointer import Checkpointer
from parallel.config import OptimizerConfig
from parallel.engine.base import Engine
from parallel.engine.build import build_engine
from tests.distributed import problem
from tests.distributed.problem import FROZEN_VIT, Case, train, weights

CASE = Case(zero_stage=3)


class World:
    """This rank's view of the world: its layout, the folder of all checks, two runs with checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.layout = folder, CASE.layout()
        self.run, self.sparse = Checkpointer(folder / "run", keep_last=3), Checkpointer(folder / "sparse", 1, 2)
        self.phases = Checkpointer(folder / "phases")

    def train_and_save(self) -> None:
        """Save steps 1, 2, 3 of a run and 1 to 6 of a sparse one; then step 2 of one with a frozen ViT."""
        engine = self.engine()
        for step in (1, 2, 3):
            train(engine, range(step - 1, step))
            self.run.save(engine, step, {"step": step})
            self.run.wait()
            self.sparse.save(engine, 2 * step - 1, {})
            self.sparse.save(engine, 2 * step, {})
        self.sparse.wait()
        self.frozen = replace(CASE, freeze=FROZEN_VIT).engine(self.layout)
        train(self.frozen, range(2))
        self.phases.save(self.frozen, 2, {})
        self.phases.wait()

    def engine(self) -> Engine:
        return CASE.engine(self.layout)

    def on_main(self, work: Callable[[], object]) -> None:
        """Do something to the files on rank 0 while the other rank waits."""
        if self.layout.rank == 0:
            work()
        self.layout.barrier()


def some_are_kept(world: World) -> None:
    assert world.sparse.steps() == [2, 4, 6]


def partial_folders_are_ignored(world: World) -> None:
    world.on_main((world.folder / "run" / "step_00000009.partial").mkdir)
    assert world.run.steps() == [1, 2, 3] and world.run.latest_step() == 3


def the_one_before_a_damaged_one_is_loaded(world: World) -> None:
    """On all ranks, though one rank alone reads the damaged file; what is damaged is put aside."""
    for step, damage in ((3, _truncate), (2, _flip_a_bit)):
        file = world.folder / "run" / f"step_{step:08d}" / "__1_0.distcp"
        world.on_main(lambda file=file, damage=damage: damage(file))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = world.run.load_latest(world.engine())
        assert loaded == (step - 1, {"step": step - 1})
        mine = sum("is damaged (__1_0.distcp)" in str(w.message) for w in caught)
        assert bool(world.layout.all_reduce_data(torch.tensor(mine)))
    assert world.run.steps() == [1] and (world.folder / "run" / "step_00000003.damaged").is_dir()


def a_run_with_damaged_ones_alone_is_refused(world: World) -> None:
    manifest = world.folder / "run" / "step_00000001" / "manifest.json"
    world.on_main(lambda: manifest.write_text("{}", encoding="utf-8"))
    with pytest.raises(ConfigurationError, match=r"All checkpoints in .* are damaged"):
        world.run.load_latest(world.engine())


def another_resolution_is_resampled(world: World) -> None:
    """The rest is as saved, and what was frozen starts moments of its own."""
    state = json.loads((world.folder / "phases" / "step_00000002" / "state.json").read_text(encoding="utf-8"))
    names = set(state["frozen"])
    assert {"patches.position", "bridge.vit_norm.weight"} <= names and "head.output.weight" not in names
    pali = replace(problem.PALI, model=ModelConfig(image_size=56))
    larger = build_engine(pali, OptimizerConfig(), world.layout, seed=5)
    assert world.phases.load_latest(larger) == (2, {})
    before, now = weights(world.frozen), weights(larger)
    for name, values in now.items():
        expected = resample_position(before[name], 16) if name == "patches.position" else before[name]
        assert torch.equal(values, expected), name
    assert larger.optimizer.ages["vit_block_0.mlp_in.hidden.weight"] == 0
    assert larger.optimizer.ages["head.output.weight"] == 2


def weights_alone_start_another_run(world: World) -> None:
    other = world.engine()
    assert Checkpointer(world.folder / "phases").load_latest(other, weights_only=True) == (2, {})
    assert torch.equal(weights(other)["head.output.weight"], weights(world.frozen)["head.output.weight"])
    assert set(other.optimizer.ages.values()) == {0}


def another_model_is_refused_in_one_sentence(world: World) -> None:
    for other_mt5, sentence in (
        (replace(problem.MT5, d_ff=256), r"another model.*256 x 128 here"),
        (replace(problem.MT5, num_decoder_layers=1), r"another model: decoder_block_1.* is missing here"),
    ):
        other = build_engine(replace(problem.PALI, mt5=other_mt5), OptimizerConfig(), world.layout)
        with pytest.raises(ConfigurationError, match=sentence):
            world.phases.load_latest(other)


def skipped_steps_change_nothing(world: World) -> None:
    for zero_stage in (0, 1, 2, 3):
        for precision in ("fp32", "bf16"):
            skipped(Case(zero_stage=zero_stage, precision=precision))
    for case in (Case(tensor=2), Case(tensor=2, sequence=True, zero_stage=1), Case(pipeline=2, zero_stage=3)):
        skipped(case)


CHECKS = (
    some_are_kept,
    partial_folders_are_ignored,
    the_one_before_a_damaged_one_is_loaded,
    a_run_with_damaged_ones_alone_is_refused,
    another_resolution_is_resampled,
    weights_alone_start_another_run,
    another_model_is_refused_in_one_sentence,
    skipped_steps_change_nothing,
)


def run_all(folder: Path) -> None:
    world = World(folder)
    world.train_and_save()
    for check in CHECKS:
        check(world)
        world.on_main((folder / check.__name__).touch)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder with a file for each check that has passed, and how the world failed, if it has."""
    folder = tmp_path_factory.mktemp("loading")
    try:
        run_world(2, run_all, folder)
    except Exception as error:
        return folder, str(error)
    return folder, ""


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_loading(ended: tuple[Path, str], check: str) -> None:
    folder, failure = ended
    assert (folder / check).exists(), failure


def skipped(case: Case) -> None:
    """Gradients that are not finite, and discarded steps, change nothing, on any rank."""
    layout = case.layout()
    guarded = case.engine(layout)
    unchanged = weights(guarded)
    (batch, *_) = problem.micro_batches(0)
    parameter = next(p for name, p in guarded.model.named_parameters() if "attention_in" in name)  # every rank's own
    hook = parameter.register_hook(lambda gradient: gradient * float("nan") if layout.rank == 1 else gradient)
    guarded.forward_backward([batch], batch.num_targets)
    assert not 0 <= guarded.update(1.0) < float("inf")
    hook.remove()
    guarded.forward_backward([batch], batch.num_targets)
    guarded.discard()
    assert all(torch.equal(values, unchanged[name]) for name, values in weights(guarded).items())
    assert set(guarded.optimizer.ages.values()) == {0}
    fresh = case.engine(layout)
    assert train(guarded, range(2)) == train(fresh, range(2)), "the discarded gradients left a trace"


def _truncate(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def _flip_a_bit(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(file.stat().st_size // 2)
        (byte,) = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 1]))
