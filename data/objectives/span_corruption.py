"""Span corruption of text alone, as in mT5's pretraining: keeps the abilities of the language model.

The recipe is t5.data.preprocessors.span_corruption (noise density 0.15, mean span 3.0, random_spans_noise_mask,
unique sentinels); names of functions and their order of random choices follow it.
"""

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigurationError
from data import fields
from data.objectives import base
from data.objectives.base import Example, Vocabulary

PROMPTS = ()
NUM_SENTINELS = 100
SHORTEST = 3  # tokens of an input or target: one of the text, one sentinel, EOS

_SPAN = re.compile(r"<extra_id_(\d+)>((?:(?!<extra_id_\d+>).)*)", re.DOTALL)


@dataclass(frozen=True)
class Options(base.LanguageOptions):
    """Options of span corruption. A length beyond a row's is refused: a cut would leave sentinels on one side only."""

    noise_density: float = 0.15
    """Fraction of the tokens that is noise: T5's."""
    mean_span_length: float = 3.0
    """Mean number of tokens of a noise span: T5's."""
    input_length: int | None = None
    """Most tokens of the corrupted input, with EOS; None: as many as a row holds."""
    target_length: int | None = None
    """Most tokens of the target, with EOS; None: as many as a row holds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.noise_density < 1 or not self.mean_span_length >= 1:
            raise ConfigurationError(
                f"noise_density={self.noise_density} must lie in (0, 1), mean_span_length="
                f"{self.mean_span_length} be 1 or more."
            )
        for name, length in (("input_length", self.input_length), ("target_length", self.target_length)):
            if length is not None and length < SHORTEST:
                raise ConfigurationError(f"{name}={length} must be {SHORTEST} or more.")

    def for_rows(self, encoder_length: int, decoder_length: int) -> "Options":
        """See AnyOptions.for_rows."""
        if min(encoder_length, decoder_length) < SHORTEST:
            raise ConfigurationError(
                f"span_corruption needs rows of {SHORTEST} or more positions: raise data.encoder_length="
                f"{encoder_length} or data.decoder_length={decoder_length}, or leave it out of the mixture."
            )
        return replace(
            self,
            input_length=base.row_length(
                "span_corruption: input_length", self.input_length, "encoder_length", encoder_length
            ),
            target_length=base.row_length(
                "span_corruption: target_length", self.target_length, "decoder_length", decoder_length
            ),
        )


def num_noise(length: int, noise_density: float, mean_span_length: float) -> tuple[int, int]:
    """Return (noise tokens, noise spans) of a text of `length` >= 2 tokens."""
    tokens = min(max(round(length * noise_density), 1), length - 1)
    spans = max(round(tokens / mean_span_length), 1)
    return tokens, min(spans, tokens, length - tokens, NUM_SENTINELS)


@functools.cache
def raw_length(
    input_length: int, noise_density: float, mean_span_length: float, target_length: int | None = None
) -> int:
    """Return the length of the longest text, in tokens, whose corrupted input and target fit the given lengths.

    Both count EOS. Without `target_length` it is T5's random_spans_helper.
    """
    length = 2
    while True:
        tokens, spans = num_noise(length + 1, noise_density, mean_span_length)
        if length + 1 - tokens + spans + 1 > input_length:
            return length
        if target_length is not None and tokens + spans + 1 > target_length:
            return length
        length += 1


def _random_segmentation(rng: np.random.Generator, num_items: int, num_segments: int) -> NDArray[np.int64]:
    """Draw lengths of `num_segments` non-empty segments of `num_items` in all, every division equally likely."""
    first = np.zeros(num_items, np.int64)
    first[1:] = rng.permutation(np.arange(num_items - 1) < num_segments - 1)
    return np.bincount(np.cumsum(first), minlength=num_segments)


def random_spans_noise_mask(
    rng: np.random.Generator, length: int, noise_density: float, mean_span_length: float
) -> NDArray[np.bool_]:
    """Draw bool [length], True at noise; it begins with text and ends with noise."""
    tokens, spans = num_noise(length, noise_density, mean_span_length)
    noise = _random_segmentation(rng, tokens, spans)
    text = _random_segmentation(rng, length - tokens, spans)
    lengths = np.stack([text, noise], axis=1).reshape(-1)
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def spans_to_sentinels(
    ids: NDArray[np.int32], mask: NDArray[np.bool_], sentinels: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Return the ids with the k-th run of `mask` replaced by the k-th sentinel."""
    first = mask & ~np.concatenate([[False], mask[:-1]])
    replaced = np.where(first, sentinels[np.cumsum(first) - 1], ids)
    return replaced[first | ~mask]


def make(record: Mapping[str, Any], rng: np.random.Generator, options: Options, vocabulary: Vocabulary) -> Example:
    """Make an example of `text` (and `language`), without image. Of a longer text one chunk is drawn, as in T5."""
    texts, language = fields.document(record), fields.language(record)
    if not options.uses(language):
        raise base.Skip("other language")
    ids = np.asarray(vocabulary.encode(base.one_of(rng, texts)), np.int32)
    longest = len(ids)
    if options.input_length is not None:
        longest = raw_length(
            options.input_length, options.noise_density, options.mean_span_length, options.target_length
        )
    if len(ids) > longest:
        start = longest * int(rng.integers(-(-len(ids) // longest)))
        ids = ids[start : start + longest]
    if len(ids) < 2:
        raise base.Skip("text of one token")
    mask = random_spans_noise_mask(rng, len(ids), options.noise_density, options.mean_span_length)
    sentinels = np.array([vocabulary.sentinel(number) for number in range(NUM_SENTINELS)], np.int32)
    input_ids = spans_to_sentinels(ids, mask, sentinels).tolist()
    target_ids = spans_to_sentinels(ids, ~mask, sentinels).tolist()
    return Example(vocabulary.decode(input_ids), vocabulary.decode(target_ids), language, False, input_ids, target_ids)


def read(text: str) -> dict[int, str]:
    """Return {sentinel number: text of its span}."""
    return {int(number): span.strip() for number, span in _SPAN.findall(text)}
