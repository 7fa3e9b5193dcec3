"""Two replicas of four ranks (tensor 2 x pipeline 2) read as one each: which ranks decode, and what each receives."""

import re
import shutil
import socket
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from benchmarks.world import results_file, run_world
from common.errors import ConfigurationError
from data import images
from data.config import ComponentConfig, DataConfig
from data.error_budget import ErrorBudgetExceeded
from data.packing import Rows
from data.stream import StepData
from data.tokenizer import Tokenizer
from parallel.config import ParallelConfig
from parallel.distributed import launch
from parallel.layout import Layout
from train.config import RunConfig, RunSettings
from train.settings.facts import check_settings_of_ranks
from train.step.batch import to_tensors
from train.step.reader import ReplicaReader, read_and_broadcast
from train.step.reduction import in_lockstep
from train.step.step_reader import StepReader

RANKS = 8
REPLICAS = [(0, 1, 4, 5), (2, 3, 6, 7)]  # tensor next to each other, then data, then pipeline


def read_all(folder: Path, corpus: Path) -> None:
    differ: list[str | None] = []
    config = RunConfig(
        data=DataConfig(
            root=str(corpus),
            tokenizer=str(corpus / "tokenizer.model"),
            global_batch_size=8,
            num_streams=2,
            encoder_length=300,
            decoder_length=32,
        ),
        mixture={"vqa": ComponentConfig("vq2a", "vqa", 1.0)},
        parallel=ParallelConfig(tensor=2, pipeline=2, micro_batch_size=2, timeout_s=60),
    )
    this = launch()
    for own in (
        replace(config, run=RunSettings(seed=int(this.rank == 2))),
        replace(config, data=DataConfig(root=str(this.rank))),
        replace(config, parallel=replace(config.parallel, tensor=4 if this.rank == 3 else 2)),
    ):
        differ.append(refusal(check_settings_of_ranks, own, this))
    layout = Layout.start(config.parallel, this)
    with patch.object(images, "decode", wraps=images.decode) as decode:
        reader = ReplicaReader(config, layout, Tokenizer(config.data.tokenizer), config.mixture, "train", prefetch=0)
        step = StepReader(config, layout, reader).read(4)
        held_out = list(reader.held_out(2, 5))
        reader.close()
    ahead = [read_ahead(config, layout, [4, 5]), read_ahead(config, layout, [2, 3, 4], broken=3),
             read_ahead(config, layout, [4])]  # fmt: skip
    try:
        broken = partial(read_and_broadcast, over_budget if layout.data_parallel_rank else nothing, layout)
        list(in_lockstep(iter(broken, None), layout.device))
        ended = ""
    except ErrorBudgetExceeded as error:
        ended = str(error)
    differ.append(refusal(layout.broadcast_from_main, partial(broken_off, layout.rank)))
    if layout.rank == 2:
        more, tar = folder / "vq2a", next((corpus / "vq2a").glob("train-*.tar"))
        more.mkdir()
        for number in (0, 1):
            shutil.copy(tar, more / f"train-{number:05d}.tar")
    for rank, root in ((2, folder), (2, folder / "nowhere")):
        own = replace(config, data=replace(config.data, root=str(root))) if layout.rank == rank else config
        differ.append(refusal(ReplicaReader, own, layout, Tokenizer(config.data.tokenizer), config.mixture, "train"))
    torch.save(
        {
            "differ": differ,
            "decoded": decode.call_count,
            "opened": reader._stream is not None,
            "step": [vars(batch) for batch in step.data.micro_batches],
            "stats": vars(step.stats),
            "ahead": ahead,
            "examples": [(info.objective, info.row, info.segment) for info in step.data.infos],
            "texts": [(info.input_text, info.target_text, info.key) for info in step.data.infos],
            "held out": [vars(to_tensors(rows)) for batch in held_out for rows in batch.micro_batches],
            "ended": ended,
        },
        results_file(folder, str(layout.rank)),
    )


def read_ahead(config: RunConfig, layout: Layout, steps: list[int], broken: int = 0) -> list[Any]:
    """Read steps that a thread prepares, and return each; reading of the second replica ends at step `broken`."""
    found: list[Any] = []
    with closing(ReplicaReader(config, layout, Tokenizer(config.data.tokenizer), config.mixture, "train")) as reader:
        if broken and layout.data_parallel_rank and layout.is_replica_leader:
            read = reader.reader.read
            reader.reader.read = lambda step: over_budget() if step == broken else read(step)  # type: ignore
        with suppress(ErrorBudgetExceeded), StepReader(config, layout, reader) as ahead:
            try:
                for step in steps:
                    one = ahead.read(step)
                    found.append(([vars(batch) for batch in one.data.micro_batches], vars(one.stats)))
            except ErrorBudgetExceeded as error:
                found.append(str(error))
                raise
    return found


def refusal(work: Callable[..., object], *arguments: Any) -> str | None:
    """The sentence that it ends with, if it does."""
    try:
        work(*arguments)
    except ConfigurationError as error:
        return str(error)
    return None


def broken_off(rank: int) -> None:
    raise ConfigurationError(f"rank {rank} cannot read left_out.json")


def nothing() -> StepData[Rows]:
    return StepData([], [])


def over_budget() -> StepData[Rows]:
    raise ErrorBudgetExceeded("most are in shard x.tar")


@pytest.fixture(scope="module")
def results(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("reading")
    run_world(RANKS, read_all, folder, corpus)
    return [torch.load(results_file(folder, str(rank))) for rank in range(RANKS)]


def test_images_are_decoded_once(results: list[dict[str, Any]]) -> None:
    decoded = [each["decoded"] for each in results]
    first, second = decoded[0], decoded[2]
    assert first + second == 8 + 5 and first and second
    assert decoded == [first, 0, second, 0, 0, 0, 0, 0]
    assert [each["opened"] for each in results] == [True, False, True, False, False, False, False, False]


@pytest.mark.parametrize("what", ["step", "held out"])
@pytest.mark.parametrize("replica", REPLICAS)
def test_ids_are_sent_to_all_pixels_to_the_first_stage_and_texts_to_nobody(
    results: list[dict[str, Any]], replica: tuple[int, ...], what: str
) -> None:
    first, *others = (results[rank] for rank in replica)
    assert any(batch["images"].any() for batch in first[what])
    for number, other in enumerate(others, 1):
        assert other["examples"] == first["examples"] and all(map(all, first["texts"]))
        assert not any(map(any, other["texts"]))
        for expected, found in zip(first[what], other[what], strict=True):
            for name in expected.keys() - {"images", "dropout_seed"}:
                assert torch.equal(found[name], expected[name]), (number, name)
            pixels = expected["images"] if number == 1 else expected["images"][..., :0]
            assert torch.equal(found["images"], pixels)


def test_what_a_thread_prepares_is_what_is_read_without_one(results: list[dict[str, Any]]) -> None:
    """After an error too, whose thread has ended on all ranks: the next one uses the same groups."""
    for each in results:
        first, ended, again = each["ahead"]
        for batches, stats in (first[0], again[0]):
            assert stats.pop("times").shape == (0, 3)
            assert stats == {name: value for name, value in each["stats"].items() if name != "times"}
            assert stats["num_micro_batches"] >= len(batches) > 0 and stats["num_targets"] > 0
            for expected, found in zip(each["step"], batches, strict=True):
                tensors = expected.keys() - {"dropout_seed"}
                assert all(torch.equal(found[name], expected[name]) for name in tensors)
        assert len(first) == 2 and len(ended) == 2 and ended[1] == "most are in shard x.tar"
    assert len({str(each["stats"]) for each in results}) == 1, "all ranks agree"


def test_all_learn_what_ends_the_reading(results: list[dict[str, Any]]) -> None:
    """Those of the replica where reading ended, first of all; those of the other as they go on together."""
    assert [each["ended"] for each in results] == ["most are in shard x.tar"] * RANKS


def test_ranks_with_other_settings_or_shards_are_named_on_all(results: list[dict[str, Any]]) -> None:
    settings, places, parallel, first, more, none = (
        set(each) for each in zip(*(result["differ"] for result in results), strict=True)
    )
    host = socket.gethostname()
    assert settings == {
        f"rank 2 on {host} was started with run.seed=1, rank 0 with run.seed=0; start all ranks with the same settings."
    }
    (sentence,) = parallel
    assert sentence.startswith(f"rank 3 on {host} was started with parallel.tensor=4, rank 0 with parallel.tensor=2;")
    assert places == {None}, "a node may have its own copy of the shards elsewhere"
    assert first == {"rank 0 cannot read left_out.json"}, "what ends the main rank ends all"
    (sentence,) = more
    pattern = (
        rf"rank 2 on {host} has ([\d,]+) records in 2 shards \(fingerprint \w+\) of vq2a \(train\), rank 0 has [\d,]+ "
    )
    assert re.match(pattern, sentence) and "give every node the same shards" in sentence
    (sentence,) = none
    assert "nowhere/vq2a" in sentence
