"""Define an example that is ready to be packed, and the facts that accompany it."""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ExampleInfo:
    """The origin of an example and its place in the rows, for logs, samples and files of skipped steps."""

    source: str
    objective: str
    key: str
    shard: str
    language: str
    input_text: str
    target_text: str
    step: int = -1
    """From 1; -1 for a held-out example."""
    row: int = -1
    """In the rows that were returned with this info."""
    segment: int = 0
    """In that row, from 1."""
    truncated: bool = False
    """Whether a text was cut to fit a row."""
    component: str = ""
    """Name in the mixture."""
    index: int = -1
    """Of a held-out record, counted over all components; -1 for a training example."""
    references: tuple[str, ...] = ()
    """Every wording that is right; never empty once an example is made."""
    item: str = ""
    """The item of the record (a question, a language); empty where a record has one."""

    @property
    def id(self) -> str:
        """Name the item among those of its source."""
        return f"{self.key}#{self.item}" if self.item else self.key


@dataclass(frozen=True)
class TextExample:
    """One example as token ids, before its image is read: all that packing needs."""

    encoder_ids: NDArray[np.int32]
    """Ends with EOS."""
    decoder_ids: NDArray[np.int32]
    """Ends with EOS."""
    info: ExampleInfo
    closing: int = field(default=1, kw_only=True)
    """Last encoder ids that stay when a text is cut: EOS, and before it the prompt's sentinel if it has one."""
    record: int | None = field(default=None, kw_only=True)
    """Number in the index of the record whose image belongs to it; None for text alone."""
    image_at: tuple[int, int] | None = field(default=None, kw_only=True)
    """Offset and size of that image in its tar, where they are found already."""

    augmentation: int | None = field(default=None, kw_only=True)
    """Seed of the crop of its image; None: the image as it is."""

    @property
    def num_images(self) -> int:
        """Return the number of images: 0 or 1."""
        return int(self.record is not None)


@dataclass(frozen=True)
class EncodedExample(TextExample):
    """One example as token ids and pixels."""

    images: NDArray[np.uint8]
    """[images, S, S, 3]; none for text alone."""

    @property
    def num_images(self) -> int:
        """Return the number of images."""
        return len(self.images)
