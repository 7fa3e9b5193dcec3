"""Each tower is pretrained alone in a run like any other, and a run of both takes it from there."""

import json
import sys
from pathlib import Path

import pytest
import torch

from common.errors import ConfigurationError
from data.corpus_text import corpus_texts
from data.labels import main as collect_labels
from data.miniature.config import MiniatureConfig
from data.miniature.corpus import make_corpus
from data.tokenizer import train_tokenizer
from model.vit import resample_position
from model.weights.source import is_of_tower
from parallel.checkpoint.stored_weights import StoredWeights
from train import evaluate, pretrain, pretrain_vit
from train.average import average
from train.entry import entry
from train.export import export
from train.weights.tower_weights import open_tower

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


def test_a_vit_gives_a_run_of_both_its_weights_and_is_tuned_at_a_higher_resolution(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = train("vit", "run.steps=2", "evaluation.every_steps=2", command="pretrain_vit")
    assert lines[1]["loss/labels"] == lines[1]["loss"] and lines[1]["validation/loss"] > 0
    assert 0 <= lines[1]["validation/accuracy/labels"] <= 1 and lines[1]["examples/labels"] == 4
    check_predicts_no_text("vit", capsys)
    check_taken("vit", "vit")
    settings = ("run.initial=vit@2", "run.steps=1", "phases.mini.image_size=84", "evaluation.every_steps=0")
    train("high", *settings, "schedule.peak=1e-30", command="pretrain_vit")
    low, high = StoredWeights(Path("vit"), 2).tensors, StoredWeights(Path("high"), 1).tensors
    position = resample_position(low["patches.position"].read(), 36)
    torch.testing.assert_close(high["patches.position"].read(), position)
    for name in low.keys() - {"patches.position"}:
        torch.testing.assert_close(high[name].read(), low[name].read(), rtol=0, atol=1e-25)


def check_predicts_no_text(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Assert that the commands that need text refuse the run of a ViT alone in a sentence, and leave nothing there."""
    before = sorted(Path(run).rglob("*"))
    with pytest.raises(ConfigurationError, match=rf"checkpoint={run} trained the ViT alone, which is for weights.vit"):
        export(run)
    capsys.readouterr()
    sys.argv = ["program", f"run.folder={run}"]
    with pytest.raises(SystemExit) as end:
        entry("evaluate", evaluate.main)
    printed = capsys.readouterr().err
    assert end.value.code == 2 and len(printed.splitlines()) == 1
    assert f"{run} trained the ViT alone, which predicts no text; its validation losses are in its" in printed
    assert sorted(Path(run).rglob("*")) == before


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


def test_a_branch_goes_on_as_its_run_did_and_two_cool_downs_are_averaged(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("run.steps=4", "schedule.warmup_steps=2", "evaluation.every_steps=0", "checkpoint.every_steps=2")
    straight = train("straight", *settings, command="pretrain_vit")
    branched = train("branch", *settings, "run.initial=straight@2", "run.branch=true", command="pretrain_vit")
    cooled = train("cooled", *settings, "run.initial=straight@2", "run.branch=true", "schedule.cooldown_steps=2",
                   command="pretrain_vit")  # fmt: skip
    assert [line["step"] for line in branched] == [3, 4] == [line["step"] for line in cooled]
    assert [line["loss"] for line in branched] == [line["loss"] for line in straight[2:]]
    assert [line["lr"] for line in cooled] == [straight[2]["lr"] / 2, 0]
    assert "Changed since step 2: " in capsys.readouterr().out
    one, same, other = (StoredWeights(Path(run), 4).tensors for run in ("straight", "branch", "cooled"))
    assert all(same[name].read().equal(x.read()) for name, x in one.items())
    assert any(not other[name].read().equal(x.read()) for name, x in one.items())

    average(["straight", "cooled@4"], "soup")
    soup = StoredWeights(Path("soup"), 4).tensors
    assert soup.keys() == one.keys()
    for name, x in soup.items():
        torch.testing.assert_close(x.read(), (one[name].read() + other[name].read()) / 2, rtol=1e-6, atol=1e-30)
    assert open_tower("soup", "vit").names and not list(Path("soup", "checkpoints").glob("*.partial"))
    train("deep", "vit.depth=3", "run.steps=1", "evaluation.every_steps=0", command="pretrain_vit")
    for checkpoints, output, sentence in (
        (["straight"], "x", "are fewer than two; name those to average."),
        (["straight", "cooled"], "soup", "output=soup exists and is not an empty folder"),
        (["deep", "soup"], "x", r"is of another model than .*: vit_block_2\.\S+ is missing, not \("),
        (["straight", "gone"], "x", "checkpoints=gone is no folder of a run"),
    ):
        with pytest.raises(ConfigurationError, match=sentence):
            average(checkpoints, output)
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("run.branch=true",), "run.branch=true goes on from another run; name it by run.initial=FOLDER"),
        (("classifier.head=none",), "classifier.head=none is for train.pretrain; choose map or patches."),
        (("mixture=text",), "mixture.span_corruption (span_corruption) has no images, and the model is a ViT alone"),
        (("data.tokenizer=${data.root}/tokenizer.model", "classifier.num_classes=9"), "is no list of labels"),
        (("classifier.num_classes=2",), "more than classifier.num_classes=2; leave classifier.num_classes out"),
        (("mixture=boxes", "data.flip=true"), "mixture.detection has boxes, which data.inception_crop and data.flip"),
        (("weights.mt5=x",), "weights.mt5=x would not be read, as this run has no mT5; set weights.mt5=null."),
        (("data.tokenizer=gone.txt",), "data.tokenizer=gone.txt is no readable list of labels"),
    ],
)
def test_mistakes(folder: Path, words: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        train("x", *words, command="pretrain_vit")
    printed = capsys.readouterr().err
    assert end.value.code == 2 and sentence in printed and len(printed.splitlines()) == 1


def test_what_is_for_the_other_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        ("mixture=objects", "The objective labels is for train.pretrain_vit"),
        ("data.inception_crop=true", "data.inception_crop=true is for train.pretrain_vit, as texts name what is cut"),
        ("data.tokenizer=${data.root}/labels.txt", "is a list of labels, for train.pretrain_vit; give a tokenizer."),
    ):
        with pytest.raises(SystemExit):
            train("x", words)
        assert sentence in capsys.readouterr().err
