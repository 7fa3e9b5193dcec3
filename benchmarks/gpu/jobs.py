"""Run each measurement in a process of its own, within a time limit: one that fails or hangs ends alone."""

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

OVERHEAD_S = 5.0  # a process with less time than this is not started


class Clock:
    """The seconds that a run may still take."""

    def __init__(self, minutes: float) -> None:
        self.ends = time.monotonic() + 60 * minutes

    @property
    def left_s(self) -> float:
        """Return the seconds that are left."""
        return self.ends - time.monotonic()


def run_job(function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], limit_s: float) -> dict[str, Any]:
    """Call `function(*arguments)` in a new process; return its result with `took_s`, or {"failed": cause}."""
    if limit_s < OVERHEAD_S:
        return {"failed": "not run: no time was left"}
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(theirs, function, arguments), daemon=True)
    began = time.monotonic()
    process.start()
    theirs.close()
    try:
        found = mine.recv() if mine.poll(limit_s) else {"failed": f"no result within {limit_s:.0f} s"}
    except EOFError:
        process.join(5)
        found = {"failed": f"the process ended with exit code {process.exitcode}"}
    process.kill()
    process.join()
    return found | {"took_s": round(time.monotonic() - began, 2)}


def _serve(pipe: Connection, function: Callable[..., dict[str, Any]], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send(function(*arguments))
    except BaseException as error:
        traceback.print_exc()
        pipe.send({"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
