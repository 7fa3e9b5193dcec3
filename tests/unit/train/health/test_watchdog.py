"""Processes that make no progress end themselves and name the cause; real processes, without torch."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.errors import EXIT_HUNG, PeerLost
from common.progress import waiting_for
from train.health.device_queue import DeviceQueue
from train.health.heartbeat import Heartbeat, Heartbeats, published
from train.health.watchdog import Watchdog, connection_error, describe, is_reporter, verdict

RANK = """
import ctypes, os, sys, threading, time
from pathlib import Path
from common import progress
from train.health.watchdog import Watchdog

def full_pipe():
    end = os.pipe()[1]
    os.set_blocking(end, False)
    try:
        while os.write(end, bytes(4096)):
            pass
    except BlockingIOError:
        os.set_blocking(end, True)
    return end

def beats(seconds, beat):
    for _ in range(round(seconds / 0.25)):
        time.sleep(0.25)
        beat("next")

def hangs():
    {hang}

{before}
with Watchdog({timeout_s}, Path(sys.argv[1]), rank=int(sys.argv[2]), world_size={world_size}) as watchdog:
    watchdog.beat("step 7, forward and backward")
    print("working", flush=True)
    hangs()
"""
SLEEP, HOLDS_THE_LOCK = "time.sleep(60)", "ctypes.PyDLL(None).sleep(60)"
BLOCKED_STDERR = "os.dup2(full_pipe(), 2)"
BLOCKED_STACKS = "watchdog.stacks_file = os.fdopen(full_pipe(), 'wb', buffering=0); time.sleep(1); "
# The suffix of partial files, so that a pipe can be where the heartbeat of the disk is written.
NAMED_PARTIAL = "import secrets; secrets.token_hex = lambda _: 'stalled'"
# Name: (code in the watchdog, code before it, whether the disk responds, timeout_s).
ALONE = {
    "hangs": (SLEEP, "", True, 4),
    "holds the interpreter's lock": (HOLDS_THE_LOCK, "", True, 2),
    "makes progress": ("beats(4, watchdog.beat)", "", True, 2),
    "makes progress anywhere": ("beats(4, progress.beat)", "", True, 2),
    "another thread makes progress": (
        f"threading.Thread(target=beats, args=(60, progress.beat), daemon=True).start(); {SLEEP}", "", True, 2
    ),
    "makes progress, no disk": ("beats(5, watchdog.beat)", NAMED_PARTIAL, False, 2),
    "hangs, no disk": (SLEEP, NAMED_PARTIAL, False, 2),
    "holds the interpreter's lock, no disk": (HOLDS_THE_LOCK, NAMED_PARTIAL, False, 2),
    "hangs, blocked stderr": (SLEEP, BLOCKED_STDERR, True, 2),
    "holds the interpreter's lock, blocked dump": (BLOCKED_STACKS + HOLDS_THE_LOCK, "", True, 2),
}  # fmt: skip


def start(
    folder: Path, rank: int, hang: str, world_size: int, timeout_s: float, before: str = ""
) -> subprocess.Popen[str]:
    code = RANK.format(hang=hang, world_size=world_size, timeout_s=timeout_s, before=before)
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(rank)], stdout=pipe, stderr=pipe, text=True, encoding="utf-8"
    )
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    return process


def stall_disk(folder: Path) -> None:
    """Put pipes without a reader or writer where files would be: opening them blocks for ever."""
    for name in ("heartbeats", "stacks"):
        (folder / name).mkdir(parents=True)
    os.mkfifo(folder / "heartbeats" / "n1_rank_00001.jsonl")
    os.mkfifo(folder / "heartbeats" / f".{f'{os.uname().nodename}_rank_00000.jsonl'[:50]}.stalled.partial")
    os.mkfifo(folder / "stacks" / "rank_00000.txt")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, Path]]:
    """Return (exit code, stderr, folder) of each rank of `ALONE`; they run at the same time."""
    started = {}
    for name, (hang, before, responds, timeout_s) in ALONE.items():
        folder = tmp_path_factory.mktemp("alone")
        if not responds:
            stall_disk(folder)
        started[name] = start(folder, 0, hang, 1, timeout_s, before), folder
    ended = {}
    for name, (process, folder) in started.items():
        _, printed = process.communicate(timeout=300)
        ended[name] = process.returncode, printed, folder
    return ended


def stacks(folder: Path) -> str:
    return (folder / "stacks" / "rank_00000.txt").read_text(encoding="utf-8")


def test_a_rank_that_hangs_ends_itself_and_prints_its_stacks(alone: dict[str, tuple[int, str, Path]]) -> None:
    code, printed, folder = alone["hangs"]
    assert code == EXIT_HUNG  # the timer in C, at timeout_s, would have given 1
    for text in (printed, stacks(folder)):
        assert "made no progress" in text and "step 7, forward and backward" in text and "in hangs" in text
        assert "The run hangs. No progress: rank 0" in text and "does not respond" not in text


def test_native_code_that_holds_the_interpreters_lock_is_ended_too(alone: dict[str, tuple[int, str, Path]]) -> None:
    code, _, folder = alone["holds the interpreter's lock"]
    assert code == 1 and "in hangs" in stacks(folder)


@pytest.mark.parametrize("name", ["makes progress", "makes progress anywhere"])
def test_progress_is_no_hang_and_leaves_no_stacks(alone: dict[str, tuple[int, str, Path]], name: str) -> None:
    code, printed, folder = alone[name]
    assert (code, printed) == (0, "") and not list((folder / "stacks").iterdir())


def test_progress_of_another_thread_does_not_count(alone: dict[str, tuple[int, str, Path]]) -> None:
    assert alone["another thread makes progress"][0] == EXIT_HUNG


def test_a_stalled_disk_ends_no_run_that_makes_progress(alone: dict[str, tuple[int, str, Path]]) -> None:
    code, printed, folder = alone["makes progress, no disk"]
    assert code == 0 and printed.startswith(f"{folder} has not responded for") and "training goes on" in printed


def test_a_stalled_disk_hides_no_hang(alone: dict[str, tuple[int, str, Path]]) -> None:
    code, printed, folder = alone["hangs, no disk"]
    assert code == EXIT_HUNG
    assert "made no progress" in printed and "in hangs" in printed and "No progress: rank 0" in printed
    assert f"{folder} does not respond, so ranks of other machines are not listed." in printed
    code, printed, _ = alone["holds the interpreter's lock, no disk"]
    assert code == 1 and "in hangs" in printed


def test_stderr_that_nobody_reads_keeps_no_rank_alive(alone: dict[str, tuple[int, str, Path]]) -> None:
    code, _, folder = alone["hangs, blocked stderr"]
    assert code == EXIT_HUNG and "The run hangs. No progress: rank 0" in stacks(folder)


def test_a_blocked_dump_of_the_timer_in_c_is_ended_by_the_kernel(alone: dict[str, tuple[int, str, Path]]) -> None:
    assert alone["holds the interpreter's lock, blocked dump"][0] == -signal.SIGALRM


def test_a_stopped_rank_is_named_by_one_that_lives(tmp_path: Path) -> None:
    first = start(tmp_path, 0, SLEEP, world_size=2, timeout_s=4)
    second = start(tmp_path, 1, SLEEP, world_size=2, timeout_s=4)
    # Its first heartbeat may be one of the start-up, before the step begins.
    while not (0 in (seen := published(tmp_path)) and seen[0].activity.startswith("step 7")):
        assert first.poll() is None
        time.sleep(0.02)
    os.kill(first.pid, signal.SIGSTOP)
    _, printed = second.communicate(timeout=200)
    assert first.wait(timeout=200) == -signal.SIGKILL  # it could not end itself
    assert second.returncode == EXIT_HUNG
    assert f"No response (stopped or dead): rank 0 on {os.uname().nodename} (process {first.pid})" in printed
    assert "(last activity: step 7, forward and backward)" in printed and "No progress: rank 1" in printed


def test_causes_of_a_hang_are_named_before_ranks_that_wait() -> None:
    waits = Heartbeat(0, "n0", 11, 5, "step 3, update", 9.0, "parallel/engine/replicated.py:108 in _sum", waits=True)
    reads = Heartbeat(1, "n1", 12, 5, "step 3, reading", 9.0, "data/stream.py:120 in read")
    gone = Heartbeat(2, "n2", 13, 4, "step 3, update")
    others: dict[int, Heartbeat | None] = {1: reads, 2: gone, 3: None}
    printed = verdict(waits, {1: None, 2: gone, 3: None}, others)
    assert printed == (
        "The run hangs. "
        "No response (stopped or dead): rank 2 on n2 (process 13) (last activity: step 3, update), "
        "rank 3 (no heartbeat). "
        "No progress: rank 1 on n1 (process 12) at data/stream.py:120 in read (step 3, reading). "
        "Waits for other ranks: "
        "rank 0 on n0 (process 11) at parallel/engine/replicated.py:108 in _sum (step 3, update)."
    )


def test_a_frame_of_ours_is_shown_rather_than_a_librarys() -> None:
    seen: list[tuple[str, bool]] = []
    sorted([1], key=lambda _: seen.append(describe(sys._getframe())) or 0)
    line, waits = seen[0]
    assert line.startswith("health/test_watchdog.py:") and not waits


@pytest.mark.parametrize("done", [False, True])
def test_a_rank_whose_gpu_has_unfinished_work_waits_and_one_whose_gpu_is_idle_does_not(
    done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under NCCL both are at a line of ours that reads a number: no frame shows who is the cause."""
    recorded: list[int] = []
    event = SimpleNamespace(record=lambda: recorded.append(threading.get_ident()), query=lambda: done)
    monkeypatch.setattr("torch.cuda.Event", lambda: event)
    with Watchdog(600, tmp_path, queue=DeviceQueue(torch.device("cuda"))) as watchdog:
        watchdog.beat("step 7, update")
        frame, waits = watchdog._describe_own()
    assert set(recorded) == {threading.get_ident()} and "watchdog.py" in frame and waits == (not done)


def test_a_rank_is_where_the_thread_is_that_it_waits_for(tmp_path: Path) -> None:
    """A thread reads ahead: it reads, or waits for other ranks; the thread of the run waits for it in both cases."""
    begun, ended = threading.Event(), threading.Event()

    def reads_ahead() -> None:
        begun.set()
        ended.wait()

    thread = threading.Thread(target=reads_ahead)
    thread.start()
    begun.wait()
    with Watchdog(600, tmp_path) as watchdog:
        with waiting_for(thread.ident):
            assert "in reads_ahead" in watchdog._describe_own()[0]
        assert "in reads_ahead" not in watchdog._describe_own()[0]
    ended.set()


@pytest.mark.parametrize(("world_size", "reporters"), [(1, [0]), (5, [0, 1, 2, 4]), (9, [0, 1, 2, 4, 8])])
def test_few_ranks_read_the_files_of_all(world_size: int, reporters: list[int]) -> None:
    assert [rank for rank in range(world_size) if is_reporter(rank)] == reporters


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40021"


def lose_a_peer(folder: Path, error: Exception) -> str:
    """Return the message of PeerLost on rank 0 of two, on which a collective raises `error`."""
    with pytest.raises(PeerLost) as lost, Watchdog(4.8, folder, rank=0, world_size=2) as watchdog:
        watchdog.beat("step 7, update")
        raise error
    assert lost.value.__cause__ is error
    return str(lost.value)


def other_rank(folder: Path, **changes: Any) -> Heartbeats:
    """Write the heartbeat of rank 1, on another machine."""
    beats = Heartbeats(folder, 1, 2, machine=folder / "elsewhere")
    beats.own = Heartbeat(1, **{"host": "elsewhere", "process": 5, "activity": "step 7, reading", **changes})
    beats.write()
    return beats


def test_a_rank_that_no_longer_beats_is_named(tmp_path: Path) -> None:
    other_rank(tmp_path)
    printed = lose_a_peer(tmp_path, RuntimeError(GLOO))
    assert printed.startswith(f"Rank 0 on {os.uname().nodename} (process {os.getpid()}) lost a peer at health/")
    assert (
        "(step 7, update). No response (stopped or dead): rank 1 on elsewhere (process 5) (last activity: step 7"
        in printed
    )
    assert "Connection closed by peer" in printed and "in lose_a_peer" in (
        tmp_path / "stacks/rank_00000.txt"
    ).read_text(encoding="utf-8")


def test_a_rank_that_beats_or_has_reported_its_end_is_not_named(tmp_path: Path) -> None:
    other_rank(tmp_path, frame="train/step/loop.py:9 in step")
    assert "Every rank that it can read a heartbeat of still responds" in lose_a_peer(tmp_path, RuntimeError(GLOO))
    beats, ended = other_rank(tmp_path), threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            beats.write()

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        assert "Every rank that it can read a heartbeat of still responds" in lose_a_peer(tmp_path, RuntimeError(GLOO))
    finally:
        ended.set()
        beating.join()


def test_a_broken_connection_is_found_behind_other_errors() -> None:
    def raised() -> Exception:
        try:
            try:
                raise RuntimeError(GLOO)
            except RuntimeError as error:
                raise RuntimeError("stage 1 failed to run forward") from error
        except RuntimeError as error:
            return error

    assert connection_error(raised()) == GLOO
    for error in (ValueError(GLOO), RuntimeError("[gloo/transport/tcp/pair.cc] op.preamble.length <= op.nbytes"), None):
        assert connection_error(error) is None


def test_stacks_of_many_hangs_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.health.watchdog.MOST_STACKS", 10)
    folder = tmp_path / "stacks"
    folder.mkdir()
    for text in ("of the first process", "of the second process"):
        (folder / "rank_00000.txt").write_text(text, encoding="utf-8")
        with Watchdog(600, tmp_path):
            pass
    found = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    assert found == {"rank_00000.old.txt": "of the second process"}
