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
    """What `python -m data.miniature key=value …` understands.

    `webli` … `text` are the numbers of training records, `evaluation` that of each validation and test split; `scale`
    multiplies them all. `workers=0` takes one process per processor core; it never changes a byte of the corpus.
    """

    folder: str = field(default="runs/corpus", metadata=PATH)
    seed: int = 0
    scale: float = 1.0
    image_size: int = 112
    languages: list[str] = field(default_factory=lambda: list(CODES))
    workers: int = 0
    webli: int = 10_000
    cc3m_35l: int = 8_000
    vq2a: int = 20_000
    objects: int = 8_000
    text: int = 6_000
    evaluation: int = 300
    shard_records: int = 1_000

    def check(self) -> None:
        """Raises ConfigurationError for a value no corpus can be made with."""
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
            raise ConfigurationError("Every source and the evaluation splits need at least 1 record.")

    def num_records(self, source: str, split: str) -> int:
        """Records of one split of one source, after scaling; at least one."""
        return max(1, round(self.scale * (getattr(self, source) if split == "train" else self.evaluation)))


def parse(arguments: list[str]) -> MiniatureConfig:
    """Reads `key=value` words. Raises ConfigurationError for unknown keys, wrong types and impossible values."""
    config = arguments_of(arguments, MiniatureConfig)
    config.check()
    return config
