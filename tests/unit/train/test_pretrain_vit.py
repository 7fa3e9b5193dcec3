"""The ViT pretrained alone: a run can load its file, and mistakes are one sentence."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.miniature.config import MiniatureConfig
from data.miniature.corpus import make_corpus
from model.config import ModelConfig, MT5Config, ViTConfig
from model.layers import parameter_parts
from model.pali import plan_on_meta
from train import pretrain_vit
from train.config import RunConfig
from train.entry import entry
from train.first_weights import check_fit
from train.tower_weights import open_tower


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(MiniatureConfig(folder=str(folder), scale=0.002, languages=["en"], workers=1))
    return folder


def run(monkeypatch: pytest.MonkeyPatch, corpus: Path, *settings: str) -> None:
    small = ["phases.mini.image_size=56", "vit=nano", "vit_pretraining.steps=3", "vit_pretraining.batch=4"]
    monkeypatch.setattr(sys, "argv", ["program", f"data.root={corpus}", *small, *settings])
    entry("pretrain", pretrain_vit.main)


def test_what_it_writes_is_taken_over(corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "towers" / "vit.safetensors"
    run(monkeypatch, corpus, f"vit_pretraining.output={output}")
    assert [file.name for file in output.parent.iterdir()] == [output.name]
    assert {"patches.position", "bridge.vit_norm.bias"} <= load_file(output).keys()
    config = RunConfig(
        vit=ViTConfig(32, 2, 128, 2, 14), mt5=MT5Config(vocab_size=400), model=ModelConfig(image_size=56)
    )
    parts = {part.name: part for _, part in parameter_parts(plan_on_meta(config.pali))}
    check_fit(open_tower(str(output), "vit"), config, parts)


def test_a_patch_names_words_and_box_of_its_object() -> None:
    """Coordinates in their order, also those at the rim and beyond it."""
    box = [-0.1, 0.5, 0.49, 1.2]  # ymin, xmin, ymax, xmax: the upper right quarter
    record = pretrain_vit.Labeled(np.zeros((28, 28, 3), np.uint8), [({"red", "star"}, box)])
    targets = pretrain_vit._targets(record, ["blue", "red", "star"], 2)
    upper_left, upper_right, *lower = targets
    assert not upper_left.any() and not np.any(lower)
    assert upper_right[:3].tolist() == [0, 1, 1]
    bins = upper_right[3:].reshape(4, pretrain_vit.BINS)
    assert bins.sum() == 4 and bins.argmax(1).tolist() == [0, 6, 5, 11]


def test_the_learning_rate_warms_up_and_decays() -> None:
    factors = [pretrain_vit._schedule(step, 400) for step in (0, 24, 49, 50, 200, 320, 360, 399)]
    assert factors == pytest.approx([0.02, 0.5, 1, 1, 1, 1, 0.5, 1 / 80])


def test_images_without_objects_have_a_loss() -> None:
    nothing = torch.zeros(4, 2, 3 + 4 * pretrain_vit.BINS)
    loss, right = pretrain_vit._judge(nothing - 1, nothing)
    assert float(loss) == pytest.approx(4 * 3 * math.log1p(math.exp(-1))) and right == 1


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["vit_pretraining.source=text"], "vit_pretraining.source=text has no image with objects; name another"),
        (["vit_pretraining.source=nowhere"], "no train shards at"),
        (["vit_pretraining.output=/proc/x/y"], "vit_pretraining.output=/proc/x/y cannot be written"),
        (["vit_pretraining.output=."], "vit_pretraining.output=. is a folder; name a file in it."),
        (["run.rehearse=true"], "run.rehearse=true is for train.pretrain alone; leave it out here."),
        (["phases.mini.image_size=57"], "image_size=57 must be a multiple of vit.patch_size=14"),
    ],
)
def test_mistakes(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    settings: list[str], sentence: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, corpus, *settings)
    assert end.value.code == 2
    printed = capsys.readouterr().err
    assert sentence in printed and len(printed.splitlines()) == 1


def test_weights_that_are_not_finite_are_not_written_and_a_file_that_was_there_is_kept(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "vit.safetensors"
    output.write_text("of another run", encoding="utf-8")
    judge, calls = pretrain_vit._judge, []

    def last_one_spoils(answers: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, float]:
        loss, right = judge(answers, targets)
        calls.append(loss)
        return loss if len(calls) < 3 else _Spoiled.apply(loss), right

    monkeypatch.setattr(pretrain_vit, "_judge", last_one_spoils)  # its gradient makes the last update's weights NaN
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, corpus, f"vit_pretraining.output={output}")
    assert end.value.code == 3
    assert re.search(
        "After step 3 .* is not finite, .* give a lower vit_pretraining.learning_rate", capsys.readouterr().err
    )
    calls.append(calls[0] * math.nan)
    monkeypatch.setattr(pretrain_vit, "_judge", lambda *_: (calls[-1], 0.0))
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, corpus, f"vit_pretraining.output={output}")
    assert end.value.code == 3 and "loss is not finite at step 1" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [output.name]
    monkeypatch.setattr(pretrain_vit, "_judge", judge)
    run(monkeypatch, corpus, f"vit_pretraining.output={output}")
    assert (tmp_path / "vit.safetensors.1").read_text(encoding="utf-8") == "of another run"
    assert "patches.position" in load_file(output)


class _Spoiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * math.nan
