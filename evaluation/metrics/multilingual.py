"""Tokenize the captions of XM3600, whose official tokenizer is unpublished, in three ways.

References of XM3600 come tokenized (`caption/tokenized`: words between spaces). A prediction in a script without
spaces has to be cut into words before CIDEr can compare it, and the cut decides the score. So three are reported:
`characters` needs no cut, `words` cuts with a segmenter of the language, `vocabulary` cuts greedily into words of the
language's own references.
"""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any, cast

from common.errors import ConfigurationError
from evaluation.metrics.captions import cider
from evaluation.metrics.items import Predictions, References, Score

# Languages without spaces between words: the package that cuts them, and its function.
SEGMENTERS = {
    "zh": ("jieba", "lcut"),
    "ja": ("nagisa", "wakati"),
    "th": ("pythainlp", "word_tokenize"),
}


def plain(text: str) -> str:
    """Return the text in NFKC and lower case, without punctuation and symbols, single-spaced."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PS" else c for c in folded).split())


def characters(texts: Sequence[str]) -> list[list[str]]:
    """Return the characters of each text, without spaces; a combining mark stays with its letter."""
    return [_letters(plain(text).replace(" ", "")) for text in texts]


def words(language: str, texts: Sequence[str]) -> list[list[str]]:
    """Return the words of each text; a text that has spaces already counts as cut.

    Raises ConfigurationError where the language's segmenter is not installed.
    """
    cut = _segmenter(language) if language in SEGMENTERS else str.split
    return [text.split() if " " in text or not text else list(cut(text)) for text in map(plain, texts)]


def vocabulary(references: Iterable[str], texts: Sequence[str]) -> list[list[str]]:
    """Return each text cut into the longest words of the references from left to right, and letters in between."""
    known = {word for reference in references for word in plain(reference).split()}
    longest = max(map(len, known), default=1)
    return [[piece for word in plain(text).split() for piece in _greedy(word, known, longest)] for text in texts]


def xm3600_cider(predictions: Predictions, references: References, language: str) -> dict[str, Score]:
    """Return CIDEr-D of one language by characters, words and the references' vocabulary.

    `cider_words` is left out where its segmenter is not installed (`missing_segmenter` has the reason).
    """
    every = [text for own in references.values() for text in own]
    tokenizers: dict[str, Callable[[Sequence[str]], list[list[str]]]] = {
        "cider_characters": characters,
        "cider_vocabulary": partial(vocabulary, every),
    }
    if not missing_segmenter(language):
        tokenizers["cider_words"] = partial(words, language)
    return {name: cider(predictions, references, tokenize) for name, tokenize in tokenizers.items()}


def missing_segmenter(language: str) -> str | None:
    """Return the sentence for a language whose segmenter is not installed, None where it is or none is needed."""
    package, _ = SEGMENTERS.get(language, ("", ""))
    if not package or find_spec(package):
        return None
    return (
        f"cider_words is left out, because the package {package} is not installed, which cuts {language} into words; "
        f"pip install {package}, or use cider_characters and cider_vocabulary."
    )


@cache
def _segmenter(language: str) -> Callable[[str], Any]:
    missing = missing_segmenter(language)
    if missing:
        raise ConfigurationError(missing)
    package, function = SEGMENTERS[language]
    module: Any = import_module(package)
    if package == "jieba":
        module = _with_own_cache(module)
    return cast(Callable[[str], Any], getattr(module, function))


def _with_own_cache(jieba: Any) -> Any:
    """Return jieba's tokenizer. By default it reads a cache from the folder of temporary files, where others write."""
    jieba.setLogLevel("WARNING")
    tokenizer = jieba.Tokenizer()
    with TemporaryDirectory() as folder:
        tokenizer.tmp_dir = folder
        tokenizer.initialize()
    return tokenizer


def _letters(text: str) -> list[str]:
    letters: list[str] = []
    for letter in text:
        if letters and unicodedata.category(letter)[0] == "M":
            letters[-1] += letter
        else:
            letters.append(letter)
    return letters


def _greedy(word: str, known: set[str], longest: int) -> Iterable[str]:
    start = 0
    while start < len(word):
        end = next((e for e in range(min(len(word), start + longest), start, -1) if word[start:e] in known), start + 1)
        yield word[start:end]
        start = end
