"""Processes that stand still end themselves and say who is to blame; real processes, no torch needed."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from train.heartbeat import Heartbeat, Heartbeats
from train.watchdog import EXIT_HUNG, PeerLost, Watchdog, describe, may_speak, verdict, what_broke

RANK = """
import ctypes, sys, threading, time
from pathlib import Path
import progress
from train.watchdog import Watchdog

def stands_still():
    {hang}

with Watchdog({timeout_s}, Path(sys.argv[1]), rank=int(sys.argv[2]), world_size={world_size}) as watchdog:
    watchdog.beat("step 7, forward and backward")
    print("working", flush=True)
    stands_still()
"""


def start(folder: Path, rank: int, hang: str, world_size: int, timeout_s: float) -> subprocess.Popen[str]:
    code = RANK.format(hang=hang, world_size=world_size, timeout_s=timeout_s)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder), str(rank)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    return process


def test_a_rank_that_stands_still_ends_in_time_and_shows_where(tmp_path: Path) -> None:
    process = start(tmp_path, 0, "time.sleep(60)", world_size=1, timeout_s=4)
    began = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert process.returncode == EXIT_HUNG and time.monotonic() - began < 4
    stacks = (tmp_path / "stacks" / "rank_00000.txt").read_text(encoding="utf-8")
    for text in (said, stacks):
        assert "made no progress" in text and "step 7, forward and backward" in text and "in stands_still" in text
        assert "The run hangs. Stands still: rank 0" in text


def test_a_stopped_rank_is_named_by_one_that_lives(tmp_path: Path) -> None:
    first = start(tmp_path, 0, "time.sleep(60)", world_size=2, timeout_s=4)
    second = start(tmp_path, 1, "time.sleep(60)", world_size=2, timeout_s=4)
    time.sleep(1)  # several signs of life
    os.kill(first.pid, signal.SIGSTOP)
    _, said = second.communicate(timeout=30)
    assert first.wait(timeout=30) == -signal.SIGKILL  # it could not end itself
    assert second.returncode == EXIT_HUNG
    assert f"Does not answer, stopped or dead: rank 0 on {os.uname().nodename} (process {first.pid})" in said
    assert "(last seen: step 7, forward and backward)" in said and "Stands still: rank 1" in said


def test_native_code_that_keeps_the_interpreters_lock_is_ended_too(tmp_path: Path) -> None:
    process = start(tmp_path, 0, "ctypes.PyDLL(None).sleep(60)", world_size=1, timeout_s=2)
    assert process.wait(timeout=30) == 1
    assert "in stands_still" in (tmp_path / "stacks" / "rank_00000.txt").read_text(encoding="utf-8")


def test_progress_is_no_hang_and_leaves_no_stacks(tmp_path: Path) -> None:
    beats = "\n    ".join(["time.sleep(0.5); watchdog.beat('next')"] * 5)
    process = start(tmp_path, 0, beats, world_size=1, timeout_s=1)
    assert process.wait(timeout=30) == 0
    assert not list((tmp_path / "stacks").iterdir())


def test_progress_is_heard_from_anywhere(tmp_path: Path) -> None:
    beats = "\n    ".join(["time.sleep(0.5); progress.beat('next')"] * 5)
    assert start(tmp_path, 0, beats, world_size=1, timeout_s=1).wait(timeout=30) == 0


def test_another_threads_progress_is_not_this_ones(tmp_path: Path) -> None:
    hang = "threading.Thread(target=lambda: [(time.sleep(0.2), progress.beat('next')) for _ in range(300)]).start()"
    process = start(tmp_path, 0, f"{hang}; time.sleep(60)", world_size=1, timeout_s=2)
    assert process.wait(timeout=30) == EXIT_HUNG


def test_the_guilty_are_named_before_those_who_wait() -> None:
    waits = Heartbeat(0, "n0", 11, 5, "step 3, update", 9.0, "parallel/replicated.py:108 in _sum", waits=True)
    reads = Heartbeat(1, "n1", 12, 5, "step 3, reading", 9.0, "data/stream.py:120 in read")
    gone = Heartbeat(2, "n2", 13, 4, "step 3, update")
    others: dict[int, Heartbeat | None] = {1: reads, 2: gone, 3: None}
    said = verdict(waits, {1: None, 2: gone, 3: None}, others)
    assert said == (
        "The run hangs. "
        "Does not answer, stopped or dead: rank 2 on n2 (process 13) (last seen: step 3, update), rank 3 (never seen). "
        "Stands still: rank 1 on n1 (process 12) at data/stream.py:120 in read (step 3, reading). "
        "Waits: rank 0 on n0 (process 11) at parallel/replicated.py:108 in _sum (step 3, update)."
    )


def test_a_frame_of_ours_is_shown_rather_than_a_librarys() -> None:
    seen: list[tuple[str, bool]] = []
    sorted([1], key=lambda _: seen.append(describe(sys._getframe())) or 0)
    place, waits = seen[0]
    assert place.startswith("train/test_watchdog.py:") and not waits


@pytest.mark.parametrize(("world_size", "speakers"), [(1, [0]), (5, [0, 1, 2, 4]), (9, [0, 1, 2, 4, 8])])
def test_few_ranks_read_the_files_of_all(world_size: int, speakers: list[int]) -> None:
    assert [rank for rank in range(world_size) if may_speak(rank)] == speakers


GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40021"


def lose_a_peer(folder: Path, error: Exception) -> str:
    """What rank 0 of two says where a collective raises `error`."""
    with pytest.raises(PeerLost) as lost, Watchdog(4.8, folder, rank=0, world_size=2) as watchdog:
        watchdog.beat("step 7, update")
        raise error
    assert lost.value.__cause__ is error
    return str(lost.value)


def other_rank(folder: Path, **known: Any) -> Heartbeats:
    """Rank 1, on another machine."""
    beats = Heartbeats(folder, 1, 2)
    beats.own = Heartbeat(1, **{"host": "elsewhere", "process": 5, "place": "step 7, reading", **known})
    beats.write()
    return beats


def test_who_does_not_beat_any_more_is_named(tmp_path: Path) -> None:
    other_rank(tmp_path)
    said = lose_a_peer(tmp_path, RuntimeError(GLOO))
    assert said.startswith(f"Rank 0 on {os.uname().nodename} (process {os.getpid()}) lost a peer at train/")
    assert (
        "(step 7, update). Does not answer, stopped or dead: rank 1 on elsewhere (process 5) (last seen: step 7" in said
    )
    assert "Connection closed by peer" in said and "in lose_a_peer" in (tmp_path / "stacks/rank_00000.txt").read_text(
        encoding="utf-8"
    )


def test_whoever_still_beats_or_has_told_its_end_is_not(tmp_path: Path) -> None:
    other_rank(tmp_path, frame="train/loop.py:9 in step")
    assert "Every rank that it can see still answers" in lose_a_peer(tmp_path, RuntimeError(GLOO))
    beats = other_rank(tmp_path)
    beating = threading.Thread(target=lambda: [(time.sleep(0.05), beats.write()) for _ in range(40)])
    beating.start()
    assert "Every rank that it can see still answers" in lose_a_peer(tmp_path, RuntimeError(GLOO))
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

    assert what_broke(raised()) == GLOO
    for error in (ValueError(GLOO), RuntimeError("[gloo/transport/tcp/pair.cc] op.preamble.length <= op.nbytes"), None):
        assert what_broke(error) is None
