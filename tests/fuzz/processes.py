"""Run `train.pretrain` on mutated shards and settings as processes, which must end with an exit code of the project.

One that fails must print a sentence and no traceback. Processes are forked from one that has imported everything,
because importing torch and deepspeed takes 10 s each time.
"""

import json
import os
import sys
import traceback
from pathlib import Path

import numpy as np

from tests.fuzz import settings, shards
from train import pretrain
from train.entry import entry

STEPS = 2
SMALL = (
    "experiment=equivalence", "vit=nano", "mt5=nano", f"run.steps={STEPS}", "data.global_batch_size=4",
    "data.num_streams=1", "parallel.micro_batch_size=2", "phases.mini.image_size=28",
    "data.encoder_length=96", "data.decoder_length=64",
)  # fmt: skip
OBJECTIVES = ("split_captioning", "captioning", "ocr", "vqa", "vqg", "object_vqa", "detection", "span_corruption")


def command(rng: np.random.Generator, folder: Path, tokenizer: Path) -> list[str]:
    """Write mutated shards; return a command line that trains on them, half of the time with an odd setting."""
    shards.write_source(rng, folder / "data" / "source")
    mixture = [f"mixture.{name}={{source: source, objective: {name}, weight: 1}}" for name in OBJECTIVES]
    words = [settings.override(rng)] if rng.random() < 0.5 else []
    return [
        *SMALL, f"data.root={folder / 'data'}", f"data.tokenizer={tokenizer}", f"run.folder={folder / 'run'}",
        "~mixture", *mixture, *words,
    ]  # fmt: skip


def run(rng: np.random.Generator, folder: Path, tokenizer: Path) -> str:
    """Train in a new process; return how it ended. Raises AssertionError where it must not end like that."""
    arguments = command(rng, folder, tokenizer)
    log = folder / "log"
    child = os.fork()
    if child == 0:
        _become(arguments, log)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    printed = log.read_text(encoding="utf-8", errors="replace")
    case = f"{' '.join(map(repr, arguments))}: exit {code}\n{printed[-1500:]}"
    assert code in settings.CODES and "Traceback" not in printed, case
    if code == 0 and (folder / "run").is_dir():
        lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert lines and all("loss" in json.loads(line) for line in lines), case
    else:
        assert printed.strip(), case
    return f"exit {code}"


def _become(arguments: list[str], log: Path) -> None:
    """Train in this process, write its output to `log`, and end the process."""
    code = 1
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(out, 1)
        os.dup2(out, 2)
        os.chdir(log.parent)  # a folder that a setting names is made here
        sys.argv = ["pretrain", *arguments]
        entry("pretrain", pretrain.main)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
