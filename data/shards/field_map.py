"""Compare a field map with the records of its source: a name that no record has would leave its field out silently."""

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from common.errors import ConfigurationError
from data import fields
from data.shards.scan import printable
from data.shards.source import ShardSource
from data.skip import Skip

LOOKED_AT = 256  # records, spread over the source
MOST_NAMES = 20  # of a record, in a message


def check_places(source: ShardSource, where: str) -> None:
    """Raise ConfigurationError for a name of the source's field map that none of its records has.

    `where`: the key of the map, `data.fields.webli`. At most LOOKED_AT records are read, and one is where all names are
    right. A field that the index has found in any record is not missing; an alt_text may be a `caption`, though.
    """
    if not source.options.fields:
        return
    missing, names, number_read = dict(source.options.fields), Counter[str](), 0
    for record in _sample(source):
        missing = {name: place for name, place in missing.items() if not fields.holds(record, place)}
        if not missing:
            return
        names.update(record.keys())
        number_read += 1
    found = {part.partition("=")[0] for profile in source.index.profiles for part in profile.split(" ")} - {"alt_text"}
    for name, place in missing.items():
        if number_read and name not in found:
            raise ConfigurationError(
                f"{where}.{name}={place} is in none of {number_read:,} records of source {source.name}, which hold "
                f"{listed(names)}; {_near(place, names) or 'write one of these'}."
            )


def check_sources(named: Iterable[str], known: Collection[str], where: str) -> None:
    """Raise ConfigurationError for a field map of a source that there is not; `where` is the key of the maps."""
    for name in named:
        if name not in known:
            hint = _near(name, known) or f"known here: {listed(known)}"
            raise ConfigurationError(f"{where}.{name} names no source; {hint}.")


def held_names(source: ShardSource) -> Counter[str]:
    """Return the names in the JSON of a sample of records, with the number of records that have each."""
    return Counter(name for record in _sample(source) for name in record)


def unread(names: Iterable[str], field_map: Mapping[str, str]) -> list[str]:
    """Return those of the names that are read as no field, and that img2dataset does not write of its own accord."""
    places = [place.partition(".")[0] for place in field_map.values()]
    own = {*fields.NAMES, "caption", *IMG2DATASET}
    return [name for name in names if name not in own and not any(fields.holds({name: ""}, place) for place in places)]


# Columns that img2dataset writes of its own accord, https://github.com/rom1504/img2dataset, "Output format".
IMG2DATASET = frozenset({
    "url", "key", "status", "error_message", "width", "height", "original_width", "original_height", "exif", "md5",
    "sha256", "sha512",
})  # fmt: skip


def by_number(names: Counter[str]) -> list[str]:
    """Return names in order of their numbers, then of the alphabet."""
    return sorted(names, key=lambda name: (-names[name], name))


def listed(names: Collection[str]) -> str:
    """List names for a message, at most MOST_NAMES of them."""
    ordered = by_number(names) if isinstance(names, Counter) else sorted(names)
    shown = ", ".join(printable(name[:40]) for name in ordered[:MOST_NAMES]) or "nothing"
    return f"{shown} and {len(ordered) - MOST_NAMES} more" if len(ordered) > MOST_NAMES else shown


def _near(name: str, names: Iterable[str]) -> str:
    spelled = {one.lower(): one for one in names}
    near = difflib.get_close_matches(name.lower(), spelled, n=1)
    return f"did you mean {printable(spelled[near[0]][:40])}" if near else ""


def _sample(source: ShardSource) -> Iterable[dict[str, object]]:
    for number in np.linspace(0, len(source) - 1, min(LOOKED_AT, len(source)), dtype=np.int64).tolist():
        try:
            yield source.read(source.numbered(number), image=False, mapped=False).fields
        except Skip:  # a defect is counted when training reads the record
            continue
