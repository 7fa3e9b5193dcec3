"""End a process that makes no progress, and report which ranks died or hang, so that no rank waits for ever."""

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import BinaryIO, Protocol

import psutil

from common import progress
from common.errors import EXIT_HUNG, PeerLost
from train.health.background import BackgroundJob, call_within
from train.health.heartbeat import Heartbeat, Heartbeats

# Parts of the errors that gloo and NCCL raise where the other end of a connection is gone.
SIGNS_OF_A_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused",
                        "remote process exited", "Socket closed")  # fmt: skip
MOST_NAMED = 8  # ranks of one kind in the message of a hang
SILENT, STUCK, WAITS = "No response (stopped or dead)", "No progress", "Waits for other ranks"  # kinds in that message
LONGEST_TICK_S = 5.0
SHORT_TICK_S, SHORT_TICKS_S = 1.0, 60.0  # a run that has just begun beats more often -> its user soon sees it
STALL_S = 60.0  # a write to the run's folder that takes longer is reported
TICKS_BEFORE, TICKS_OVER = 5, 14  # ending a hung process begins so long before timeout_s, and takes at most so long
SMALL_WORLD = 32  # ranks; in a larger world only reporters read the heartbeats of other machines
MOST_STACKS = 2**20  # bytes; a larger file of stacks is renamed to *.old.txt, and replaces the one of that name
STDERR = 2  # a file descriptor: the lock of sys.stderr may be held by a blocked thread
# Code that waits for other ranks: a thread with one of these files on its stack is not the cause of a hang.
WAITING = ("torch/distributed/", "deepspeed/comm/", "parallel/communication_time.py")
LIBRARIES = ("site-packages", "dist-packages", f"lib/python{sys.version_info.major}.", "parallel/communication_time.py")


class Queue(Protocol):
    """The queue of a device (`train/health/device_queue.py`); a process without a GPU imports no torch for it."""

    def mark(self) -> None:
        """Mark what has been enqueued."""

    def is_busy(self) -> bool:
        """Return whether the device has not come to the last mark."""


class Watchdog:
    """Watch over the thread that enters it: `progress.beat` must be called at least every `timeout_s` seconds.

    Every rank has a watchdog. Without a beat, a rank prints the stacks of all of its threads to stderr and to `stacks/`
    in the run's folder, and ends with exit code 4, because nothing else interrupts a collective that waits for a dead
    peer. The lowest reporter among these ranks also prints which ranks do not respond, which make no progress, and
    which wait for others. A rank that does not respond cannot end itself, so a process of the same launcher and machine
    kills it. All of this is done when `timeout_s` is over. A rank whose launcher has died gets a SIGTERM, because no
    other process would end it. A process in which no Python thread can run (native code holds the interpreter's lock)
    is ended by a timer in C, which dumps its stacks too, with exit code 1.

    The watching thread touches no disk: background jobs write files and pipes (`train/health/background.py`). So a
    stalled disk ends no run that makes progress, and delays the end of one that hangs by a few ticks. If the stack dump
    of the timer in C blocks, SIGALRM ends the process.

    Where a collective fails because a peer has died, leaving the watchdog raises PeerLost, which names that peer.
    """

    def __init__(
        self, timeout_s: float, folder: Path, rank: int = 0, world_size: int = 1, queue: Queue | None = None
    ) -> None:
        """`folder`: the folder of the run; `queue`: of the rank's GPU, marked at every beat; None without a GPU."""
        self.queue = queue
        self.timeout_s, self.tick_s = timeout_s, min(LONGEST_TICK_S, timeout_s / 20)
        self.heartbeats = Heartbeats(folder, rank, world_size, fresh_s=3 * self.tick_s)
        self.stacks_path = folder / "stacks" / f"rank_{rank:05d}.txt"
        self.stacks_file: BinaryIO | None = None
        self.opening = BackgroundJob("stacks", self._open_stacks)
        self.activity, self.left = "start-up", threading.Event()
        self.stalled, self.stall_reported, self.sees_other_machines = False, False, True
        self.launcher = os.getppid() if world_size > 1 else None  # a single process may outlive its shell

    def __enter__(self) -> "Watchdog":
        self.left.clear()
        self.watched = threading.get_ident()
        self.begun = time.monotonic()
        self.beat("start-up")
        progress.listeners.append(self.beat)
        self.opening.start()
        self.opening.wait(self.tick_s)
        self._set_timers(self.timeout_s)  # here: native code may keep the thread below from ever running
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, trace: TracebackType | None) -> None:
        lost = self._lost(error, trace) if error and connection_error(error) else None  # while the thread still beats
        progress.listeners.remove(self.beat)
        self.left.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        call_within(self.tick_s, self._close_stacks)
        self.heartbeats.close(self.tick_s)
        if lost:
            raise PeerLost(lost) from error

    def beat(self, activity: str = "") -> None:
        """Count a call of the watched thread as progress, and ignore calls of other threads.

        `activity` names what the thread does next; empty keeps the current activity.
        """
        if threading.get_ident() == self.watched:
            self.activity, self.last_beat = activity or self.activity, time.monotonic()
            if self.queue is not None:
                self.queue.mark()

    def _watch(self) -> None:
        own = self.heartbeats.own
        while not self.left.is_set():
            own.activity, own.progress_s_ago = self.activity, round(time.monotonic() - self.last_beat, 1)
            if own.progress_s_ago > self.timeout_s - TICKS_BEFORE * self.tick_s:
                self._end()
            self.heartbeats.beat()
            self._report_stalled_disk()
            if self.launcher not in (None, os.getppid()):
                self.launcher = None
                text = f"The launcher of {own} has died; this process saves and ends.\n"
                call_within(self.tick_s, partial(write_all, STDERR, text))
                os.kill(own.process, signal.SIGTERM)
            self._set_timers(self.timeout_s)
            young = time.monotonic() - self.begun < SHORT_TICKS_S
            self.left.wait(min(self.tick_s, SHORT_TICK_S) if young else self.tick_s)

    def _set_timers(self, seconds: float) -> None:
        """Start two timers in C: after `seconds` dump all stacks and exit, two ticks later end by SIGALRM."""
        file = STDERR if self.stacks_file is None or self.stalled else self.stacks_file.fileno()
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)
        signal.setitimer(signal.ITIMER_REAL, seconds + 2 * self.tick_s)

    def _report_stalled_disk(self) -> None:
        """Print once that the disk of the run's folder does not respond, and once that it responds again."""
        folder, busy_s = self.heartbeats.folder.parent, max(self.heartbeats.shared_job.busy_s, self.opening.busy_s)
        self.stalled, reported = busy_s > 4 * self.tick_s, busy_s > min(STALL_S, self.timeout_s)
        if reported != self.stall_reported:
            self.stall_reported = reported
            text = f"{folder} has not responded for {busy_s:.0f} s" if reported else f"{folder} responds again"
            call_within(self.tick_s, partial(write_all, STDERR, f"{text}; training goes on.\n"))

    def _open_stacks(self) -> None:
        with suppress(OSError):
            self.stacks_path.parent.mkdir(parents=True, exist_ok=True)
            if self.stacks_path.exists() and self.stacks_path.stat().st_size > MOST_STACKS:
                os.replace(self.stacks_path, self.stacks_path.with_suffix(".old.txt"))
            self.stacks_file = self.stacks_path.open("ab", buffering=0)

    def _close_stacks(self) -> None:
        if self.stacks_file is not None:
            empty = os.fstat(self.stacks_file.fileno()).st_size == 0
            self.stacks_file.close()
            if empty:  # neither this process nor an earlier one hung
                self.stacks_path.unlink(missing_ok=True)

    def _report(self, text: str) -> None:
        """Write a text to stderr, then to the file of stacks."""
        call_within(self.tick_s, partial(write_all, STDERR, text))
        if self.stacks_file is not None:
            call_within(self.tick_s, partial(write_all, self.stacks_file.fileno(), text))

    def _end(self) -> None:
        """Report a hang, kill stopped processes of the same launcher, and end this process."""
        own = self.heartbeats.own
        self._set_timers(TICKS_OVER * self.tick_s)
        own.frame, own.waits = self._describe_own()
        self._report(
            f"{_capitalized(own)} made no progress for {own.progress_s_ago:.0f} s "
            f"(parallel.timeout_s={self.timeout_s:g}): {own.activity}; its threads:\n{all_stacks()}"
        )
        call_within(self.tick_s, self.heartbeats.write)
        before = self._others()
        for _ in range(3):  # long enough for every living rank to beat again, and to reach its own time-out
            time.sleep(self.tick_s)
            self.heartbeats.beat()
        now = self._others()
        if is_reporter(own.rank) and not any(
            beat.frame is not None for rank, beat in now.items() if beat and rank < own.rank and is_reporter(rank)
        ):
            run = self.heartbeats.folder.parent
            stalled = f" {run} does not respond, so ranks of other machines are not listed."
            self._report(f"{verdict(own, before, now)}{'' if self.sees_other_machines else stalled}\n")
        for rank, beat in now.items():
            if beat is not None and not responds(before.get(rank), beat):
                kill_sibling(own, beat)
        os._exit(EXIT_HUNG)

    def _describe_own(self) -> tuple[str, bool]:
        """Return where the watched thread is, and whether it or its GPU waits there for other ranks.

        Where it waits for another thread of this process, return where that one is.
        """
        thread = progress.awaited.get(self.watched, self.watched)
        frame, waits = describe(sys._current_frames().get(thread))
        busy = self.queue is not None and call_within(self.tick_s, self.queue.is_busy)
        return frame, waits or bool(busy)

    def _lost(self, error: BaseException, trace: TracebackType | None) -> str:
        """Return a sentence that names the ranks that may have broken the connection."""
        own, file = self.heartbeats.own, self.stacks_file
        if file is not None:
            call_within(self.tick_s, lambda: write_all(file.fileno(), "".join(traceback.format_exception(error))))
        own.frame, own.waits = describe(innermost_frame(trace))  # set -> other ranks do not take this one for dead
        call_within(self.tick_s, self.heartbeats.write)
        before = self._others()
        silent = [beat for beat in before.values() if beat and has_died(own, beat)]
        if not silent:
            time.sleep(4 * self.tick_s)
            silent = [beat for rank, beat in self._others().items() if beat and not responds(before.get(rank), beat)]
        names = ", ".join(f"{beat} (last activity: {beat.activity})" for beat in silent[:MOST_NAMED])
        return (
            f"{_capitalized(own)} lost a peer at {own.frame} ({self.activity}). "
            + (f"{SILENT}: {names}." if names else "Every rank that it can read a heartbeat of still responds.")
            + f" Error of the connection: {connection_error(error)} (traceback: {self.stacks_path})"
        )

    def _others(self) -> dict[int, Heartbeat | None]:
        """Return the last heartbeats of the other ranks, None for one that has none.

        Only those of this machine are read if the run's folder does not respond, or if this rank is no reporter in a
        large world.
        """
        own, size = self.heartbeats.own.rank, self.heartbeats.world_size
        reads_all = is_reporter(own) or size <= SMALL_WORLD
        found = call_within(2 * self.tick_s, self.heartbeats.read) if reads_all else None
        self.sees_other_machines = found is not None
        beats: dict[int, Heartbeat | None] = {**self.heartbeats.read_local(), **(found or {})}
        if found is not None:
            beats = {rank: beats.get(rank) for rank in range(size)}
        return {rank: beat for rank, beat in beats.items() if rank != own}


def write_all(descriptor: int, text: str) -> None:
    """Write a text to a file or pipe, and block until all of it is written."""
    left = text.encode(errors="backslashreplace")
    while left:
        left = left[os.write(descriptor, left) :]


def all_stacks() -> str:
    """Return the stacks of all threads.

    faulthandler holds the interpreter's lock while it writes, so it writes to memory, which cannot block.
    """
    memory = os.memfd_create("stacks")
    try:
        faulthandler.dump_traceback(memory, all_threads=True)
        return os.pread(memory, os.fstat(memory).st_size, 0).decode(errors="replace")
    finally:
        os.close(memory)


def is_reporter(rank: int) -> bool:
    """Return whether a rank may report a hang of the run: ranks 0, 1, 2, 4, 8 ….

    They are few enough for each to read every rank's file, and so many that one of them lives.
    """
    return rank & (rank - 1) == 0


def connection_error(error: BaseException | None) -> str | None:
    """Return the message of a broken connection to another rank, None where that is not the cause of `error`.

    It is searched in the whole chain of causes, because torch's pipeline schedules raise errors of their own from it.
    It is found by its text, because gloo raises a plain RuntimeError.
    """
    while error is not None:
        line = str(error).partition("\n")[0]
        if isinstance(error, RuntimeError) and any(sign in line for sign in SIGNS_OF_A_LOST_PEER):
            return line
        error = error.__cause__ or error.__context__
    return None


def _capitalized(beat: Heartbeat) -> str:
    text = str(beat)
    return text[0].upper() + text[1:]


def has_died(own: Heartbeat, other: Heartbeat) -> bool:
    """Return whether a rank of this machine has died before it could write its last heartbeat."""
    if other.host != own.host or other.frame is not None:
        return False
    try:
        return psutil.Process(other.process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def innermost_frame(trace: TracebackType | None) -> FrameType | None:
    """Return the frame in which an error was raised."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame if trace else None


def kill_sibling(own: Heartbeat, other: Heartbeat) -> None:
    """Kill the process of another rank's heartbeat if the launcher of this process started it too."""
    if other.host == own.host:
        with suppress(psutil.Error):
            process = psutil.Process(other.process)
            if process.ppid() == os.getppid():
                process.kill()


def responds(before: Heartbeat | None, now: Heartbeat | None) -> bool:
    """Return whether a rank has beaten between two readings, or has written the last heartbeat of its end."""
    return now is not None and (before is None or now.beats > before.beats or now.frame is not None)


def verdict(own: Heartbeat, before: dict[int, Heartbeat | None], now: dict[int, Heartbeat | None]) -> str:
    """Return one sentence for each kind of rank, the likely causes of the hang first.

    `before`, `now`: two readings of the other ranks' heartbeats.
    """
    silent, stuck, waiting = [], [], []
    for rank, beat in sorted({**now, own.rank: own}.items()):
        if rank != own.rank and not responds(before.get(rank), beat):
            silent.append(f"{beat} (last activity: {beat.activity})" if beat else f"rank {rank} (no heartbeat)")
        elif beat is not None and beat.waits:
            waiting.append(f"{beat} at {beat.frame} ({beat.activity})")
        elif beat is not None:
            stuck.append(f"{beat} at {beat.frame or 'an unknown line'} ({beat.activity})")
    lines = []
    for kind, ranks in ((SILENT, silent), (STUCK, stuck), (WAITS, waiting)):
        if ranks:
            more = f", and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
            lines.append(f"{kind}: {', '.join(ranks[:MOST_NAMED])}{more}.")
    return "The run hangs. " + " ".join(lines)


def describe(frame: FrameType | None) -> tuple[str, bool]:
    """Describe where a thread is: (file, line and function, whether it waits there for other ranks).

    The frame is the innermost one of this project, or of any library where there is none.
    """
    waits, innermost = False, frame
    while frame is not None:
        name = frame.f_code.co_filename
        waits |= any(part in name for part in WAITING)
        if not any(part in name for part in LIBRARIES):
            break
        frame = frame.f_back
    frame = frame or innermost
    if frame is None:
        return "no Python code", waits
    path = Path(frame.f_code.co_filename)
    return f"{path.parent.name}/{path.name}:{frame.f_lineno} in {frame.f_code.co_name}", waits
