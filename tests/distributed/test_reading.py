"""Four ranks of one replica (tensor 2 x pipeline 2) read as one: who decodes, and what each is told."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from data import images
from data.config import ComponentConfig, DataConfig, MixtureConfig
from data.ledger import ErrorBudgetExceeded
from data.tokenizer import Tokenizer
from parallel.config import ParallelConfig
from parallel.launch import launch
from parallel.layout import Layout
from tests.distributed.world import results_file, run_world
from train.config import RunConfig
from train.reading import ReplicaReader, told
from train.steps import as_tensors

RANKS = 4


def read_all(folder: Path, corpus: Path) -> None:
    config = RunConfig(
        data=DataConfig(
            root=str(corpus),
            tokenizer=str(corpus / "tokenizer.model"),
            batch_examples=8,
            num_streams=2,
            encoder_length=300,
            decoder_length=32,
        ),
        mixture=MixtureConfig([ComponentConfig("vq2a", "vqa", 1.0)]),
        parallel=ParallelConfig(tensor=2, pipeline=2, micro_batch=2, timeout_s=60),
    )
    layout = Layout(config.parallel, launch())
    with patch.object(images, "decode", wraps=images.decode) as decode:
        reader = ReplicaReader(config, layout, Tokenizer(config.data.tokenizer), config.mixture, "train", prefetch=0)
        step = reader.read(3)
        held_out = list(reader.held_out(2, 5))
        reader.close()
    try:
        told(over_budget, layout)
        ended = ""
    except ErrorBudgetExceeded as error:
        ended = str(error)
    torch.save(
        {
            "decoded": decode.call_count,
            "step": [vars(as_tensors(rows)) for rows in step.rows],
            "texts": [(info.input_text, info.target_text) for info in step.infos],
            "held out": [vars(as_tensors(rows)) for reading in held_out for rows in reading.rows],
            "ended": ended,
        },
        results_file(folder, str(layout.rank)),
    )


def over_budget() -> None:
    raise ErrorBudgetExceeded("most are in shard x.tar")


@pytest.fixture(scope="module")
def results(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("reading")
    run_world(RANKS, read_all, folder, corpus)
    return [torch.load(results_file(folder, str(rank))) for rank in range(RANKS)]


def test_pictures_are_decoded_once(results: list[dict[str, Any]]) -> None:
    first, *others = (each["decoded"] for each in results)
    assert first == 8 + 5 and others == [0, 0, 0]


@pytest.mark.parametrize("what", ["step", "held out"])
def test_texts_are_told_to_all_and_pixels_to_the_first_stage(results: list[dict[str, Any]], what: str) -> None:
    assert results[0][what] and all(each["texts"] == results[0]["texts"] for each in results)
    assert any(batch["images"].any() for batch in results[0][what])
    for rank in range(1, RANKS):
        for expected, found in zip(results[0][what], results[rank][what], strict=True):
            for name in expected.keys() - {"images", "statistics", "loss_scale"}:
                assert torch.equal(found[name], expected[name]), (rank, name)
            pixels = expected["images"] if rank < 2 else expected["images"][..., :0]
            assert torch.equal(found["images"], pixels)


def test_all_learn_what_ends_the_reading(results: list[dict[str, Any]]) -> None:
    assert [each["ended"] for each in results] == ["most are in shard x.tar"] * RANKS
