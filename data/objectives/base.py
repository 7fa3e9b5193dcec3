"""What all objectives share: the example they make, the reasons they do not, and the slots of their prompts."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Protocol, Self, TypeVar, cast, get_args, get_origin, get_type_hints

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import ConfigurationError, ReadingStopped
from data import languages

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
class AnyOptions:
    """What an objective can be told in a mixture's `options`; each has only what it reads."""

    def __post_init__(self) -> None:
        """Raise ConfigurationError for values that are impossible; every class adds its own checks."""

    def for_rows(self, encoder_length: int, decoder_length: int) -> Self:
        """Return the options for rows of these lengths; raise ConfigurationError for what such rows cannot hold."""
        return self


@dataclass(frozen=True)
class PromptOptions(AnyOptions):
    """language_case: of the language code in a prompt; the paper's examples are upper-case ("EN"), PaLI-3's lower."""

    language_case: str = "upper"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.language_case not in ("upper", "lower"):
            raise ConfigurationError(f"language_case={self.language_case!r} must be 'upper' or 'lower'.")

    def for_rows(self, encoder_length: int, decoder_length: int) -> Self:
        """Return the options for rows of these lengths; raise ConfigurationError for what such rows cannot hold."""
        return self

    def code(self, language: str) -> str:
        """The language as it stands in a prompt: "en" -> "EN"."""
        code = languages.canonical(language) or language
        return code.upper() if self.language_case == "upper" else code.lower()


@dataclass(frozen=True)
class LanguageOptions(AnyOptions):
    """languages: use only these; None uses all. "en" stands for "en-US" too, and "he" and "iw" are one."""

    languages: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.languages is not None and not self.languages:
            raise ConfigurationError("languages=[] leaves none; leave the option out to use all.")
        for code in self.languages or ():
            if languages.canonical(code) is None:
                raise ConfigurationError(
                    f"languages holds {code!r}, which is no code of a language, such as en or pt-BR."
                )

    def uses(self, language: str) -> bool:
        """Whether text of this language is wanted."""
        return self.languages is None or languages.accepts(self.languages, language)


@dataclass(frozen=True)
class LabelOptions(AnyOptions):
    """labels: what negatives are drawn from where a record has no `absent_labels`; empty: the source's own labels."""

    labels: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not label.strip() for label in self.labels):
            raise ConfigurationError("labels holds a blank one; leave it out.")


@dataclass(frozen=True)
class Options(PromptOptions, LanguageOptions):
    """Those of an objective that reads text of a language and names the language in its prompt."""


class Vocabulary(Protocol):
    """The part of a tokenizer that objectives use."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def sentinel(self, number: int) -> int: ...


class Objective(Protocol):
    """What a module of this folder offers. PROMPTS are its templates, for the tokenizer's training and for reading."""

    PROMPTS: tuple[str, ...]
    Options: type[AnyOptions]

    def make(
        self, record: Mapping[str, Any], rng: np.random.Generator, options: Any, vocabulary: Vocabulary
    ) -> Example:
        """A pure function of its arguments; raises Skip where the record has nothing to ask about."""

    def read(self, text: str) -> Any:
        """An answer, given by the model or by the record, as the structure that evaluation compares."""


Chosen = TypeVar("Chosen", bound=AnyOptions)


def parse_options(where: str, kind: type[Chosen], values: Mapping[str, Any]) -> Chosen:
    """Make `kind` of the values; raise ConfigurationError, which begins with `where`, for a wrong name or value."""
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            known = f"it has {', '.join(hints)}" if hints else "it has none"
            raise ConfigurationError(f"{where} has no option {key!r}: {known}.")
        _check_kind(f"{where}: option {key}", hints[key], value)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(kind), dict(values))
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"{where}: option {error.full_key}: {str(error).splitlines()[0]}.") from error
    plain = cast(dict[str, Any], OmegaConf.to_container(typed))
    try:
        return kind(**plain)
    except ConfigurationError as error:
        impossible = str(error)
    raise ConfigurationError(f"{where}: {impossible}")  # outside the block: of a chain the innermost is shown


def _check_kind(where: str, hint: Any, value: Any) -> None:
    """Raise ConfigurationError for what YAML reads as another kind than text, and for what is no finite number."""
    if get_origin(hint) is UnionType:
        if value is None:
            return
        (hint,) = (each for each in get_args(hint) if each is not NoneType)
    if get_origin(hint) is list:
        if not isinstance(value, list | tuple):
            raise ConfigurationError(f"{where}={value!r} must be a list, such as [{value}].")
        for item in value:
            _check_kind(f"{where} holds {item!r}, which", get_args(hint)[0], item)
    elif hint is str and not isinstance(value, str):
        raise ConfigurationError(
            f"{where if 'which' in where else f'{where}={value!r}'} must be text; YAML reads no, yes, on, off and "
            "numbers otherwise, so write it in quotes, such as 'no'."
        )
    elif hint in (int, float) and isinstance(value, bool):
        raise ConfigurationError(f"{where}={value!r} must be a number.")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigurationError(f"{where}={value} must be a finite number.")


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
    return [items[number] for number in rng.permutation(len(items)).tolist()]


def distinct(items: Sequence[Item]) -> list[Item]:
    """The items without repeats, in order of first appearance."""
    return list(dict.fromkeys(items))
