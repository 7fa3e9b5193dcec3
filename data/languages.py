"""Spell the codes of languages in one way, in prompts and in filters."""

import functools
import re
from collections.abc import Sequence

DEFAULT = "en"
# Codes that name one language: the registry of IANA replaced them one by the other. PaLI's text uses the first of each
# pair on the right: Google Translate's "iw" for Hebrew, and the new code for the others.
ALIASES = {"he": "iw", "in": "id", "ji": "yi", "jw": "jv", "mo": "ro"}

_CODE = re.compile(r"[a-z]{1,8}(-[a-z0-9]{1,8})*")


@functools.lru_cache(maxsize=4096)
def canonical(code: str) -> str | None:
    """Return the one spelling of a code ("he_IL" -> "iw-il"), or None for a text that is no code (RFC 5646)."""
    code = code.strip().lower().replace("_", "-")
    if not _CODE.fullmatch(code):
        return None
    language, hyphen, region = code.partition("-")
    return f"{ALIASES.get(language, language)}{hyphen}{region}"


def accepts(wanted: Sequence[str], code: str) -> bool:
    """Return whether a list of codes has this one or a more general one.

    "en" accepts "en-US" too, "en-US" no other English, and "zh-Hans" accepts "zh-Hans-CN" (RFC 4647, basic filtering).
    """
    spelled = canonical(code)
    if spelled is None:
        return code in wanted
    return not _spelled(tuple(wanted)).isdisjoint(_kinds(spelled))


@functools.lru_cache(maxsize=4096)
def _kinds(code: str) -> frozenset[str]:
    """Return the code and all more general ones: those with fewer subtags."""
    parts = code.split("-")
    return frozenset("-".join(parts[:end]) for end in range(1, len(parts) + 1))


@functools.lru_cache(maxsize=256)
def _spelled(codes: tuple[str, ...]) -> frozenset[str | None]:
    return frozenset(map(canonical, codes))
