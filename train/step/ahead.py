"""Prepare steps ahead of their use, in one thread and in the order of their use."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Generic, TypeVar

from common.progress import waiting_for

Prepared = TypeVar("Prepared")
GRACE_S = 5.0  # for the thread's last collectives where an error ends this process


class Ahead(Generic[Prepared]):
    """Call `prepare` for the next steps in a thread, which may run collectives: all ranks request the same steps.

    An exception is raised by `read` of its step, and of all later ones, because other ranks wait in the collectives
    that this rank has left.
    """

    def __init__(self, prepare: Callable[[int], Prepared], steps: int) -> None:
        """Start nothing yet; `steps`: number of steps to prepare ahead, 0 prepares each in the thread that reads it."""
        self._prepare, self._steps = prepare, steps
        self._requests = SimpleQueue[tuple[int, Future[Prepared]] | None]()
        self._prepared: dict[int, Future[Prepared]] = {}
        # A daemon: it may wait for a rank that has died, and the end of this process waits for no daemon.
        self._thread = threading.Thread(target=self._run, name="steps ahead", daemon=True)
        self.closing = False
        """Whether nothing that is still prepared will be read."""

    def read(self, step: int) -> Prepared:
        """Return a step; any order of steps is possible, consecutive steps are the fastest."""
        if not self._steps:
            return self._prepare(step)
        if self._thread.ident is None:
            self._thread.start()
        wanted = range(step, step + self._steps + 1)
        for stale in [ahead for ahead in self._prepared if ahead not in wanted]:
            del self._prepared[stale]  # not canceled -> all ranks run the same collectives
        for ahead in wanted:
            if ahead not in self._prepared:
                self._prepared[ahead] = Future()
                self._requests.put((ahead, self._prepared[ahead]))
        with waiting_for(self._thread.ident):
            return self._prepared.pop(step).result()

    def close(self, together: bool) -> None:
        """End the thread.

        `together`: all ranks close after the same `read`, so that what is still prepared ends, and this call waits for
        it. Otherwise it waits for `GRACE_S` at most.
        """
        self.closing = True
        self._requests.put(None)
        if self._thread.is_alive():
            self._thread.join(None if together else GRACE_S)

    def _run(self) -> None:
        failed: BaseException | None = None
        while (request := self._requests.get()) is not None:
            step, future = request
            try:
                if failed is not None:
                    raise failed
                future.set_result(self._prepare(step))
            except BaseException as error:
                failed = error
                future.set_exception(error)
