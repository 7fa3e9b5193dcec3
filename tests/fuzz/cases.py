"""Find a case by kind, seed and number, and run it."""

import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data.corpus_text import corpus_texts
from data.tokenizer import train_tokenizer
from tests.fuzz import processes, settings, shards
from tests.unit.data.conftest import COMPONENTS, write_source

Run = Callable[[np.random.Generator, Path, Path], str]
KINDS: dict[str, Run] = {"shards": shards.run, "settings": settings.run, "processes": processes.run}


class Corpus:
    """Make a small corpus with a tokenizer, which no case changes."""

    def __init__(self, folder: Path) -> None:
        self.root, self.tokenizer = folder / "corpus", folder / "corpus" / "tokenizer.model"
        for name in dict.fromkeys(name for name, *_ in COMPONENTS):
            write_source(self.root, name, shards=1)
            write_source(self.root, name, shards=1, samples=5, split="validation")
        train_tokenizer(corpus_texts(self.root), self.tokenizer, vocab_size=700)


def fails(kind: str, seed: int, number: int, folder: Path, corpus: Corpus) -> tuple[str, str | None]:
    """Run one case in `folder`, which it makes; return (how it ended, what was wrong or None)."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng([seed, list(KINDS).index(kind), number])
    try:
        return KINDS[kind](rng, folder, corpus.root if kind == "settings" else corpus.tokenizer), None
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return "failed", f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
