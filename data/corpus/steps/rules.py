"""Remove rows by pluggable rules, such as adult content and personal data.

A rule is a function of a record's fields and its pixels (None without an image): a cause, or None. It must be a pure
function. `pii` and `adult_words` are built in; `module:function` names another.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigurationError
from data.skip import Skip

Rule = Callable[[Mapping[str, Any], NDArray[np.uint8] | None], str | None]

EMAIL = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")
PHONE = re.compile(r"(?<![\w/.-])(\+|00)\d{1,3}[ ()./-]*(\d[ ()./-]*){7,11}(?!\w)|\(\d{3}\) ?\d{3}-\d{4}")
CARD = re.compile(r"(?<!\d)(?:\d[ -]?){13,19}(?!\d)")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}\b")
# English only, whole words; a list of a site's own languages is a rule of its own.
ADULT = re.compile(r"\b(porn\w*|xxx|nsfw|hentai|nudes?|naked|blowjob|milf|erotica?|sex (video|tape|cam)s?)\b", re.I)


def pii(record: Mapping[str, Any], pixels: NDArray[np.uint8] | None) -> str | None:
    """Return a cause for a text with an e-mail address, a phone number, an IBAN or the number of a card."""
    for text in _texts(record):
        if EMAIL.search(text) or PHONE.search(text) or IBAN.search(text):
            return "personal data"
        if any(_is_card(re.sub(r"\D", "", found[0])) for found in CARD.finditer(text)):
            return "personal data"
    return None


def adult_words(record: Mapping[str, Any], pixels: NDArray[np.uint8] | None) -> str | None:
    """Return a cause for a text with an English word for adult content."""
    return "adult words" if any(ADULT.search(text) for text in _texts(record)) else None


BUILT_IN: dict[str, Rule] = {"pii": pii, "adult_words": adult_words}


def load(where: str, name: str) -> Any:
    """Return the object `module:name`; raise ConfigurationError where there is none."""
    module, colon, attribute = name.partition(":")
    try:
        if not colon:
            raise ImportError("it is not of the form module:name")
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{where}={name!r} cannot be loaded ({error}); name an importable object.") from error


@functools.cache
def rules(names: tuple[str, ...]) -> list[Rule]:
    """Return the rules by name. Raises ConfigurationError for an unknown one."""
    return [BUILT_IN[name] if name in BUILT_IN else load("rules", name) for name in names]


def check(names: Sequence[str], record: Mapping[str, Any], pixels: NDArray[np.uint8] | None) -> None:
    """Raise Skip with the cause of the first rule that refuses a record."""
    for rule in rules(tuple(names)):
        if (cause := rule(record, pixels)) is not None:
            raise Skip(cause)


def _texts(record: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for name in ("alt_text", "text", "page_title"):
        value = record.get(name)
        found += [value] if isinstance(value, str) else [each for each in value or () if isinstance(each, str)]
    return found


def _is_card(digits: str) -> bool:
    """Return whether a number has the check digit of payment cards (Luhn)."""
    if len(set(digits)) == 1:
        return False
    doubled = [int(digit) * (1 + position % 2) for position, digit in enumerate(reversed(digits))]
    return sum(sum(divmod(value, 10)) for value in doubled) % 10 == 0
