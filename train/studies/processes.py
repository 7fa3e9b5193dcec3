"""Run the sweeps of a study, some side by side, each with a log of its own."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from common.errors import EXIT_INTERRUPTED, Interrupted, RunStopped

POLL_S = 5.0


def run_side_by_side(
    commands: Sequence[Sequence[str]], logs: Sequence[Path], ranks: int, look: Callable[[], None]
) -> None:
    """Run the modules with their words at once, until all have ended; call `look` every few seconds.

    Raises Interrupted where one was interrupted and saved, RunStopped where one failed; the sentence names its log.
    """
    started = []
    try:
        for command, log in zip(commands, logs, strict=True):
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                started.append(subprocess.Popen([*launcher(ranks), *command], stdout=file, stderr=subprocess.STDOUT))
        while any(process.poll() is None for process in started):
            time.sleep(POLL_S)
            look()
    finally:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)  # a run saves a checkpoint first
        for process in started:
            process.wait()
    failed = [(process.returncode, log) for process, log in zip(started, logs, strict=True) if process.returncode]
    for code, log in failed:
        again = "the same command goes on."
        if code in (EXIT_INTERRUPTED, -signal.SIGTERM, -signal.SIGINT):
            raise Interrupted(f"A sweep was interrupted ({log}); {again}")
        raise RunStopped(f"A sweep ended with exit code {code}; read {log}, correct that, and {again}")


def launcher(ranks: int) -> list[str]:
    """Return the words before a module, for one process or several ranks on this machine."""
    if ranks == 1:
        return [sys.executable, "-m"]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]


def interrupt_on(numbers: Sequence[int]) -> None:
    """Raise KeyboardInterrupt for these signals, so that the sweeps are interrupted too, and save.

    SIGINT too: a shell starts a job in the background with SIGINT ignored.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    for number in numbers:
        signal.signal(number, interrupt)
