"""A tiny tokenizer, for tests that check a whole configuration."""

from pathlib import Path

import pytest

from data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(["a red circle and a blue square"] * 10, path, 400)
    return path
