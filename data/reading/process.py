"""Read whole steps in a process of its own: the loop of the process, and its handle in the process that trains.

    parent                                      child: `main`
    Recipe                                 ->   opens the sources as the parent has opened them
    (step, streams, micro-batch size)      ->   Stream.rows, written into new shared memory
    rows of the step, a descriptor of it   <-   (several times before: what it waits for, for the watchdog)

The connection is a pair of sockets. Where one side ends, the other reads the end of the connection, so that a killed
process leaves neither a hang nor memory. Only own objects are sent; nothing of a shard is unpickled.
"""

import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from common.errors import ReadingStopped
from common.progress import beat, listening
from data.config import DataConfig, Mixture
from data.error_budget import Event, Recorder
from data.examples import ExampleInfo
from data.mixture import Source
from data.packing import Rows, RowShape
from data.reading.memory import make_rows, map_rows
from data.stream import Stream
from data.tokenizer import Tokenizer

# Not `-m`: the classes of a module that runs as __main__ are others than those of the parent.
START = "import sys; from data.reading.process import main; main(sys.argv[1:])"
BEAT_EVERY_S = 1.0
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)  # a launcher sends them to the whole group


@dataclass(frozen=True)
class Recipe:
    """Hold what makes a stream equal to the parent's: its arguments, and its opened sources by name."""

    data: DataConfig
    mixture: Mixture
    tokenizer: Tokenizer
    image_size: int
    tokens_per_image: int
    split: str
    seed: int
    sources: dict[str, Source]
    shape: RowShape  # of the stream's rows

    def make(self, ledger: Recorder) -> Stream:
        """Return the stream."""
        return Stream(
            self.data, self.mixture, self.tokenizer, self.image_size, self.tokens_per_image, self.split, self.seed,
            self.sources, ledger,
        )  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """Hold a step as a process has read it; the rows lie in the memory whose descriptor follows."""

    num_rows: int
    infos: list[ExampleInfo]
    counted: list[Event]


class ProcessEnded(Exception):
    """The process ended before it answered, as one does that is killed; `code` as `subprocess` has it."""

    def __init__(self, code: int) -> None:
        super().__init__(f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}")


class ReadingProcess:
    """Read steps in a child process; one call at a time."""

    def __init__(self, recipe: Recipe) -> None:
        """Start the process; it opens the sources while this one goes on."""
        self._shape = recipe.shape
        own, theirs = socket.socketpair()
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-c", START, str(theirs.fileno())],
                stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        self._socket, self._connection = own, Connection(os.dup(own.fileno()))
        self._recipe: Recipe | None = recipe

    def read(self, step: int, streams: range, micro_batch_size: int) -> tuple[Rows, list[ExampleInfo], list[Event]]:
        """Return the rows of streams in a step as `Stream.rows` does, and what was counted.

        Raises what the child raises, and ProcessEnded.
        """
        try:
            if self._recipe is not None:
                self._connection.send_bytes(pickle.dumps(self._recipe))
                self._recipe = None
            self._connection.send((step, streams, micro_batch_size))
            while isinstance(found := self._connection.recv(), str):
                beat(found)
            if isinstance(found, BaseException):
                raise found
            _, descriptors, _, _ = socket.recv_fds(self._socket, 1, 1)
            (descriptor,) = descriptors
        except (EOFError, ConnectionError, ValueError) as error:
            if isinstance(error, ValueError) and self._child.poll() is None:
                raise
            raise ProcessEnded(self._child.wait()) from error
        try:
            return map_rows(descriptor, found.num_rows, self._shape), found.infos, found.counted
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """End the process."""
        self._child.kill()
        self._child.wait()
        self._connection.close()
        self._socket.close()


class _Loop:
    """Answer requests in the child until the parent ends."""

    def __init__(self, descriptor: int) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._connection = Connection(os.dup(descriptor))
        self._sending, self._beat_s = threading.Lock(), 0.0

    def run(self) -> None:
        """Answer; raise EOFError or ConnectionError where the parent has ended."""
        recipe, ledger = self._connection.recv_bytes(), Recorder()
        stream: Stream | None = None
        with listening(self._beat):
            while True:
                step, streams, micro_batch_size = self._connection.recv()
                try:
                    stream = stream or pickle.loads(recipe).make(ledger)
                    self._answer(stream, ledger, step, streams, micro_batch_size)
                except (EOFError, ConnectionError):
                    raise
                except BaseException as error:
                    if not isinstance(error, ReadingStopped):
                        error.add_note(f"In a reading process:\n{traceback.format_exc()}")
                    ledger.take()
                    with self._sending:
                        self._connection.send(error)

    def _answer(self, stream: Stream, ledger: Recorder, step: int, streams: range, micro_batch_size: int) -> None:
        descriptors: list[int] = []

        def make(num_rows: int) -> Rows:
            descriptor, rows = make_rows(num_rows, stream.shape)
            descriptors.append(descriptor)
            return rows

        try:
            rows, infos = stream.rows(step, streams, micro_batch_size, make)
            with self._sending:
                self._connection.send(Answer(len(rows["encoder_tokens"]), infos, ledger.take()))
                socket.send_fds(self._socket, [b"."], descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _beat(self, activity: str) -> None:
        """Send what this process waits for, so that the watchdog of the parent counts it as progress."""
        now = time.monotonic()
        if now - self._beat_s >= BEAT_EVERY_S:
            self._beat_s = now
            with self._sending:
                self._connection.send(activity)


def main(arguments: Sequence[str]) -> None:
    """Read steps for the process at the other end of a socket, until it ends."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    try:
        _Loop(int(arguments[0])).run()
    except (EOFError, ConnectionError):
        return  # the parent has ended
