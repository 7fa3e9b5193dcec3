"""`make demo` does nothing twice: with programs that only write down what they are requested."""

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
    *train.pretrain_vit*) touch runs/demo_vit.safetensors ;;
esac
"""


def asked(folder: Path) -> list[str]:
    """The modules that one `make demo` runs."""
    (folder / "printed").unlink(missing_ok=True)
    subprocess.run(["make", "BIN=./bin", "demo"], cwd=folder, check=True, capture_output=True)
    return [line.split("-m ")[1].split()[0] for line in (folder / "printed").read_text(encoding="utf-8").splitlines()]


def test_demo_does_nothing_twice(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for place in (".venv/ready", "bin/python", "bin/torchrun"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(PROGRAM, encoding="utf-8")
        (tmp_path / place).chmod(0o755)
    rest = ["train.pretrain", "train.evaluate"]
    assert asked(tmp_path) == ["data.miniature", "data.tokenizer", "train.pretrain_vit", *rest]
    assert asked(tmp_path) == ["data.miniature", *rest]
    (tmp_path / "runs/demo_vit.safetensors").unlink()
    assert asked(tmp_path) == ["data.miniature", "train.pretrain_vit", *rest]
    later = (tmp_path / "runs/demo_vit.safetensors").stat().st_mtime + 10
    os.utime(tmp_path / "runs/corpus/corpus.json", (later, later))  # another corpus
    assert asked(tmp_path) == ["data.miniature", "data.tokenizer", "train.pretrain_vit", *rest]
