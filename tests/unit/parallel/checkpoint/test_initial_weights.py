"""First weights from files: those of the file are taken, those of another model are one sentence."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import ConfigurationError
from model.megatron import parallel_state
from parallel.checkpoint.initial_weights import check_files, load_files
from parallel.config import OptimizerConfig, ParallelConfig
from parallel.distributed import Launch
from parallel.engine.base import Engine
from parallel.engine.build import build_engine
from parallel.layout import Layout
from tests.unit.model.examples import PALI, VIT

NORM, POSITION = "bridge.vit_norm.weight", "patches.position"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    layout = Layout.start(ParallelConfig(), Launch(0, 1, 0))
    yield build_engine(PALI, OptimizerConfig(), layout)
    parallel_state.destroy_model_parallel()


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {rectangle.name: values.clone().view(rectangle.shape) for rectangle, values in engine.held_weights()}


def test_weights_of_files_are_taken_and_others_stay(engine: Engine, tmp_path: Path) -> None:
    before = weights(engine)
    position = torch.randn(4, VIT.width)  # of 2 x 2 patches; here they are 4 x 4
    save_file({NORM: torch.full((VIT.width,), 3.0)}, tmp_path / "norm.safetensors")
    save_file({POSITION: position}, tmp_path / "position.safetensors")
    load_files(engine, [tmp_path / "norm.safetensors", tmp_path / "position.safetensors"])
    after = weights(engine)
    assert (after[NORM] == 3).all() and not torch.equal(after[POSITION], before[POSITION])
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - {NORM, POSITION})


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [(torch.int64, "I64"), (torch.int8, "I8"), (torch.bool, "BOOL"), (torch.float8_e4m3fn, "F8_E4M3")],
)
def test_what_is_quantized_is_no_weight(engine: Engine, tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({NORM: torch.ones(VIT.width).to(dtype)}, path)
    with pytest.raises(ConfigurationError, match=f"{NORM} is {kind} in .*; write it as one of F64, F32, F16, BF16"):
        check_files(engine.blueprint.plan, [path])


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"vit_blok_0.norm": (3,)}, "holds vit_blok_0.norm, which is no parameter of this model"),
        ({NORM: (7,)}, r"bridge.vit_norm.weight is \(7,\) in .* and \(24,\) here; give the vit and mt5"),
        *(({POSITION: shape}, f"{POSITION} is .* and .* here; give") for shape in ((5, 24), (4, 23), (4,), (0, 24))),
        (None, "which is no safetensors file"),
        ("missing", "which is no file; make it or leave it out"),
    ],
)
def test_files_that_do_not_fit(
    engine: Engine, tmp_path: Path, tensors: dict[str, tuple[int, ...]] | str | None, sentence: str
) -> None:
    path = tmp_path / "weights.safetensors"
    if isinstance(tensors, dict):
        save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    elif tensors is None:
        path.write_bytes(b"cut short")
    with pytest.raises(ConfigurationError, match=sentence) as error:
        load_files(engine, [path])
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigurationError, match=sentence):
        check_files(engine.blueprint.plan, [path])
