"""Processes read what threads read; one that is killed is started again; what cannot be read ends in one sentence."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from common.errors import ReadingStopped, StorageFailed
from common.progress import listening
from data.error_budget import ErrorBudgetExceeded, Ledger
from data.reading import process, reader
from data.reading.reader import Reader
from data.shards.source import ShardSource
from data.stream import StepData, Stream
from tests.unit.data.conftest import IMAGE_SIZE, TOKENS_PER_IMAGE, mixture, png, record, write_shard


@pytest.fixture(scope="module")
def with_defects(corpus, tmp_path_factory):
    """The corpus, with a source whose third image is broken."""
    root = tmp_path_factory.mktemp("with_defects")
    shutil.copytree(corpus, root, dirs_exist_ok=True)
    samples = [(f"{number:02d}", record(number), png(number)[: 40 if number == 2 else None]) for number in range(6)]
    write_shard(root / "broken" / "train-00000.tar", samples)
    return root


def opened(data, tokenizer, root, **changes) -> Stream:
    data = replace(data, root=str(root), num_workers=1, **changes)
    components = (("broken", "captioning", 1), ("webli", "ocr", 1), ("text", "span_corruption", 1))
    return Stream(data, mixture(*components), tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "train", seed=7)


def same(left: StepData, right: StepData) -> None:
    assert left.infos == right.infos and left.skipped == right.skipped
    assert len(left.micro_batches) == len(right.micro_batches)
    for one, other in zip(left.micro_batches, right.micro_batches, strict=True):
        for name, array in one.items():
            assert np.array_equal(array, other[name]) and array.dtype == other[name].dtype, name


def test_a_process_reads_what_a_thread_reads_also_where_one_is_killed(data, tokenizer, with_defects, monkeypatch):
    threads = Reader(opened(data, tokenizer, with_defects), 1, 2, 3, prefetch=0)
    with closing(Reader(opened(data, tokenizer, with_defects), 1, 2, 3, prefetch=1)) as processes:
        kept = [processes.read(step) for step in (1, 2)]
        os.kill(processes._processes[0]._child.pid, signal.SIGKILL)
        kept += [processes.read(step) for step in (3, 4, 5)]
        skipped = [step.skipped for step in kept]
        assert {"broken/unreadable image": 1} in skipped  # counted once, by the step that it is in
        for step, data_of_step in enumerate(kept, start=1):  # earlier steps keep their memory
            same(threads.read(step), data_of_step)
        ended = processes._processes[0]._child
    ended.wait(10)
    monkeypatch.setattr(process, "START", "import os; os.kill(os.getpid(), 9)")
    with closing(Reader(opened(data, tokenizer, with_defects), 0, 1, 3, prefetch=1)) as killed:
        sentence = r"3 processes that read step 1 ended with signal 9 \(SIGKILL\).*data\.num_workers=1"
        with pytest.raises(ReadingStopped, match=sentence):
            killed.read(1)


def test_what_a_process_raises_is_raised_by_read(data, tokenizer, with_defects, tmp_path):
    shutil.copytree(with_defects, tmp_path / "own")
    stream = opened(data, tokenizer, tmp_path / "own", error_budget=0.0, error_budget_minimum=0, retry_s=1.5)
    waited: list[str] = []
    with closing(Reader(stream, 0, 1, 3, prefetch=1)) as processes, listening(waited.append):
        with pytest.raises(ErrorBudgetExceeded, match=r"source broken is over its error budget.*unreadable image"):
            for step in range(1, 9):
                processes.read(step)
        for path in (tmp_path / "own" / "webli").iterdir():  # an empty folder, as after a lost mount
            path.unlink()
        os.kill(processes._processes[0]._child.pid, signal.SIGKILL)
        with pytest.raises(StorageFailed, match=r"webli/train\.index could not be read for 1\.5 s"):
            processes.read(100)
    assert any(one.endswith("webli/train.index") and one.startswith("waiting for ") for one in waited)


def test_a_process_ends_with_the_one_that_it_reads_for(data, tokenizer, with_defects):
    """A killed trainer closes nothing."""
    stream = opened(data, tokenizer, with_defects)
    code = (
        "import pickle, sys, time\nfrom data.reading.process import ReadingProcess\n"
        "child = ReadingProcess(pickle.load(sys.stdin.buffer))\n"
        "print(len(child.read(1, range(4), 3)[1]), child._child.pid, flush=True)\ntime.sleep(60)"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert trainer.stdin and trainer.stdout
    pickle.dump(reader._recipe(stream), trainer.stdin)
    trainer.stdin.close()
    examples, child = map(int, trainer.stdout.readline().split())
    trainer.kill()
    trainer.wait()
    trainer.stdout.close()
    deadline = time.monotonic() + 200
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert examples > 0 and not os.path.exists(f"/proc/{child}")


def test_an_index_that_was_made_anew_is_not_taken_for_the_opened_one(corpus, tmp_path):
    shutil.copytree(corpus / "webli", tmp_path / "webli")
    shutil.copytree(corpus / "text", tmp_path / "text")
    source, other = (ShardSource(name, str(tmp_path / name), "train", Ledger(1, 1)) for name in ("webli", "text"))
    sent = pickle.dumps(source)
    assert len(sent) < 3000 and pickle.loads(sent)[3] == source[3]
    shutil.copy(other.index.path, source.index.path)
    with pytest.raises(StorageFailed, match="was made anew while it was in use"):
        pickle.loads(sent)


def test_an_index_that_cannot_be_kept_is_read_by_threads(data, tokenizer, with_defects, monkeypatch):
    stream = opened(data, tokenizer, with_defects)
    monkeypatch.setattr(stream.components[0].source.index, "path", "/nowhere")
    with pytest.warns(UserWarning, match=r"data\.num_workers=1 is not used: the index of source broken"):
        found = Reader(stream, 0, 1, 3, prefetch=1)
    same(found.read(1), Reader(opened(data, tokenizer, with_defects), 0, 1, 3, prefetch=0).read(1))
