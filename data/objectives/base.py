"""Define the parts that all objectives share: examples, reasons to skip a record, options."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import NoneType, UnionType
from typing import Any, Protocol, Self, TypeVar, cast, get_args, get_origin, get_type_hints

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import ConfigurationError
from data import languages
from data.skip import Skip

SENTINEL = "<extra_id_0>"


@dataclass(frozen=True)
class Example:
    """Hold an input and its target as text; token ids without EOS if the objective works on tokens."""

    input_text: str
    target_text: str
    language: str
    image: bool = True
    input_ids: Sequence[int] | None = None
    target_ids: Sequence[int] | None = None
    references: tuple[str, ...] = ()
    """Every wording that is right, as evaluation compares them; empty: the target alone."""
    item: str = ""
    """The item of the record that was drawn, as its number or language; empty where a record has one."""
    closed: bool | None = None
    """Whether the sentinel ends the prompt; None: as in the objective's templates."""


@dataclass(frozen=True)
class AnyOptions:
    """Base of the options that a component of a mixture gives its objective; each objective has those that it reads."""

    def __post_init__(self) -> None:
        """Raise ConfigurationError for impossible values; every class adds its own checks."""

    def for_rows(self, encoder_length: int, decoder_length: int) -> Self:
        """Return the options for rows of these lengths; raise ConfigurationError for lengths that do not fit a row."""
        return self


@dataclass(frozen=True)
class PromptOptions(AnyOptions):
    """Options of an objective whose prompt names a language."""

    language_case: str = "upper"
    """Case of the language code in a prompt: `upper`, as the paper's examples (EN), or `lower`, as PaLI-3's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.language_case not in ("upper", "lower"):
            raise ConfigurationError(f"language_case={self.language_case!r} must be 'upper' or 'lower'.")

    def code(self, language: str) -> str:
        """Return the language's code for a prompt: "en" -> "EN"."""
        code = languages.canonical(language) or language
        return code.upper() if self.language_case == "upper" else code.lower()


@dataclass(frozen=True)
class LanguageOptions(AnyOptions):
    """Options of an objective that reads text of a language."""

    languages: list[str] | None = None
    """Languages that are used, by code; `en` includes `en-US`, and `he` and `iw` are one. Null by default: all."""

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
        """Return whether text of this language is used."""
        return self.languages is None or languages.accepts(self.languages, language)


@dataclass(frozen=True)
class LabelOptions(AnyOptions):
    """Options of an objective that names things that are not in the image."""

    labels: list[str] = field(default_factory=list)
    """Labels that negatives are drawn from where a record has no `absent_labels`. Empty by default: the source's own.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(not label.strip() for label in self.labels):
            raise ConfigurationError("labels holds a blank one; leave it out.")


@dataclass(frozen=True)
class TargetOptions(AnyOptions):
    """Options of an objective whose target must not be cut by a row."""

    target_length: int | None = None
    """Most tokens of a target, with EOS; None: as many as a row holds."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_length is not None and self.target_length < 2:
            raise ConfigurationError(f"target_length={self.target_length} must be 2 or more.")

    def for_rows(self, encoder_length: int, decoder_length: int) -> Self:
        """See AnyOptions.for_rows."""
        where = f"{type(self).OBJECTIVE}: target_length"
        return replace(self, target_length=row_length(where, self.target_length, "decoder_length", decoder_length))

    OBJECTIVE = ""  # the objective's name in messages; without a type, so that it is no option


@dataclass(frozen=True)
class Options(PromptOptions, LanguageOptions):
    """Options of an objective that reads text of a language and names the language in its prompt."""


class Vocabulary(Protocol):
    """The part of a tokenizer that objectives use."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without EOS."""

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids."""

    def sentinel(self, number: int) -> int:
        """Return the id of <extra_id_`number`>."""


class Objective(Protocol):
    """The interface of a module of this folder. PROMPTS are its templates, for the tokenizer's training too.

    A module with `ITEMS = True` finds several items in a record, such as its questions; its `make` takes the number of
    one as a fifth argument, `item`, and draws one if it is None.
    """

    PROMPTS: tuple[str, ...]
    Options: type[AnyOptions]

    def make(
        self, record: Mapping[str, Any], rng: np.random.Generator, options: Any, vocabulary: Vocabulary, *item: int
    ) -> Example:
        """Make an example, as a pure function of the arguments; raise Skip if the record lacks a field for it."""

    def read(self, text: str) -> Any:
        """Parse a prediction or a target to the structure that evaluation compares."""


Chosen = TypeVar("Chosen", bound=AnyOptions)


def parse_options(where: str, objective: str, kind: type[Chosen], values: Mapping[str, Any]) -> Chosen:
    """Return `values` as the dataclass `kind`; `where` is the key of all of them.

    Raises ConfigurationError for an unknown option and a wrong value.
    """
    hints = get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            known = f"did you mean {near[0]}?" if near else f"known here: {', '.join(hints) or 'none'}."
            raise ConfigurationError(f"{where}.{key} is not an option of {objective}; {known}")
        _check_kind(f"{where}.{key}", hints[key], value)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(kind), dict(values))
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"{where}.{error.full_key}: {str(error).splitlines()[0]}.") from error
    plain = cast(dict[str, Any], OmegaConf.to_container(typed))
    try:
        return kind(**plain)
    except ConfigurationError as error:
        impossible = str(error)
    # Raised outside `except`: of a chain of errors the entry point prints the innermost one, which lacks the key.
    raise ConfigurationError(f"{where}.{impossible}")


def _check_kind(where: str, hint: Any, value: Any) -> None:
    """Raise ConfigurationError for a value that YAML reads as another kind than text, and for an infinite number."""
    if get_origin(hint) is UnionType:
        if value is None:
            return
        (hint,) = (each for each in get_args(hint) if each is not NoneType)
    if get_origin(hint) is list:
        if not isinstance(value, list | tuple):
            raise ConfigurationError(f"{where}={value!r} must be a list, such as [{value}].")
        for number, item in enumerate(value):
            _check_kind(f"{where}[{number}]", get_args(hint)[0], item)
    elif hint is str and not isinstance(value, str):
        raise ConfigurationError(
            f"{where}={value!r} must be text; YAML reads no, yes, on, off and numbers otherwise, so write it in "
            "quotes, such as 'no'."
        )
    elif hint in (int, float) and isinstance(value, bool):
        raise ConfigurationError(f"{where}={value!r} must be a number.")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigurationError(f"{where}={value} must be a finite number.")


Item = TypeVar("Item")


def choose(rng: np.random.Generator, items: Sequence[Item], cause: str, number: int | None = None) -> Item:
    """Return one of the items, drawn uniformly, or the one of this number; raise Skip(cause) if there is none."""
    if len(items) <= (number or 0):
        raise Skip(cause)
    return items[int(rng.integers(len(items))) if number is None else number]


def one_of(rng: np.random.Generator, texts: Sequence[str]) -> str:
    """Return one of several wordings, drawn uniformly; a single one uses no random number."""
    return texts[0] if len(texts) == 1 else texts[int(rng.integers(len(texts)))]


def row_length(name: str, own: int | None, row_name: str, row_length: int) -> int:
    """Return an option's own length, or the row's if it is None; raise ConfigurationError if the row is shorter."""
    if own is not None and own > row_length:
        raise ConfigurationError(
            f"{name}={own} is more than a row of data.{row_name}={row_length} holds, which would cut it: "
            f"set it to {row_length} or less, or leave it out."
        )
    return own or row_length


def shuffled(rng: np.random.Generator, items: Sequence[Item]) -> list[Item]:
    """Return the items in random order."""
    return [items[number] for number in rng.permutation(len(items)).tolist()]


def distinct(items: Sequence[Item]) -> list[Item]:
    """Return the items without repeats, in order of first appearance."""
    return list(dict.fromkeys(items))
