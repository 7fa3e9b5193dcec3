"""Training with two ranks, one of them stopped or slow: the message to the user, and the end."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from train.health.heartbeat import published

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = ["experiment=equivalence", "data.global_batch_size=4", "data.num_streams=2", "parallel.micro_batch_size=2"]


def start(corpus: Path, folder: Path, *settings: str) -> subprocess.Popen[str]:
    """Two ranks of `train.pretrain` under torchrun, in a session of their own."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", "-m", "train.pretrain"]
    return subprocess.Popen(
        [sys.executable, *launcher, *SETTINGS, f"data.root={corpus}", f"run.folder={folder}", *settings],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, encoding="utf-8", start_new_session=True,
    )  # fmt: skip


def lines(folder: Path) -> list[dict[str, float]]:
    file = folder / "metrics.jsonl"
    return [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def until(happens: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)


def process_of(folder: Path, rank: int) -> int:
    """Read the process from its heartbeat, which another rank of its machine may copy a second later."""
    end = time.monotonic() + 200
    while rank not in (found := published(folder)):
        assert time.monotonic() < end, f"no heartbeat of rank {rank}"
        time.sleep(0.05)
    return found[rank].process


@pytest.mark.parametrize(("layout", "frame"), [("parallel.pipeline=1", "in all_reduce"), ("parallel.pipeline=2", "")])
def test_a_rank_that_stops_ends_the_run_and_is_named(corpus: Path, tmp_path: Path, layout: str, frame: str) -> None:
    process = start(corpus, tmp_path, "run.steps=100000", "parallel.timeout_s=8", "checkpoint.every_steps=1000", layout)
    try:
        until(lambda: len(lines(tmp_path)) >= 3, process)
        stopped, waiting = process_of(tmp_path, 1), process_of(tmp_path, 0)
        os.kill(stopped, signal.SIGSTOP)
        printed, _ = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert not any(map(psutil.pid_exists, (stopped, waiting))), "a rank is left"
    assert f"No response (stopped or dead): rank 1 on {os.uname().nodename} (process {stopped})" in printed
    assert "(exitcode: 4)" in printed or "exitcode  : 4" in printed, "the watchdog came before any time-out"
    assert "Waits for other ranks: rank 0 on" in printed and frame in printed
    assert "The run hangs" in (tmp_path / "stacks" / "rank_00000.txt").read_text(encoding="utf-8")


def test_a_model_that_is_never_made_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    code = (
        "import time, train.build; from train import pretrain; from train.entry import entry;"
        "train.build.build_engine = lambda *_, **__: time.sleep(600); entry('pretrain', pretrain.main)"
    )
    settings = [*SETTINGS, f"data.root={corpus}", f"run.folder={tmp_path}", "run.steps=2", "parallel.timeout_s=4"]
    done = subprocess.run(
        [sys.executable, "-c", code, *settings], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=400
    )
    assert done.returncode == 4
    assert "made no progress" in done.stderr and "start-up" in done.stderr and "build_phase_engine" in done.stderr


def test_a_slow_rank_is_measured_and_reported_of(corpus: Path, tmp_path: Path) -> None:
    settings = ["run.straggler.window=3", "checkpoint.every_steps=1000"]
    process = start(corpus, tmp_path, "run.steps=7", *settings)
    until(lambda: len(lines(tmp_path)) >= 1, process)
    slow = process_of(tmp_path, 1)
    with suppress(ProcessLookupError):  # until it has ended
        while True:  # it hangs most of the time
            os.kill(slow, signal.SIGSTOP)
            time.sleep(0.3)
            os.kill(slow, signal.SIGCONT)
            time.sleep(0.1)
    printed, _ = process.communicate(timeout=200)
    assert process.returncode == 0, printed
    assert "Rank 1 is slow: its own work takes" in printed
    slowest = max(lines(tmp_path)[2:], key=lambda line: line["slowest_rank_busy_s"])  # it may hang as it waits
    assert slowest["slowest_rank"] == 1 and slowest["slowest_rank_busy_s"] > 2 * slowest["median_rank_busy_s"]
    assert max(line["communication_wait_s"] for line in lines(tmp_path)[2:]) > 0.2  # of rank 0, which waits for it
