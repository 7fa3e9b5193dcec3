"""Settings of the miniature corpus."""

import math
from dataclasses import dataclass, field

from common.command_line import parse as arguments_of
from common.errors import ConfigurationError
from common.values import PATH
from data.miniature.language import CODES

VERSION = 7  # raise it when the same settings begin to give other bytes
SOURCES = ("webli", "cc3m_35l", "vq2a", "objects", "text")
SPLITS = ("train", "validation", "test")


@dataclass
class MiniatureConfig:
    """Hold the options of `python -m data.miniature key=value …`."""

    folder: str = field(default="runs/corpus", metadata=PATH)
    """Folder of the corpus. A miniature corpus of other options is replaced, anything else there is refused."""
    seed: int = 0
    """Number that the corpus follows from: the same options give the same bytes."""
    scale: float = 1.0
    """Factor of all numbers of records below."""
    image_size: int = 112
    """Pixels of an image's side. The default is four times the demo ViT's patch size of 28."""
    languages: list[str] = field(default_factory=lambda: list(CODES))
    """Codes of the languages of texts and questions; `data/miniature/languages` has a table for each."""
    workers: int = 0
    """Processes that make shards, 0 for one per processor core. It never changes a byte of the corpus."""
    webli: int = 10_000
    """Training records with an alt-text, most of them with a sign."""
    cc3m_35l: int = 8_000
    """Training records with captions in all languages."""
    vq2a: int = 20_000
    """Training records with questions: the most, because colors and shapes are learned from them."""
    objects: int = 8_000
    """Training records with objects and their boxes."""
    text: int = 6_000
    """Training records of text without an image."""
    evaluation: int = 300
    """Records of each validation and of each test split of a source."""
    shard_records: int = 1_000
    """Records of a shard, at most."""

    def check(self) -> None:
        """Raise ConfigurationError for a value that no corpus can be made with."""
        unknown = [code for code in self.languages if code not in CODES]
        if unknown or not self.languages:
            raise ConfigurationError(f"languages={self.languages} must name some of {', '.join(CODES)}.")
        if self.image_size < 56:
            raise ConfigurationError(
                f"image_size={self.image_size} pixels is too small to read a sign; use 56 or more."
            )
        if not 0 < self.scale < math.inf or self.shard_records < 1 or self.seed < 0 or self.workers < 0:
            raise ConfigurationError("scale and shard_records must be above 0, seed and workers at least 0.")
        if min(self.webli, self.cc3m_35l, self.vq2a, self.objects, self.text, self.evaluation) < 1:
            raise ConfigurationError("webli, cc3m_35l, vq2a, objects, text and evaluation must be at least 1.")

    def num_records(self, source: str, split: str) -> int:
        """Return the number of records of one split of one source, after scaling; at least one."""
        return max(1, round(self.scale * (getattr(self, source) if split == "train" else self.evaluation)))


def parse(arguments: list[str]) -> MiniatureConfig:
    """Read `key=value` words. Raises ConfigurationError for unknown keys, wrong types and impossible values."""
    config = arguments_of(arguments, MiniatureConfig)
    config.check()
    return config
