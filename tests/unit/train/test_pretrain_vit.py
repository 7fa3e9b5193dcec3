"""Each tower is pretrained alone in a run like any other, and a run of both takes it from there."""

import json
import sys
from pathlib import Path

import pytest
import torch

from data.corpus_text import corpus_texts
from data.labels import main as collect_labels
from data.miniature.config import MiniatureConfig
from data.miniature.corpus import make_corpus
from data.tokenizer import train_tokenizer
from model.vit import resample_position
from model.weights.source import is_of_tower
from parallel.checkpoint.stored_weights import StoredWeights
from train import pretrain, pretrain_vit
from train.entry import entry

SMALL = (
    "vit=nano", "mt5=nano", "phases.mini.image_size=56", "run.precision=fp32", "tracker=none", "data.num_streams=2",
    "data.global_batch_size=4", "evaluation.steps=1", "evaluation.samples=2", "evaluation.max_new_tokens=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(MiniatureConfig(folder=str(folder), scale=0.002, languages=["en"], workers=1))
    train_tokenizer(corpus_texts(folder, "train"), folder / "tokenizer.model", 1024)
    collect_labels([f"root={folder}"])
    return folder


@pytest.fixture
def folder(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PALI_CORPUS", str(corpus))
    return tmp_path


def train(folder: str, *words: str, command: str = "pretrain") -> list[dict[str, float]]:
    """Run a command in a folder; return its metrics."""
    sys.argv = ["program", *SMALL, f"run.folder={folder}", *words]
    if command == "pretrain_vit":
        sys.argv.remove("mt5=nano")
    entry(command, {"pretrain": pretrain, "pretrain_vit": pretrain_vit}[command].main)
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_an_mt5_of_text_alone_gives_a_run_of_both_its_weights(folder: Path) -> None:
    lines = train("mt5", "mixture=text", "data.images_per_row=0", "run.steps=2", "evaluation.every_steps=2")
    assert lines[1]["loss/span_corruption"] == lines[1]["loss"] and lines[1]["validation/loss"] > 0
    check_taken("mt5", "mt5@2")


def test_a_vit_gives_a_run_of_both_its_weights_and_is_tuned_at_a_higher_resolution(folder: Path) -> None:
    lines = train("vit", "run.steps=2", "evaluation.every_steps=2", command="pretrain_vit")
    assert lines[1]["loss/labels"] == lines[1]["loss"] and lines[1]["validation/loss"] > 0
    assert 0 <= lines[1]["validation/accuracy/labels"] <= 1 and lines[1]["examples/labels"] == 4
    check_taken("vit", "vit")
    settings = ("run.initial=vit@2", "run.steps=1", "phases.mini.image_size=84", "evaluation.every_steps=0")
    train("high", *settings, "schedule.peak=1e-30", command="pretrain_vit")
    low, high = StoredWeights(Path("vit"), 2).tensors, StoredWeights(Path("high"), 1).tensors
    position = resample_position(low["patches.position"].read(), 36)
    torch.testing.assert_close(high["patches.position"].read(), position)
    for name in low.keys() - {"patches.position"}:
        torch.testing.assert_close(high[name].read(), low[name].read(), rtol=0, atol=1e-25)


def check_taken(tower: str, run: str) -> None:
    """Assert that a run of both towers begins with all weights of a tower's run."""
    both = ("mixture=captions", "mixture.captioning.source=cc3m_35l", "run.steps=1", "evaluation.every_steps=0")
    train("both", f"weights.{tower}={run}", "schedule.peak=1e-30", *both)
    alone, taken = StoredWeights(Path(tower), 2).tensors, StoredWeights(Path("both"), 1).tensors
    names = {name for name in alone if is_of_tower(name, tower)}
    assert names == {name for name in taken if is_of_tower(name, tower)}
    assert all(name.startswith("classifier.") for name in alone if name not in names)
    for name in names:  # an update of a bias that is 0 remains, however small
        torch.testing.assert_close(taken[name].read(), alone[name].read(), rtol=0, atol=1e-25)
