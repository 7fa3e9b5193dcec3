"""A tiny tokenizer, for tests that check a whole configuration; and `meta` in the place of a GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.tokenizer import train_tokenizer


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer(["a red circle and a blue square"] * 10, path, 400)
    return path


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Yield the waits for the device, by line of source, of a test in which `meta` takes the place of the GPU."""
    from tests.unit.gpu_on_meta import meta_as_gpu  # loads torch -> only tests that use it pay for it

    with meta_as_gpu(monkeypatch) as found:
        yield found
