"""Every collective of one real rank of many is planned, count and bytes, on a model of two layers."""

import json
from pathlib import Path

import pytest

from benchmarks.one_rank import run
from benchmarks.scale import differences, predicted
from benchmarks.world import run_world
from parallel.distributed import stop

SMALL = (
    "vit=base vit.depth=2 mt5=small mt5.num_encoder_layers=2 mt5.num_decoder_layers=2 mt5.vocab_size=2048 "
    "data.encoder_length=264 data.decoder_length=16 data.images_per_row=1 model.loss_chunk=12 "
    "parallel.micro_batch_size=1 micro_batches=2 steps=1 world_size=16 rank=3"
)
LAYOUTS = (
    "parallel.zero_stage=0 parallel.tensor=2 phases=full_224",
    "parallel.zero_stage=1 parallel.tensor=2 parallel.sequence=true phases=full_224 parallel.recompute=block",
    "parallel.zero_stage=2 parallel.reduce=micro_batch parallel.reduce_dtype=bf16 parallel.tensor=2",
    "parallel.zero_stage=3 parallel.pipeline=2 parallel.reduce=micro_batch run.precision=fp32",
    "parallel.zero_stage=3 parallel.tensor=2 parallel.sequence=true parallel.shard_frozen=true",
    "parallel.zero_stage=1 parallel.pipeline=2 parallel.virtual_stages=2 micro_batches=3 rank=11 optimizer=adamw",
    "parallel.zero_stage=1 parallel.pipeline=4 parallel.tensor=2 parallel.sequence=true rank=2",  # only frozen units
    "parallel.zero_stage=1 parallel.tensor=2 parallel.replicate_frozen_vit=true parallel.micro_batch_size=2",
)


def words(layout: str) -> list[str]:
    """Return the words of `benchmarks.one_rank`; those of the layout replace earlier ones."""
    return [*{word.partition("=")[0]: word for word in f"{SMALL} {layout}".split()}.values()]


def run_all(folder: Path) -> None:
    """Run a rank of every layout, one after the other, and write what it sent."""
    for number, layout in enumerate(LAYOUTS):
        stop()  # the world of the layout before
        found = run(words(layout))[1].to_dict()
        (folder / f"{number}.json").write_text(json.dumps(found["collectives"]), encoding="utf-8")


@pytest.fixture(scope="module")
def sent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the collectives of every layout."""
    folder = tmp_path_factory.mktemp("sent")
    run_world(1, run_all, folder)
    return folder


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=LAYOUTS)
def test_collectives_are_those_of_the_plan(number: int, sent: Path) -> None:
    found = json.loads((sent / f"{number}.json").read_text(encoding="utf-8"))
    planned = predicted(words(LAYOUTS[number]))[1]
    assert found and differences(found, planned) == "equal"
    kind, ranks, calls, size = found[0]
    wrong = [[kind, ranks, calls + 1, size], *found[1:]]
    assert differences(wrong, planned).startswith(f"{kind} of {ranks}: ({calls + 1}, ")
