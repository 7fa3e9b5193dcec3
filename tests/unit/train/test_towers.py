"""Each tower is pretrained alone in a run like any other, and a run of both takes it from there."""

import json
import sys
from pathlib import Path

import pytest

from data.corpus_text import corpus_texts
from data.miniature.config import MiniatureConfig
from data.miniature.corpus import make_corpus
from data.tokenizer import train_tokenizer
from model.weights.source import is_of_tower
from parallel.checkpoint.stored_weights import StoredWeights
from train import pretrain
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
    return folder


@pytest.fixture
def folder(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PALI_CORPUS", str(corpus))
    return tmp_path


def train(folder: str, *words: str) -> list[dict[str, float]]:
    """Run train.pretrain in a folder; return its metrics."""
    sys.argv = ["program", *SMALL, f"run.folder={folder}", *words]
    entry("pretrain", pretrain.main)
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_an_mt5_of_text_alone_gives_a_run_of_both_its_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    lines = train("mt5", "mixture=text", "data.images_per_row=0", "run.steps=2", "evaluation.every_steps=2")
    assert lines[1]["loss/span_corruption"] == lines[1]["loss"] and lines[1]["validation/loss"] > 0
    text = StoredWeights(Path("mt5"), 2).tensors
    assert text and all(is_of_tower(name, "mt5") for name in text)
    settings = ("weights.mt5=mt5@2", "run.steps=1", "evaluation.every_steps=0", "schedule.peak=1e-30")
    train("both", *settings)
    both = StoredWeights(Path("both"), 1).tensors
    assert {name for name in both if is_of_tower(name, "mt5")} == text.keys()
    assert all(both[name].read().equal(tensor.read()) for name, tensor in text.items())
