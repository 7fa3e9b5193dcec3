"""`make demo` repeats no finished step; its programs are fakes that only log their arguments."""

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """#!/bin/sh
case "$1" in -c) echo 2; exit;; esac
echo "$*" >> printed
mkdir -p runs/corpus
case "$*" in
    *data.miniature*) [ -e runs/corpus/corpus.json ] || touch runs/corpus/corpus.json ;;
    *data.tokenizer*) touch runs/corpus/tokenizer.model ;;
    *data.labels*) touch runs/corpus/labels.txt ;;
    *train.pretrain_vit*) mkdir -p runs/demo_vit ;;
esac
"""


def commands(folder: Path, *words: str) -> list[str]:
    """Return the modules that one `make` of these words runs, each with its words."""
    (folder / "printed").unlink(missing_ok=True)
    subprocess.run(["make", "BIN=./bin", *words], cwd=folder, check=True, capture_output=True)
    return [line.split("-m ")[1] for line in (folder / "printed").read_text(encoding="utf-8").splitlines()]


def executed(folder: Path) -> list[str]:
    """Return the modules that one `make demo` runs."""
    return [command.split()[0] for command in commands(folder, "demo")]


def prepare(folder: Path) -> None:
    """Copy the Makefile, and put the fakes in the places of its programs."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    for file in (".venv/ready", "bin/python", "bin/torchrun"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(PROGRAM, encoding="utf-8")
        (folder / file).chmod(0o755)


def test_a_first_pass_of_the_study_and_one_of_several_seeds_have_their_own_folders(tmp_path: Path) -> None:
    prepare(tmp_path)
    assert commands(tmp_path, "study")[-2:] == [
        "train.study seeds=1 folder=runs/study 2",
        "train.study_report seeds=1 folder=runs/study",
    ]
    assert commands(tmp_path, "study", "seeds=3")[-2:] == [
        "train.study seeds=3 full=true folder=runs/study_full 2",
        "train.study_report seeds=3 full=true folder=runs/study_full",
    ]


def test_demo_repeats_no_finished_step(tmp_path: Path) -> None:
    prepare(tmp_path)
    rest = ["train.pretrain", "train.evaluate"]
    all_steps = ["data.miniature", "data.tokenizer", "data.labels", "train.pretrain_vit", *rest]
    assert executed(tmp_path) == all_steps
    assert executed(tmp_path) == ["data.miniature", *rest]
    shutil.rmtree(tmp_path / "runs/demo_vit")
    assert executed(tmp_path) == ["data.miniature", "train.pretrain_vit", *rest]
    later = (tmp_path / "runs/demo_vit/done").stat().st_mtime + 10
    os.utime(tmp_path / "runs/corpus/corpus.json", (later, later))  # another corpus
    assert executed(tmp_path) == all_steps
