"""Summarize what a source holds, by its index: records of each field, their languages, defects, and names not read."""

import textwrap
from collections import Counter, defaultdict

import numpy as np

from common.progress import beat
from data.languages import DEFAULT
from data.shards.contents import ANY, DEFECT, UNKNOWN, parsed
from data.shards.field_map import by_number, held_names, listed, unread
from data.shards.index import SourceIndex
from data.shards.source import ShardSource

AT_ONCE = 1 << 24  # records whose profiles are counted between two beats
MOST_SHARDS = 5  # broken shards that are named
WIDTH, NO_BREAK = 118, "\u00a0"


def summary(source: ShardSource) -> list[str]:
    """Return lines about a source: its fields with numbers of records and languages, defects, and names not read.

    The numbers are exact, from the index; the names that no field reads are those of a sample of the records.
    """
    names = held_names(source)
    with_language = "language" in names or "language" in source.options.fields
    lines = [*_field_lines(source.index, with_language), _image_line(source.index), *_shard_lines(source)]
    if left := unread(names, source.options.fields):
        lines.append(f"names in the JSON that no field reads: {listed(left)}")
    wrapper = textwrap.TextWrapper(WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
    wrapped = map(wrapper.wrap, lines)
    return [part.replace(NO_BREAK, " ") for parts in wrapped for part in parts]


def _field_lines(index: SourceIndex, with_language: bool) -> list[str]:
    """Return a line about each field: its records, and the number of its texts in each language."""
    numbers = _numbers(index)
    records: Counter[str] = Counter()
    malformed: Counter[str] = Counter()
    languages: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for profile, number in zip(index.profiles, numbers.tolist(), strict=True):
        if profile == UNKNOWN:
            malformed["JSON"] += number
            continue
        for name, counts in parsed(profile).items():
            if DEFECT in counts:
                malformed[name] += number
                continue
            records[name] += number
            languages[name].update({code: items * number for code, items in counts.items() if code != ANY})
    lines = []
    for name in sorted(records):
        own = languages[name]
        line = f"{name}: {records[name]:,} records"
        if own:
            codes = ", ".join(f"{code}{NO_BREAK}{own[code]:,}" for code in by_number(own))
            line += f" in {len(own)} language{'s' * (len(own) > 1)}: {codes}"
        if name in ("alt_text", "text") and not with_language:
            line += f" ({DEFAULT} is the language of records without `language`)"
        lines.append(line)
    if malformed:
        lines.append(f"malformed: {', '.join(f'{name} {malformed[name]:,}' for name in by_number(malformed))}")
    return lines or ["no field that an objective reads"]


def _image_line(index: SourceIndex) -> str:
    sizes, number = index.sections["image_sizes"], 0
    for first in range(0, len(sizes), AT_ONCE):
        beat()
        number += int(np.count_nonzero(sizes[first : first + AT_ONCE, 0]))
    return f"images: {number:,} records; {len(sizes) - number:,} have none, or one whose size cannot be read"


def _numbers(index: SourceIndex) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Return the number of records of each profile."""
    numbers, profiles = np.zeros(len(index.profiles), np.int64), index.sections["profiles"]
    for first in range(0, len(profiles), AT_ONCE):
        beat()
        numbers += np.bincount(profiles[first : first + AT_ONCE], minlength=len(numbers))
    return numbers


def _shard_lines(source: ShardSource) -> list[str]:
    broken = {source.paths[number]: note["defect"] for number, note in source.index.notes.items() if note["defect"]}
    lines = [f"{path}: {defect}" for path, defect in list(broken.items())[:MOST_SHARDS]]
    if len(broken) > MOST_SHARDS:
        lines.append(f"{len(broken) - MOST_SHARDS:,} more broken shards")
    if source.left_out:
        lines.append(f"no part of a record: {', '.join(f'{n:,} x {cause}' for cause, n in source.left_out.items())}")
    return lines
