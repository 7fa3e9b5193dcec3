"""The worked example of docs/data.md is what the code computes."""

from pathlib import Path

import pytest

from data.config import ComponentConfig, DataConfig
from data.corpus_text import corpus_texts
from data.examples import ExampleInfo
from data.miniature.config import MiniatureConfig
from data.miniature.corpus import make_corpus
from data.stream import Stream
from data.tokenizer import train_tokenizer

DOCS = Path(__file__).parents[3] / "docs" / "data.md"
STREAMS, STREAMS_PER_RANK, EXAMPLES_PER_STREAM = 4, 2, 2


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    root = tmp_path_factory.mktemp("worked")
    make_corpus(MiniatureConfig(folder=str(root), scale=0.02, languages=["en"], workers=1))
    tokenizer = train_tokenizer(corpus_texts(root, "train"), root / "tokenizer.model", 1000)
    data = DataConfig(
        root=str(root), tokenizer=tokenizer.path, global_batch_size=STREAMS * EXAMPLES_PER_STREAM,
        num_streams=STREAMS, encoder_length=52, decoder_length=24, images_per_row=2,
    )  # fmt: skip
    mixture = {
        "webli/split_captioning": ComponentConfig("webli", "split_captioning", 3.0),
        "vq2a/vqa": ComponentConfig("vq2a", "vqa", 1.0),
    }
    return Stream(data, mixture, tokenizer, 56, 4, "train", seed=40)


def documented() -> list[list[str]]:
    section = DOCS.read_text(encoding="utf-8").partition("### A worked example")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_is_what_two_ranks_read(stream: Stream) -> None:
    def name(info: ExampleInfo) -> tuple[str, str, str]:
        return info.component, info.key, info.input_text

    numbers = {name(info): number for number, info in enumerate(stream.rows(1, range(STREAMS))[1])}
    streams = {name(info): n for n in range(STREAMS) for info in stream.rows(1, range(n, n + 1))[1]}
    assert len(numbers) == len(streams) == STREAMS * EXAMPLES_PER_STREAM
    found = []
    for rank in range(STREAMS // STREAMS_PER_RANK):
        _, infos = stream.rows(1, range(rank * STREAMS_PER_RANK, (rank + 1) * STREAMS_PER_RANK))
        for info in infos:
            number = numbers[name(info)]
            found.append((number, info.component, streams[name(info)], rank, info.row, info.segment))
    assert [[*map(str, place)] for place in sorted(found)] == documented()
