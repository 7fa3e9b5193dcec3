"""The whole way in one process: corpus, tokenizer, training in two phases, a restart, evaluation."""

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from common import progress
from data.corpus_text import corpus_texts
from data.miniature import official
from data.miniature.config import MiniatureConfig
from data.miniature.corpus import make_corpus
from data.tokenizer import train_tokenizer
from model.pali import PaLI, Units
from parallel.engine.base import Engine
from train import evaluate, pretrain
from train.entry import entry
from train.run import lock
from train.run.lock import FolderLock
from train.run.run import Extra, Run
from train.step.loop import Loop

FROZEN_THEN_ALL = (
    "run.from_scratch=true",
    "~phases",
    "phases.low={image_size: 112, freeze: ['patches.*', 'vit_block_*', 'bridge.vit_norm.*']}",
    "phases.high={steps: 2, image_size: 140, objectives: {vqa: 1, ocr: 1}}",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(MiniatureConfig(folder=str(folder), scale=0.01, languages=["en", "de", "ru", "ja"], workers=1))
    train_tokenizer(corpus_texts(folder, "train"), folder / "tokenizer.model", 1024)
    return folder


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["program", *arguments])


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_model_is_planned_on_meta_once(corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The checks plan it before any process group starts, and the engine takes their plan."""
    plans: list[str] = []
    made, step = PaLI.__init__, Loop.step

    def counted(model: PaLI, units: Units) -> None:
        made(model, units)
        if all(parameter.is_meta for parameter in model.parameters()):
            plans.append("plan")

    def first_step(loop: Loop, number: int) -> Any:
        plans.append(f"step {number}")
        return step(loop, number)

    monkeypatch.setattr(PaLI, "__init__", counted)
    monkeypatch.setattr(Loop, "step", first_step)
    monkeypatch.chdir(tmp_path)
    command(monkeypatch, "experiment=equivalence", f"data.root={corpus}", "run.steps=1", "run.from_scratch=true")
    entry("pretrain", pretrain.main)
    assert plans == ["plan", "step 1"]


def test_trained_resumed_and_evaluated(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places: list[str] = []  # where the watchdog receives that something was completed
    monkeypatch.setattr(progress, "listeners", [places.append])
    monkeypatch.chdir(tmp_path)
    settings = [
        "experiment=equivalence", f"data.root={corpus}", "run.steps=4", *FROZEN_THEN_ALL, "model.dropout_rate=0.1",
        "data.global_batch_size=8", "data.num_streams=2", "evaluation.every_steps=2", "evaluation.steps=1",
        "evaluation.samples=4", "evaluation.max_new_tokens=4", "checkpoint.every_steps=1",
    ]  # fmt: skip
    command(monkeypatch, *settings, "run.folder=straight")
    entry("pretrain", pretrain.main)
    straight = lines(tmp_path / "straight")
    assert [line["step"] for line in straight] == [1, 2, 3, 4]
    assert {"loss", "z_loss", "grad_norm", "lr", "examples_per_s", "tokens_per_s", "tflops_per_device", "mfu",
            "padding_fraction", "data_wait_s", "memory_gib"} <= straight[0].keys()  # fmt: skip
    assert "validation/loss" in straight[1] and "validation/loss" not in straight[0]
    assert {key for key in straight[3] if key.startswith("loss/")} == {"loss/vqa", "loss/ocr"}
    assert {key for key in straight[3] if key.startswith("validation/loss/")} == {
        "validation/loss/vqa", "validation/loss/ocr",
    }  # fmt: skip
    assert (tmp_path / "straight" / "samples" / "step_00000004.png").exists()
    reported = {"making patches", "making head", "validation loss, batch 1 of 1", "predictions, batch 1"}
    reported |= {f"step {step}, {what}" for step in (1, 2, 3, 4) for what in ("reading", "update", "its checkpoint")}
    assert reported <= set(places) and any(place.startswith("indexing ") for place in places)

    save = Run.save

    def dies_at_step_3(run: Run, engine: Engine, step: int, extra: Extra) -> None:
        if step == 3:
            raise KeyboardInterrupt
        save(run, engine, step, extra)

    command(monkeypatch, *settings, "run.folder=resumed", "tracker=wandb", "tracker.mode=offline")
    with monkeypatch.context() as patched:  # the third step is done, but not saved
        patched.setattr(Run, "save", dies_at_step_3)
        with pytest.raises(KeyboardInterrupt):
            entry("pretrain", pretrain.main)
    assert len(lines(tmp_path / "resumed")) == 3
    places.clear()
    run_id = tmp_path / "resumed" / "wandb" / "run_id"
    known = run_id.read_text(encoding="utf-8")
    run_id.unlink()  # the checkpoint holds it too
    entry("pretrain", pretrain.main)
    assert run_id.read_text(encoding="utf-8") == known
    saved = json.loads(
        (tmp_path / "resumed" / "checkpoints" / "step_00000004" / "state.json").read_text(encoding="utf-8")
    )["extra"]
    assert saved["tracker_run"] == known and saved["config"]["data"]["global_batch_size"] == 8
    for line, expected in zip(lines(tmp_path / "resumed"), straight, strict=True):
        assert [line[key] for key in ("step", "loss", "grad_norm", "lr")] == [
            expected[key] for key in ("step", "loss", "grad_norm", "lr")
        ]
    assert any(place.startswith("checking ") for place in places)
    assert any(place.startswith("reading weights/") for place in places)

    other = tmp_path / "other.model"
    train_tokenizer(corpus_texts(corpus, "validation"), other, 900)
    for name, main in (("pretrain", pretrain.main), ("evaluate", evaluate.main)):
        command(monkeypatch, *(settings if name == "pretrain" else []), "run.folder=resumed", f"data.tokenizer={other}")
        with pytest.raises(SystemExit) as end:
            entry(name, main)
        assert end.value.code == 2 and "resumed was trained with another tokenizer" in capsys.readouterr().err

    places.clear()
    command(monkeypatch, "run.folder=resumed", "evaluation.examples=2", "evaluation.split=validation")
    entry("evaluate", evaluate.main)
    result = json.loads((tmp_path / "resumed" / "evaluation.json").read_text(encoding="utf-8"))
    assert result["step"] == 4 and result["split"] == "validation"
    assert {"score", "blind", "low", "high"} == result["objectives"]["vqa"]["exact_match"].keys()
    assert (tmp_path / "resumed" / "samples.png").exists()
    assert "predictions, batch 1" in places
    official.main(official.Options(str(corpus), "official", records=3))
    for name, scores in (("coco", {"cider", "bleu_4"}), ("vqav2", {"vqa_accuracy"}), ("xm3600", {"cider_vocabulary"}),
                         ("detection", {"ap"})):  # fmt: skip
        words = ["checkpoint=resumed@4", f"task={name}", "task.root=official", "task.image_size=112",
                 "task.max_new_tokens=4", "task.blind=true"]  # fmt: skip
        command(monkeypatch, *evaluate.with_checkpoint(words))
        entry("evaluate", evaluate.main)
        folder = tmp_path / "resumed" / "tasks" / name / "step_00000004"
        result = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        assert result["step"] == 4 and scores <= result["scores"].keys() and scores <= result["blind"].keys()
        predicted = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        assert len(predicted) == result["items"] > 0 and result["without_image"] == 0
        assert "data:image/jpeg;base64," in (folder / "report.html").read_text(encoding="utf-8")
        assert (folder / "submission.json").exists() == (name in ("coco", "vqav2"))
    command(monkeypatch, *evaluate.with_checkpoint(["checkpoint=resumed", "task=coco", "task.root=nowhere"]))
    assert ended("evaluate", evaluate.main) == 2
    assert "nowhere/dataset_coco.json No such file" in capsys.readouterr().err
    command(monkeypatch, "run.folder=resumed", "evaluation.follow=true")
    assert ended("evaluate", evaluate.main) == 2
    assert "evaluation.follow=true scores every checkpoint on a task" in capsys.readouterr().err
    assert list((tmp_path / "resumed" / "evaluation" / "heartbeats").glob("*_rank_00000.jsonl")), "it was watched over"


def ended(name: str, main: Callable[[DictConfig], None]) -> int:
    with pytest.raises(SystemExit) as end:
        entry(name, main)
    return int(str(end.value.code))


def test_weights_that_are_not_finite_are_not_saved_and_the_run_that_was_stays_one(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [
        "experiment=equivalence", f"data.root={corpus}", "run.steps=2", "phases.mini.image_size=56",
        "data.global_batch_size=4", "data.num_streams=1", "checkpoint.every_steps=1", "run.folder=run",
    ]  # fmt: skip
    update, rates = Engine.update, []

    def spoils_the_last(engine: Engine, rate: float) -> float:
        norm = update(engine, rate)
        rates.append(rate)
        if len([rate for rate in rates if rate]) == 2:
            engine.shards()[0].weights.view(-1)[0] = math.inf
        return norm

    command(monkeypatch, *settings)
    with monkeypatch.context() as patched:
        patched.setattr(Engine, "update", spoils_the_last)
        assert ended("pretrain", pretrain.main) == 3
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.search(
        r"checkpoint of step 2 is not written .* weights/patches.* is not finite \(that of step 1 stays", printed
    )
    checkpoints, first = (
        tmp_path / "run" / "checkpoints",
        (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"),
    )
    assert sorted(file.name for file in checkpoints.iterdir()) == ["latest", "step_00000001"]

    command(monkeypatch, *settings, "run.seed=8")
    assert ended("pretrain", pretrain.main) == 2 and "run.seed=7, now it is 8" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8") == first

    command(monkeypatch, *settings, "run.seed=8", "run.allow_changes=[run.seed]", "schedule.peak=1e-3")
    entry("pretrain", pretrain.main)
    printed = " ".join(capsys.readouterr().out.split())
    changes = "run.seed: 7 -> 8; schedule.peak: 0.01 -> 0.001; so the learning rate of step 2 is 0.001"
    assert f"Changed since step 1: {changes}" in printed
    assert (tmp_path / "run" / "config.yaml.1").read_text(encoding="utf-8") == first

    for step in (1, 2):
        shutil.rmtree(checkpoints / f"step_{step:08d}")
    for name, main in (("pretrain", pretrain.main), ("evaluate", evaluate.main)):
        command(monkeypatch, *(settings if name == "pretrain" else []), "run.folder=run")
        assert ended(name, main) == 2 and "though step_00000002 was one" in capsys.readouterr().err
    assert len(lines(tmp_path / "run")) == 2


def test_a_rehearsal_does_everything_once_and_leaves_the_folder_as_it_was(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    low, high = "phases.low={image_size: 28, freeze: ['vit_block_*']}", "phases.high={steps: 1, image_size: 42}"
    settings = [
        "experiment=equivalence", f"data.root={corpus}", "run.steps=90", "data.global_batch_size=4",
        "data.num_streams=1", "run.folder=runs/x", "evaluation.max_new_tokens=2", "tracker=wandb", "run.rehearse=true",
        "run.from_scratch=true",
    ]  # fmt: skip
    for validates, phases in ((True, [low, high]), (False, [low])):
        command(monkeypatch, *settings, f"evaluation.every_steps={30 * validates}", "~phases", *phases)
        entry("pretrain", pretrain.main)
        printed = capsys.readouterr().out
        parts = [
            "model and weights",
            "step and update",
            "checkpoint",
            "load",
            *["validation"] * validates,
            "predictions",
        ]
        for phase in ("low", "high")[: 1 + validates]:
            found = [re.search(rf"{phase} .*{part}.* (\d+\.\d\d) GiB .* \d+\.\d s", printed) for part in parts]
            assert all(row is not None and float(row[1]) > 0 for row in found), printed
        assert ("validation" in printed) == validates and "step 1/90" in printed
        assert ("step 90/90" in printed) == validates, "the first step of the second phase"
        assert not (tmp_path / "runs" / "x").exists()
    place = tmp_path / "runs" / "x" / "checkpoints" / "step_00000007"  # of a run that has begun, and cannot be loaded
    place.mkdir(parents=True)
    assert ended("pretrain", pretrain.main) == 2 and "damaged" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "runs" / "x").iterdir()] == ["checkpoints"] and place.exists()

    other = FolderLock(tmp_path / "runs" / "x" / "rehearsal")
    other.path.parent.mkdir()
    assert other.take() is None
    monkeypatch.setattr(lock, "WAIT_S", 0.0)
    assert ended("pretrain", pretrain.main) == 2 and "is in use by process" in capsys.readouterr().err
    assert other.path.exists(), "that of another rehearsal"
    other.release()
