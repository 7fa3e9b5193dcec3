"""Runs as they are started, by torchrun: killed, and ended under the same layout or another."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 5


@contextmanager
def started(corpus: Path, folder: Path, *settings: str, ranks: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """`experiment=equivalence`; the output of its processes is added to the file `printed` beside its folder."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    lengths = ["data.encoder_length=255", "data.decoder_length=47"]  # that sequence parallelism cannot divide
    own = [f"run.steps={STEPS}", "checkpoint.every_steps=1", f"data.root={corpus}", f"run.folder={folder}", *lengths]
    with printed(folder).open("a", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, *torchrun, "-m", "train.pretrain", "experiment=equivalence", *own, *settings],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        yield process
    finally:
        for left in [process, *ranks_of(folder)]:
            left.kill()


def printed(folder: Path) -> Path:
    return folder.with_suffix(".txt")


def lines(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def ranks_of(folder: Path) -> list[psutil.Process]:
    """The processes of a run, in order of rank."""
    found = {}
    for process in psutil.process_iter():
        try:
            if f"run.folder={folder}" in process.cmdline() and "RANK" in (environment := process.environ()):
                found[int(environment["RANK"])] = process
        except psutil.Error:
            continue
    return [found[rank] for rank in sorted(found)]


def test_killed_under_one_layout_ended_under_another(corpus: Path, tmp_path: Path) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    with started(corpus, alone, "parallel.zero_stage=1") as process:  # DeepSpeed without a launcher
        assert process.wait() == 0, printed(alone).read_text(encoding="utf-8")

    both = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.zero_stage=3"]
    with started(corpus, run, *both, ranks=4) as process:
        while len(lines(run)) < 2:
            assert process.poll() is None, printed(run).read_text(encoding="utf-8")
            time.sleep(0.05)
        killed = ranks_of(run)[1]
        killed.kill()
        assert process.wait(timeout=200) != 0  # of the 600 s that they would wait for a rank that only hangs
        assert not ranks_of(run), "a rank is left"
    text, host = printed(run).read_text(encoding="utf-8"), os.uname().nodename
    assert f"Rank 0 on {host}" in text and "lost a peer at" in text
    assert f"No response (stopped or dead): rank 1 on {host} (process {killed.pid})" in text
    assert not any(f"dead): rank {other} on" in text for other in (0, 2, 3))
    assert all(
        word in printed(run).read_text(encoding="utf-8") for word in ("pipeline stages", "patches ..", ".. head", "GiB")
    )

    with started(corpus, run, "parallel.tensor=2", "parallel.sequence=true", ranks=2) as process:
        assert process.wait() == 0, printed(run).read_text(encoding="utf-8")
    assert "resumed after step" in printed(run).read_text(encoding="utf-8")
    assert len(lines(run)) == STEPS
    for found, expected in zip(lines(run), lines(alone), strict=True):
        for key in ("step", "loss", "grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5)


def test_killed_at_any_moment_the_curve_continues_digit_for_digit(corpus: Path, tmp_path: Path) -> None:
    """Twice: with `checkpoint.every_steps=1`, most moments are amid a checkpoint that is written beside training."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    layout, draw = ["parallel.zero_stage=1", "run.steps=18"], random.Random(0)
    with started(corpus, straight, *layout, ranks=2) as process:
        assert process.wait() == 0, printed(straight).read_text(encoding="utf-8")
    for _ in range(2):
        with started(corpus, run, *layout, ranks=2) as process:
            done = len(lines(run))
            while len(lines(run)) < done + 4:
                assert process.poll() is None, printed(run).read_text(encoding="utf-8")
                time.sleep(0.01)
            time.sleep(draw.uniform(0, 0.3))
            for each in [process, *ranks_of(run)]:
                each.kill()
    with started(corpus, run, *layout, ranks=2) as process:
        assert process.wait() == 0, printed(run).read_text(encoding="utf-8")
    assert printed(run).read_text(encoding="utf-8").count("resumed after step") == 2
    curves = ([(x["step"], x["loss"], x["grad_norm"], x["lr"]) for x in lines(folder)] for folder in (run, straight))
    assert next(curves) == next(curves)
