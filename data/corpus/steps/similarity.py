"""Score image-text pairs, and keep the most similar ones."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigurationError
from data.corpus.config import SimilarityConfig
from data.corpus.steps.rules import load

STEPS = 1e-4  # scores are counted in steps of this size, so that a threshold needs one pass and no sorting
ALL = "all"


class Scorer(Protocol):
    """Score pairs: `images` are uint8 [height, width, 3]; the result is float [pairs], higher for more similar ones."""

    def __call__(self, images: Sequence[NDArray[np.uint8]], texts: Sequence[str]) -> NDArray[np.floating[Any]]:
        """Return the scores, from -1 to 1."""
        ...


@functools.cache
def scorer(name: str, weights: str | None) -> Scorer | None:
    """Return the scorer of `similarity.scorer`; None for `column`, where rows bring their own scores."""
    if name == "column":
        return None
    if name == "clip":
        if weights is None:
            raise ConfigurationError("similarity.scorer=clip needs similarity.weights; name a folder of weights.")
        return Clip(weights)
    made: Scorer = load("similarity.scorer", name)()
    return made


class Clip:
    """Score by the cosine of the embeddings of a CLIP or SigLIP model of transformers, from a folder."""

    def __init__(self, weights: str) -> None:
        import torch
        from transformers import AutoModel, AutoProcessor

        try:
            self.model = AutoModel.from_pretrained(weights, local_files_only=True).eval()
            self.processor = AutoProcessor.from_pretrained(weights, local_files_only=True)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigurationError(f"similarity.weights={weights} cannot be loaded ({reason}).") from error
        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(self.device)

    def __call__(self, images: Sequence[NDArray[np.uint8]], texts: Sequence[str]) -> NDArray[np.floating[Any]]:
        """See Scorer."""
        given = self.processor(
            text=list(texts), images=list(images), padding="max_length", truncation=True, return_tensors="pt"
        )
        with self.torch.inference_mode():
            made = self.model(**given.to(self.device))
            seen = self.torch.nn.functional.normalize(made.image_embeds, dim=-1)
            read = self.torch.nn.functional.normalize(made.text_embeds, dim=-1)
            scores: NDArray[np.floating[Any]] = (seen * read).sum(-1).float().cpu().numpy()
        return scores


def step(score: float) -> int:
    """Return a score as a number of steps."""
    return round(score / STEPS)


def thresholds(counts: Mapping[str, Mapping[int, int]], config: SimilarityConfig) -> dict[str, int]:
    """Return the least score, in steps, that is kept, by language, or under ALL.

    `counts`: pairs by language and score. All pairs of the threshold's own step are kept, so that the order of rows
    does not count; the share that is kept is at least `config.keep`.
    """
    grouped: dict[str, dict[int, int]] = {}
    for language, own in counts.items():
        group = grouped.setdefault(language if config.by_language else ALL, {})
        for score, number in own.items():
            group[score] = group.get(score, 0) + number
    return {group: _threshold(own, config.keep) for group, own in grouped.items()}


def is_kept(score: int, language: str, found: Mapping[str, int]) -> bool:
    """Return whether a pair is among those that are kept."""
    return score >= found.get(language, found.get(ALL, score))


def _threshold(counts: Mapping[int, int], keep: float) -> int:
    left = keep * sum(counts.values())
    score = max(counts)
    for score in sorted(counts, reverse=True):
        left -= counts[score]
        if left <= 1e-9:
            return score
    return score
