"""First weights fill what they name and nothing else, from files and from the checkpoint of another run."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import ConfigurationError
from model.layers import Part
from model.weights.stored import StoredTensor, open_tensors
from parallel.checkpoint.checkpointer import Checkpointer
from parallel.checkpoint.initial_weights import CheckpointWeights, FileWeights, load_first_weights, thaw
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.distributed import Launch
from parallel.engine.base import Engine
from parallel.engine.build import build_engine
from parallel.layout import Layout
from parallel.process_groups import end_groups
from tests.unit.model.examples import PALI, VIT

NORM, POSITION = "bridge.vit_norm.weight", "patches.position"


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    yield Layout.start(ParallelConfig(), Launch(0, 1, 0))
    end_groups()


@pytest.fixture(scope="module")
def engine(layout: Layout) -> Engine:
    return build_engine(PALI, OptimizerConfig(), layout)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {rectangle.name: values.clone().view(rectangle.shape) for rectangle, values in engine.held_weights()}


def test_weights_of_files_are_taken_and_others_stay(engine: Engine, tmp_path: Path) -> None:
    before = weights(engine)
    position = torch.randn(4, VIT.width)  # of 2 x 2 patches; here they are 4 x 4
    save_file({NORM: torch.full((VIT.width,), 3.0, dtype=torch.float16)}, tmp_path / "norm.safetensors")
    save_file({POSITION: position}, tmp_path / "position.safetensors")
    load_first_weights(engine, [FileWeights(open_tensors(tmp_path))])
    after = weights(engine)
    assert (after[NORM] == 3).all() and not torch.equal(after[POSITION], before[POSITION])
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - {NORM, POSITION})
    scaled = StoredTensor(torch.Size((VIT.width,)), torch.float32, lambda: torch.ones(VIT.width), 0.25)
    load_first_weights(engine, [FileWeights({NORM: scaled})])
    assert (weights(engine)[NORM] == 0.25).all()


def test_what_a_file_gives_is_not_drawn(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []

    def drawing(part: Part, _: int) -> torch.Tensor:
        drawn.append(part.name)
        return torch.zeros(part.block)

    monkeypatch.setattr("model.pali.initial_block", drawing)
    made = build_engine(PALI, OptimizerConfig(), layout, given={NORM, POSITION})
    assert len(drawn) == len(set(drawn)) == len(weights(made)) - 2 and not {NORM, POSITION} & set(drawn)


def test_a_frozen_tower_thaws_in_fp32(layout: Layout, tmp_path: Path) -> None:
    """A checkpoint holds it in bf16; its file has fp32, and of one tensor other values by now."""
    first = {
        name: torch.randn(shape.shape) for name, shape in weights(build_engine(PALI, OptimizerConfig(), layout)).items()
    }
    first = {name: values for name, values in first.items() if name.startswith(("patches", "vit_block", "bridge.vit"))}
    save_file(first, tmp_path / "vit.safetensors")
    source = FileWeights(open_tensors(tmp_path / "vit.safetensors"))
    frozen = build_engine(PALI, OptimizerConfig(), layout, precision="bf16", freeze=["patches.*", "vit_block_*"])
    load_first_weights(frozen, [source])
    checkpointer = Checkpointer(tmp_path / "checkpoints")
    checkpointer.save(frozen, 4, {})
    checkpointer.wait()
    trained = build_engine(PALI, OptimizerConfig(), layout, precision="bf16", seed=5)
    assert checkpointer.load_latest(trained) == (4, {})
    rounded, names = weights(trained), checkpointer.frozen(4)
    assert torch.equal(rounded[POSITION], first[POSITION].bfloat16().float())
    other = "vit_block_0.mlp_in.hidden.weight"
    changed = {**source.tensors, other: StoredTensor(first[other].shape, torch.float32, lambda: first[other] + 1)}
    with pytest.warns(match=rf"{other} was frozen in there, and goes on from its values in bf16; set weights"):
        thaw(trained, [FileWeights(changed)], names, "there")
    after, computed = weights(trained), dict(trained.model.named_parameters())
    for name, values in after.items():
        is_thawed = name in names and name != other
        assert torch.equal(values, first[name] if is_thawed else rounded[name]), name
    assert torch.equal(computed[POSITION], first[POSITION].bfloat16())
    assert not torch.equal(after[POSITION], rounded[POSITION]) and NORM not in names


def test_weights_of_a_checkpoint(engine: Engine, layout: Layout, tmp_path: Path) -> None:
    other = build_engine(PALI, OptimizerConfig(), layout, seed=5)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(other, 4, {})
    checkpointer.wait()
    stored, before = CheckpointWeights(tmp_path / "step_00000004"), weights(engine)
    assert stored.shapes.keys() == before.keys()
    stored.shapes = {name: shape for name, shape in stored.shapes.items() if name.startswith("encoder")}
    load_first_weights(engine, [stored])
    after, wanted = weights(engine), weights(other)
    for name in before:
        assert torch.equal(after[name], (wanted if name.startswith("encoder") else before)[name]), name
    damaged = next((tmp_path / "step_00000004").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(ConfigurationError, match=r"step_00000004 is damaged \(.*distcp\); bring it back"):
        load_first_weights(engine, [stored])
    with pytest.raises(ConfigurationError, match="is no whole checkpoint"):
        CheckpointWeights(tmp_path / "none")
