"""A small corpus for the tests that start whole runs."""

from pathlib import Path

import pytest

from benchmarks import world
from data.corpus_text import corpus_texts
from data.miniature.config import MiniatureConfig
from data.miniature.corpus import make_corpus
from data.tokenizer import train_tokenizer

world.preloaded.append("tests.distributed.problem")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(MiniatureConfig(folder=str(folder), scale=0.005, languages=["en", "de"], workers=1))
    train_tokenizer(corpus_texts(folder, "train"), folder / "tokenizer.model", 600)
    return folder
