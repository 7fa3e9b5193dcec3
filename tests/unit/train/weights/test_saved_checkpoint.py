"""FOLDER, FOLDER@STEP, FOLDER@latest and FOLDER@best name a checkpoint of a run."""

import json
from pathlib import Path

import pytest

from common.errors import ConfigurationError
from train.settings.from_weights import take_from_weights
from train.weights.saved_checkpoint import find_checkpoint


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Make a run with three checkpoints; the loss of step 300 was lower still, but its checkpoint is gone."""
    folder = tmp_path / "me@home" / "run"
    for step in (100, 200, 400):
        (folder / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    losses = {100: 3.0, 200: 1.0, 300: 0.5, 400: 2.0}
    lines = [json.dumps({"step": step, "validation/loss": loss}) for step, loss in losses.items()]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 401}', '{"st']), encoding="utf-8")
    return folder


@pytest.mark.parametrize("suffix, step", [("", 400), ("@latest", 400), ("@100", 100), ("@best", 200)])
def test_a_checkpoint_by_name(run: Path, suffix: str, step: int) -> None:
    found = find_checkpoint(f"{run}{suffix}")
    assert found == (run, step, run / "checkpoints" / f"step_{step:08d}")


@pytest.mark.parametrize(
    "name, message",
    [
        ("@300", "has no checkpoint of step 300; it has those of 100, 200, 400"),
        ("/nothing", "is no folder of a run"),
        ("@newest", "is no folder of a run"),
        ("/checkpoints", "holds no checkpoint yet"),
    ],
)
def test_a_missing_checkpoint_is_a_sentence(run: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        find_checkpoint(f"{run}{name}", "run.initial")


def test_best_needs_a_validated_checkpoint(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    with pytest.raises(ConfigurationError, match="no checkpoint of a step that was validated"):
        find_checkpoint(f"{run}@best")


def test_an_export_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=rf"^checkpoint={tmp_path} is an export .*weights\.vit={tmp_path}"):
        find_checkpoint(str(tmp_path))
    plain = {"vit": {"width": None}, "run": {"initial": str(tmp_path)}}
    with pytest.raises(ConfigurationError, match=rf"^run\.initial={tmp_path} is an export or another folder"):
        take_from_weights(plain, {})
