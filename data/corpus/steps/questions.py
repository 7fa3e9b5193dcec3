"""Make questions and answers of English captions by rules, after VQ2A (Changpinyo et al. 2022).

VQ2A takes answers from a caption's words and writes a question for each with a T5; `module:function` names such a
model: a function of a caption that returns (question, answer) pairs. The rules here need no weights: they take numbers,
colors, places and things where a caption's words leave one reading, and leave out the rest.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from data.corpus.steps.rules import load

Pairs = list[tuple[str, str]]
MOST = 4  # questions of a caption

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLORS = ("red", "green", "blue", "yellow", "white", "black", "brown", "orange", "purple", "pink", "gray")
FOLLOWERS = (
    *(
        "on",
        "in",
        "at",
        "under",
        "over",
        "near",
        "beside",
        "behind",
        "with",
        "and",
        "is",
        "are",
        "of",
        "by",
        "to",
        "that",
    ),
    r"[a-z]+ing",
)
BEHIND = rf"(?=\s*(?:[.,;!?]|$|\b(?:{'|'.join(FOLLOWERS)})\b))"  # one of these ends a noun
PLACES = r"(?:on|in|under|behind|beside|near|on top of|in front of|next to)"
NOUN = r"(?:[a-z]+ )?[a-z]+"
COLORED = re.compile(rf"\b(?:a|an|the) ({'|'.join(COLORS)}) ({NOUN}){BEHIND}")
COUNTED = re.compile(rf"\b({'|'.join(NUMBERS)}) ((?:[a-z]+ )?[a-z]+(?:s|children|people|men|women)){BEHIND}")
POSED = r"(?:(?:is|sitting|lying|resting|parked) )?"
PLACED = re.compile(rf"^(?:a|an|the) ({NOUN}) {POSED}({PLACES} (?:a|an|the) {NOUN}){BEHIND}")
THING = re.compile(rf"\b(an?) ((?:(?!{PLACES}\b)[a-z]+ )?[a-z]+){BEHIND}")
NO_NOUNS = frozenset(
    {*COLORS, *NUMBERS, "is", "are", "on", "in", "of", "the", "a", "an", "lot", "couple", "few", "bunch"}
)

PLACELESS = NO_NOUNS - frozenset(COLORS)


def by_rules(caption: str) -> Pairs:
    """Return the questions and answers that the rules find in an English caption."""
    text = " ".join(caption.lower().split())
    made: dict[str, str] = {}
    for color, noun in COLORED.findall(text):
        if not NO_NOUNS & set(noun.split()):
            made.setdefault(f"What color is the {noun}?", color)
    for number, noun in COUNTED.findall(text):
        if not NO_NOUNS & set(noun.split()):
            made.setdefault(f"How many {noun} are there?", number)
    for noun, place in PLACED.findall(text):
        if not PLACELESS & set(noun.split()):
            made.setdefault(f"Where is the {noun}?", place)
    for article, noun in THING.findall(text):
        if not NO_NOUNS & set(noun.split()):
            made.setdefault(f"Is there {article} {noun} in the image?", "yes")
    return list(made.items())[:MOST]


def generator(name: str) -> Callable[[str], Pairs]:
    """Return the maker of questions of the setting `questions`. Raises ConfigurationError."""
    if name == "rules":
        return by_rules
    made: Callable[[str], Pairs] = load("questions", name)
    return made


def add(record: dict[str, Any], make: Callable[[str], Pairs]) -> int:
    """Add `questions` made of a record's English captions, and return their number. A record with questions is kept."""
    if record.get("questions"):
        return 0
    made: dict[str, str] = {}
    for caption in _english(record):
        for question, answer in make(caption):
            made.setdefault(question, answer)
    if made:
        record["questions"] = [
            {"language": "en", "question": each, "answer": [answer]} for each, answer in made.items()
        ]
    return len(made)


def _english(record: Mapping[str, Any]) -> list[str]:
    captions = record.get("captions")
    found = captions.get("en") if isinstance(captions, dict) else None
    if found is None and record.get("language") == "en":
        found = record.get("alt_text")
    return [found] if isinstance(found, str) else [each for each in found or () if isinstance(each, str)]
