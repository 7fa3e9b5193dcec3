"""Ends a process that makes no progress, and names the peers that died or hang: nobody waits for them for ever."""

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
from typing import BinaryIO

import psutil

from common import progress
from common.errors import EXIT_HUNG, PeerLost
from train.health.background import Errand, within
from train.health.heartbeat import Heartbeat, Heartbeats

# Errors of gloo and NCCL after the other end is gone.
SIGNS_OF_A_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused",
                        "remote process exited", "Socket closed")  # fmt: skip
MOST_NAMED = 8  # ranks of one kind in the message of a hang
LONGEST_TICK_S = 5.0
SHORT_TICK_S, SHORT_TICKS_S = 1.0, 60.0  # at first, so that a run that has just begun can be looked at
STALL_S = 60.0  # without an answer of the run's folder, before a message
TICKS_BEFORE, TICKS_OVER = 5, 14  # the end begins so long before timeout_s, and takes at most so long
SMALL_WORLD = 32  # ranks; in a larger one few of them read the signs of life of all
MOST_STACKS = 2**20  # bytes; a file of stacks that is larger is put aside, and replaces the one before it
STDERR = 2  # by number: its Python object has a lock, which a blocked thread may hold
WAITING = (
    "torch/distributed/",
    "deepspeed/comm/",
    "parallel/communication_time.py",
)  # a frame of these waits for other ranks
LIBRARIES = ("site-packages", "dist-packages", f"lib/python{sys.version_info.major}.", "parallel/communication_time.py")


class Watchdog:
    """End the process if `progress.beat` is not called for `timeout_s` seconds; a thread checks it.

    Without a beat, every rank (each has its own watchdog) prints the stacks of its threads, to stderr and to `stacks/`
    in the run's folder, and ends with exit code 4: a collective that waits for a dead peer cannot be interrupted in any
    other way. The first of these ranks names the ranks that hang, that wait, and that do not answer; a process of the
    same launcher and machine that does not answer is killed, because it cannot end itself. All of this ends before
    `timeout_s` is over. A rank whose launcher has died gets a SIGTERM, because nothing else would end it. A process in
    which no Python thread can run (native code that keeps the interpreter's lock) is ended by a timer in C, which dumps
    its stacks too, with exit code 1.

    The watching thread touches no disk: files and pipes are written by `train/health/background.py`. A disk that does
    not answer ends no run that makes progress, and delays the end of one that hangs by a few ticks. If the dump of the
    timer in C itself is blocked, SIGALRM ends the process.

    If a collective fails because a peer has died, the context raises PeerLost, which names that peer.
    """

    def __init__(self, timeout_s: float, folder: Path, rank: int = 0, world_size: int = 1) -> None:
        """`folder`: the run's."""
        self.timeout_s, self.tick_s = timeout_s, min(LONGEST_TICK_S, timeout_s / 20)
        self.heartbeats = Heartbeats(folder, rank, world_size, fresh_s=3 * self.tick_s)
        self.stacks_path = folder / "stacks" / f"rank_{rank:05d}.txt"
        self.stacks_file: BinaryIO | None = None
        self.opening = Errand("stacks", self._open_stacks)
        self.place, self.left = "start-up", threading.Event()
        self.stalled, self.stall_reported, self.sees_far = False, False, True
        self.launcher = os.getppid() if world_size > 1 else None  # one process may well outlive the shell it came from

    def __enter__(self) -> "Watchdog":
        self.left.clear()
        self.watched = threading.get_ident()
        self.begun = time.monotonic()
        self.beat("start-up")
        progress.listeners.append(self.beat)
        self.opening.start()
        self.opening.wait(self.tick_s)
        self._set_timers(self.timeout_s)  # not left to the thread, which native code may keep from ever starting
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self.thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, trace: TracebackType | None) -> None:
        lost = self._lost(error, trace) if error and what_broke(error) else None  # while the thread still beats
        progress.listeners.remove(self.beat)
        self.left.set()
        self.thread.join()
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        within(self.tick_s, self._close_stacks)
        self.heartbeats.close(self.tick_s)
        if lost:
            raise PeerLost(lost) from error

    def beat(self, place: str = "") -> None:
        """Record progress of the thread that entered; `place` names its next activity, for the message."""
        if threading.get_ident() == self.watched:
            self.place, self.last_beat = place or self.place, time.monotonic()

    def _watch(self) -> None:
        own = self.heartbeats.own
        while not self.left.is_set():
            own.place, own.progress_s_ago = self.place, round(time.monotonic() - self.last_beat, 1)
            if own.progress_s_ago > self.timeout_s - TICKS_BEFORE * self.tick_s:
                self._end()
            self.heartbeats.beat()
            self._look_at_disk()
            if self.launcher not in (None, os.getppid()):
                self.launcher = None
                text = f"The launcher of {own} has died; this process saves and ends.\n"
                within(self.tick_s, partial(write_all, STDERR, text))
                os.kill(own.process, signal.SIGTERM)
            self._set_timers(self.timeout_s)
            young = time.monotonic() - self.begun < SHORT_TICKS_S
            self.left.wait(min(self.tick_s, SHORT_TICK_S) if young else self.tick_s)

    def _set_timers(self, seconds: float) -> None:
        """Set timers in C: dump all stacks and end the process after `seconds`; end it a little later in any case."""
        file = STDERR if self.stacks_file is None or self.stalled else self.stacks_file.fileno()
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)
        signal.setitimer(signal.ITIMER_REAL, seconds + 2 * self.tick_s)

    def _look_at_disk(self) -> None:
        """Print once that the run's folder does not answer, and once that it does again."""
        folder, busy_s = self.heartbeats.folder.parent, max(self.heartbeats.far.busy_s, self.opening.busy_s)
        self.stalled, silent = busy_s > 4 * self.tick_s, busy_s > min(STALL_S, self.timeout_s)
        if silent != self.stall_reported:
            self.stall_reported = silent
            text = f"{folder} has not answered for {busy_s:.0f} s" if silent else f"{folder} answers again"
            within(self.tick_s, partial(write_all, STDERR, f"{text}; training goes on.\n"))

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
            if empty:  # nothing hung, in this process or before it
                self.stacks_path.unlink(missing_ok=True)

    def _report(self, text: str) -> None:
        """Write a text to stderr first, then to the file of stacks."""
        within(self.tick_s, partial(write_all, STDERR, text))
        if self.stacks_file is not None:
            within(self.tick_s, partial(write_all, self.stacks_file.fileno(), text))

    def _end(self) -> None:
        own = self.heartbeats.own
        self._set_timers(TICKS_OVER * self.tick_s)
        own.frame, own.waits = describe(sys._current_frames().get(self.watched))
        self._report(
            f"{_capitalized(own)} made no progress for {own.progress_s_ago:.0f} s "
            f"(parallel.timeout_s={self.timeout_s:g}): {own.place}; its threads:\n{all_stacks()}"
        )
        within(self.tick_s, self.heartbeats.write)
        known = self._others()
        for _ in range(3):  # long enough for every rank that lives to beat again, and to hang as well
            time.sleep(self.tick_s)
            self.heartbeats.beat()
        now = self._others()
        if may_print(own.rank) and not any(
            beat.frame is not None for rank, beat in now.items() if beat and rank < own.rank and may_print(rank)
        ):
            run = self.heartbeats.folder.parent
            unseen = "" if self.sees_far else f" {run} does not answer: no other machine is seen."
            self._report(f"{verdict(own, known, now)}{unseen}\n")
        for rank, beat in now.items():
            if beat is not None and not answers(known.get(rank), beat):
                kill_sibling(own, beat)
        os._exit(EXIT_HUNG)

    def _lost(self, error: BaseException, trace: TracebackType | None) -> str:
        """Describe the other end of a broken connection, as far as its signs of life show."""
        own, file = self.heartbeats.own, self.stacks_file
        if file is not None:
            within(self.tick_s, lambda: write_all(file.fileno(), "".join(traceback.format_exception(error))))
        own.frame, own.waits = describe(innermost(trace))  # shows the others that this rank is not the dead one
        within(self.tick_s, self.heartbeats.write)
        known = self._others()
        silent = [beat for beat in known.values() if beat and is_gone(own, beat)]
        if not silent:
            time.sleep(4 * self.tick_s)
            silent = [beat for rank, beat in self._others().items() if beat and not answers(known.get(rank), beat)]
        who = ", ".join(f"{beat} (last seen: {beat.place})" for beat in silent[:MOST_NAMED])
        return (
            f"{_capitalized(own)} lost a peer at {own.frame} ({self.place}). "
            + (f"Does not answer, stopped or dead: {who}." if who else "Every rank that it can see still answers.")
            + f" The connection reported: {what_broke(error)} (traceback: {self.stacks_path})"
        )

    def _others(self) -> dict[int, Heartbeat | None]:
        """Read the signs of life of other ranks; only those of this machine if the run's folder does not answer."""
        own, size = self.heartbeats.own.rank, self.heartbeats.world_size
        looks_far = may_print(own) or size <= SMALL_WORLD
        found = within(2 * self.tick_s, self.heartbeats.read) if looks_far else None
        self.sees_far = found is not None
        everyone: dict[int, Heartbeat | None] = {**self.heartbeats.read_nearby(), **(found or {})}
        if found is not None:
            everyone = {rank: everyone.get(rank) for rank in range(size)}
        return {rank: beat for rank, beat in everyone.items() if rank != own}


def write_all(descriptor: int, text: str) -> None:
    """Write a text to a file or pipe; blocks where that does."""
    left = text.encode(errors="backslashreplace")
    while left:
        left = left[os.write(descriptor, left) :]


def all_stacks() -> str:
    """Return the stacks of all threads, through memory: faulthandler holds the interpreter's lock while it writes."""
    memory = os.memfd_create("stacks")
    try:
        faulthandler.dump_traceback(memory, all_threads=True)
        return os.pread(memory, os.fstat(memory).st_size, 0).decode(errors="replace")
    finally:
        os.close(memory)


def may_print(rank: int) -> bool:
    """Return whether a rank may print the verdict: 0, 1, 2, 4, 8 …, few enough to read every rank's file."""
    return rank & (rank - 1) == 0


def what_broke(error: BaseException | None) -> str | None:
    """Return a collective's message about a broken connection to another rank; None for any other error.

    The schedules of torch 2.13 raise errors of their own from it, and gloo's has no type of its own.
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


def is_gone(own: Heartbeat, other: Heartbeat) -> bool:
    """Return whether a rank on this machine has died without a last sign of life."""
    if other.host != own.host or other.frame is not None:
        return False
    try:
        return psutil.Process(other.process).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def innermost(trace: TracebackType | None) -> FrameType | None:
    """Return the frame in which an error was raised."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame if trace else None


def kill_sibling(own: Heartbeat, other: Heartbeat) -> None:
    """End a stopped process, if it is as in its heart-beat: a child of the launcher that started this process."""
    if other.host == own.host:
        with suppress(psutil.Error):
            process = psutil.Process(other.process)
            if process.ppid() == os.getppid():
                process.kill()


def answers(before: Heartbeat | None, now: Heartbeat | None) -> bool:
    """Return whether the rank has given a sign of life between two readings, or has reported its own end."""
    return now is not None and (before is None or now.beats > before.beats or now.frame is not None)


def verdict(own: Heartbeat, known: dict[int, Heartbeat | None], now: dict[int, Heartbeat | None]) -> str:
    """Return one sentence for each kind of rank: those that do not answer, that hang, that wait."""
    silent, still, waiting = [], [], []
    for rank, beat in sorted({**now, own.rank: own}.items()):
        if rank != own.rank and not answers(known.get(rank), beat):
            where = f"{beat} (last seen: {beat.place})" if beat else f"rank {rank} (never seen)"
            silent.append(where)
        elif beat is not None and beat.waits:
            waiting.append(f"{beat} at {beat.frame} ({beat.place})")
        elif beat is not None:
            still.append(f"{beat} at {beat.frame or 'an unknown place'} ({beat.place})")
    lines = []
    for what, ranks in (("Does not answer, stopped or dead", silent), ("Hangs", still), ("Waits", waiting)):
        if ranks:
            more = f", and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
            lines.append(f"{what}: {', '.join(ranks[:MOST_NAMED])}{more}.")
    return "The run hangs. " + " ".join(lines)


def describe(frame: FrameType | None) -> tuple[str, bool]:
    """Return (file, line and function of our innermost frame, whether it waits there for other ranks)."""
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
