"""Steps are traced, and a lack of memory is reported in one sentence."""

import gzip
import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from common.errors import ConfigurationError, RunStopped
from train.config import ProfileConfig
from train.health.profiling import HISTORY_ENTRIES, Profiler, explain_lack_of_memory, profiled_steps

CPU = torch.device("cpu")


@pytest.mark.parametrize(("steps", "expected"), [(None, []), ("3", [3]), ("3-5", [3, 4, 5])])
def test_steps_are_a_number_or_a_range(steps: str | None, expected: list[int]) -> None:
    assert list(profiled_steps(ProfileConfig(steps=steps))) == expected


@pytest.mark.parametrize("steps", ["a", "5-3", "0-2", "1-", "-3", "1-2-3"])
def test_no_range_is_one_sentence(steps: str) -> None:
    with pytest.raises(ConfigurationError, match=r"profile.steps=.* e.g. 100-105"):
        profiled_steps(ProfileConfig(steps=steps))


def test_the_steps_of_the_range_and_no_other_are_traced(tmp_path: Path) -> None:
    profiler = Profiler(ProfileConfig(steps="2-3"), tmp_path, 0, CPU)
    notes = []
    for step in (1, 2, 3, 4):
        profiler.begin(step)
        torch.ones(step, 7) @ torch.ones(7, 1)
        notes.append(profiler.end(step))
    assert [text is not None for text in notes] == [False, False, True, False]
    trace = tmp_path / "profile" / "rank_00000_steps_2-3.pt.trace.json.gz"
    assert str(trace) in str(notes[2]) and list(trace.parent.iterdir()) == [trace]
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    shapes = [event["args"]["Input Dims"][0] for event in events if event.get("name") == "aten::mm"]
    assert shapes == [[2, 7], [3, 7]]
    other = Profiler(ProfileConfig(steps="2-3"), tmp_path, 1, CPU)
    other.begin(2)
    assert other.close() is None


def test_memory_that_does_not_suffice_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        RunStopped, match=r"Out of memory on rank 3: 4096.00 GiB more could not be had; this process held"
    ):
        with explain_lack_of_memory(ProfileConfig(), tmp_path, 3, CPU):
            torch.empty(2**42, dtype=torch.uint8).fill_(0)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        with explain_lack_of_memory(ProfileConfig(), tmp_path, 3, CPU):
            torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize(("wanted", "device"), [(True, "cuda"), (False, "cuda"), (True, "cpu")])
def test_the_history_of_memory_is_recorded_until_training_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool, device: str, failing: bool
) -> None:
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    with (
        suppress(KeyError),
        explain_lack_of_memory(ProfileConfig(memory_history=wanted), tmp_path, 0, torch.device(device)),
    ):
        expected = [{"max_entries": HISTORY_ENTRIES}] if wanted and device == "cuda" else []
        assert calls == expected
        if failing:
            raise KeyError
    assert calls == expected + [{"enabled": None}] * len(expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_leaves_a_snapshot(tmp_path: Path) -> None:
    device = torch.device("cuda")
    with pytest.raises(RunStopped, match="a snapshot is in"):
        with explain_lack_of_memory(ProfileConfig(memory_history=True), tmp_path, 0, device):
            held = torch.ones(2**20, device=device)
            torch.empty(2**42, dtype=torch.uint8, device=device)
            del held
    assert (tmp_path / "profile" / "rank_00000_out_of_memory.pickle").stat().st_size > 0
