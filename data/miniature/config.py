"""Make the miniature corpus: five sources of drawn images and texts, as shards.

    python -m data.miniature folder=runs/corpus
    python -m data.miniature folder=runs/corpus scale=0.01 languages=[en,de]
    mpirun -n 8 python -m data.miniature folder=runs/corpus seed=1

A corpus of the same settings that is there already is left as it is. One of other settings is replaced,
unless its folder holds anything else, such as a tokenizer.
"""

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
    """Make the miniature corpus: five sources of drawn images and texts in 16 languages, as shards."""

    folder: str = field(default="runs/corpus", metadata=PATH)
    """Folder of the corpus. The default is where conf/data/miniature looks."""
    seed: int = 0
    """Seed of all records. 0 by default."""
    scale: float = 1.0
    """Factor on all numbers of records below. 1 by default: 0.2 GB, in minutes; tests take 0.01."""
    image_size: int = 112
    """Edge of an image, in pixels. 112 by default: the smallest with legible signs."""
    aligned: bool = False
    """Put signs on the cells of the grid whose crossings shapes lie near, label them, and give boxes in hundredths: a
    toy reads signs and writes boxes in minutes. False by default: signs lie anywhere, in 20 % of `objects` unlabeled.
    """
    languages: list[str] = field(default_factory=lambda: list(CODES))
    """Codes of the languages. All 16 by default."""
    workers: int = 0
    """Processes; the bytes do not depend on them. 0 by default: one for each core."""
    webli: int = 10_000
    """Training records of `webli`: alt-texts and signs."""
    cc3m_35l: int = 8_000
    """Training records of `cc3m_35l`: captions in several languages."""
    vq2a: int = 20_000
    """Training records of `vq2a`: questions and answers."""
    objects: int = 8_000
    """Training records of `objects`: labels and boxes."""
    text: int = 6_000
    """Training records of `text`: text without images."""
    evaluation: int = 300
    """Records of each validation and test split. 300 by default: scores within 3 % or so."""
    shard_records: int = 1_000
    """Records of a shard. 1000 by default: shards of a few MB."""

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
