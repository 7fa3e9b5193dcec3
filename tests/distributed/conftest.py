"""A small corpus for the tests that start whole runs."""

from pathlib import Path

import pytest

from benchmarks import world
from data.corpus_text import corpus_texts
from data.miniature.config import MiniatureConfig
from data.miniature.corpus import make_corpus
from data.tokenizer import train_tokenizer


def pytest_collection_finish(session: pytest.Session) -> None:
    """Let the server of ranks import what they run: each rank would import it again, with all that it imports."""
    modules = {item.module for item in session.items if isinstance(item, pytest.Function)}
    world.preloaded += sorted(module.__name__ for module in modules if hasattr(module, "run_world"))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(MiniatureConfig(folder=str(folder), scale=0.005, languages=["en", "de"], workers=1))
    train_tokenizer(corpus_texts(folder, "train"), folder / "tokenizer.model", 600)
    return folder
