"""What `weights.vit` and `weights.mt5` may name: a run and its steps beside folders and files."""

from pathlib import Path

import pytest

from common.errors import ConfigurationError
from model.weights import logical_tensors
from model.weights.files import write_tensors
from parallel.checkpoint.checkpointer import Checkpointer
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.distributed import Launch
from parallel.engine.build import build_engine
from parallel.layout import Layout
from parallel.process_groups import end_groups
from tests.unit.model.examples import MT5, PALI, VIT, small_model
from train.config import WeightsConfig
from train.weights.tower_weights import is_run, open_tower, open_towers, sources


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of steps 2 and 7, in a folder whose name has an @."""
    folder = tmp_path_factory.mktemp("runs") / "a@best run"
    checkpointer = Checkpointer(folder / "checkpoints")
    engine = build_engine(PALI, OptimizerConfig(), Layout.start(ParallelConfig(), Launch(0, 1, 0)))
    settings = {"vit": vars(VIT), "mt5": vars(MT5) | {"of_another_version": 1}, "data": {"tokenizer": "t.model"}}
    for step in (2, 7):
        checkpointer.save(engine, step, {"config": settings, "tokenizer": "abc"})
    checkpointer.wait()
    end_groups()
    return folder


def test_the_towers_of_a_run(run: Path) -> None:
    vit, mt5 = (open_tower(f"{run}{at}", tower) for tower, at in (("vit", "@2"), ("mt5", "")))
    assert (vit.kind, mt5.kind) == ("step 2 of a run", "step 7 of a run")
    assert (dict(vit.sizes), dict(mt5.sizes)) == (vars(VIT), vars(MT5))
    assert (vit.checksum, mt5.checksum, mt5.tokenizer) == (None, "abc", Path("t.model"))
    assert "patches.position" in vit.names and "head.output.weight" in mt5.names and not vit.names & mt5.names
    with pytest.raises(ConfigurationError, match=r"^weights\.vit=.* has no checkpoint of step 3; it has those of 2, 7"):
        open_tower(f"{run}@3", "vit")


def test_the_projection_comes_with_both_towers_of_one_place(run: Path, tmp_path: Path) -> None:
    write_tensors(logical_tensors(small_model()), tmp_path / "both.safetensors")
    for place in (str(run), str(tmp_path / "both.safetensors")):
        opened = open_towers(WeightsConfig(place, place))
        names = [name for each in opened for name in each.names]
        assert sorted(names) == sorted(logical_tensors(small_model())), "each tensor once"
        filled = [name for each in sources(opened) for name in each.shapes]
        assert sorted(filled) == sorted(names)
        assert "bridge.projection.weight" not in open_towers(WeightsConfig(place, None))[0].names


def test_what_is_a_run(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mt5@3").mkdir()
    for value, expected in ((str(run), True), (f"{run}@7", True), ("gone@latest", True), ("gone", False)):
        assert is_run(value) == expected
    assert not is_run(str(tmp_path / "mt5@3")) and not is_run("user@example/mt5")
