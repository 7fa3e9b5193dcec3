"""What all objectives share: the example they make, the reasons they do not, and the slots of their prompts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields
from typing import Any, Protocol, Self, TypeVar

import numpy as np

from data import languages
from errors import ConfigurationError, ReadingStopped

SENTINEL = "<extra_id_0>"


@dataclass(frozen=True)
class Example:
    """One question to the model and its answer, as text; ids where the objective works on tokens (without EOS)."""

    input_text: str
    target_text: str
    language: str
    image: bool = True
    input_ids: Sequence[int] | None = None
    target_ids: Sequence[int] | None = None


class Skip(Exception):
    """A record that an objective cannot use. A `defect` (broken data, not just another kind of record) costs budget.

    `cause` is counted, so it is one of few; `detail` is logged, and may hold a value of the record, cut short.
    """

    def __init__(self, cause: str, defect: bool = False, detail: str = ""):
        super().__init__(f"{cause}: {detail}" if detail else cause)
        self.cause = cause
        self.defect = defect
        self.detail = detail


@contextmanager
def one_record(use: str) -> Iterator[None]:
    """Turn whatever one record raises while it is read and used into a Skip, a defect of this record.

    A list of exceptions would miss one, and a restart would end at the same record. What stops reading passes.
    """
    try:
        yield
    except (Skip, ReadingStopped):
        raise
    except Exception as error:
        raise Skip(f"{type(error).__name__} in {use}", defect=True, detail=str(error)[:200]) from error


@dataclass(frozen=True)
class Options:
    """What every objective can be told in a mixture's `options`.

    language_case: of the language code in a prompt; the paper's examples are upper-case ("EN"), PaLI-3's lower-case.
    languages: use only these; None uses all. "en" stands for "en-US" too, and "he" and "iw" are one.
    """

    language_case: str = "upper"
    languages: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.language_case not in ("upper", "lower"):
            raise ConfigurationError(f"language_case={self.language_case!r} must be 'upper' or 'lower'.")

    def for_rows(self, encoder_length: int, decoder_length: int) -> Self:
        """Return the options for rows of these lengths; raise ConfigurationError for what such rows cannot hold."""
        return self

    def code(self, language: str) -> str:
        """The language as it stands in a prompt: "en" -> "EN"."""
        code = languages.canonical(language) or language
        return code.upper() if self.language_case == "upper" else code.lower()

    def uses(self, language: str) -> bool:
        """Whether text of this language is wanted."""
        return self.languages is None or languages.accepts(self.languages, language)


class Vocabulary(Protocol):
    """The part of a tokenizer that objectives use."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def sentinel(self, number: int) -> int: ...


class Objective(Protocol):
    """What a module of this folder offers. PROMPTS are its templates, for the tokenizer's training and for reading."""

    PROMPTS: tuple[str, ...]
    Options: type[Options]

    def make(
        self, record: Mapping[str, Any], rng: np.random.Generator, options: Any, vocabulary: Vocabulary
    ) -> Example:
        """A pure function of its arguments; raises Skip where the record has nothing to ask about."""

    def read(self, text: str) -> Any:
        """An answer, given by the model or by the record, as the structure that evaluation compares."""


def parse_options(name: str, kind: type[Options], values: Mapping[str, Any]) -> Options:
    """`kind(**values)`, with a wrong name or type reported as a ConfigurationError."""
    known = {field.name: field.default for field in fields(kind)}
    for key, value in values.items():
        if key not in known:
            raise ConfigurationError(f"objective {name} has no option {key!r}: it has {', '.join(known)}.")
        default = known[key]
        if isinstance(default, int | float) and default is not MISSING and not isinstance(value, int | float):
            raise ConfigurationError(f"objective {name}: option {key}={value!r} must be a number.")
    return kind(**values)


Item = TypeVar("Item")


def choose(rng: np.random.Generator, items: Sequence[Item], cause: str) -> Item:
    """One of the items, uniformly; raises Skip(cause) if there is none."""
    if not items:
        raise Skip(cause)
    return items[int(rng.integers(len(items)))]


def one_of(rng: np.random.Generator, texts: Sequence[str]) -> str:
    """Return one of several wordings, uniformly; where there is one, nothing is drawn."""
    return texts[0] if len(texts) == 1 else texts[int(rng.integers(len(texts)))]


def row_length(name: str, own: int | None, row_name: str, row_length: int) -> int:
    """Return an option's own length, or the row's where it has none; raise ConfigurationError if the row is shorter."""
    if own is not None and own > row_length:
        raise ConfigurationError(
            f"{name}={own} is more than a row of data.{row_name}={row_length} holds, which would cut it: "
            f"set it to {row_length} or less, or leave it out."
        )
    return own or row_length


def shuffled(rng: np.random.Generator, items: Sequence[Item]) -> list[Item]:
    """The items in random order."""
    return [items[int(i)] for i in rng.permutation(len(items))]


def distinct(items: Sequence[Item]) -> list[Item]:
    """The items without repeats, in order of first appearance."""
    return list(dict.fromkeys(items))
