"""Convert plain values into typed settings, and check them."""

import difflib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

import common.strict_omegaconf  # noqa: F401
from common.errors import ConfigurationError

Kind = TypeVar("Kind")
PATH = {"path": True}  # metadata of a field: it names a file or a folder, and `~` in it is expanded
LARGEST = 2**31 - 1  # of any integer setting; beyond it libraries overflow, each in its own way


def typed(kind: type[Kind], plain: Any, where: str = "") -> Kind:
    """Convert plain values into the dataclass `kind` and check each; `where` is the key of the whole.

    Raises ConfigurationError; without `where`, OmegaConf's own errors for unknown keys and wrong types.
    """
    try:
        made = cast(Kind, OmegaConf.to_object(OmegaConf.merge(_schema(cast(Any, kind)), plain)))
    except OmegaConfBaseException as error:
        if not where:
            raise
        raise ConfigurationError(in_one_line(error, where)) from error
    check_values(made, where)
    return made


@cache
def _schema(kind: type) -> Any:
    """Return the dataclass as OmegaConf has it, made once because that takes a third of `typed`; a merge copies it."""
    return OmegaConf.structured(kind)


def replacing(kind: type, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a phase that replace fields of the dataclass `kind`."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in own.items() if name in names and value is not None}


def in_one_line(error: Exception, where: str = "") -> str:
    """Return an error of OmegaConf or Hydra on one line, behind the key it is about; `where` begins the key."""
    cause = error if isinstance(error, OmegaConfBaseException) else error.__cause__ or error
    key = ".".join(filter(None, (where, getattr(cause, "full_key", None))))
    if isinstance(cause, MissingMandatoryValue):
        return f"{key} is not given; set it on the command line."
    text = " ".join(str(cause).split("full_key")[0].split()).rstrip(".")
    return f"{key}: {text}." if key else f"{text}."


def check_values(settings: Any, where: str = "") -> None:
    """Raise ConfigurationError for a value that no setting may have; expand `~` in paths.

    Numbers are finite and integers below 2^31, text is valid UTF-8 without NUL, paths are not empty.
    """
    for field in fields(settings):
        key, value = f"{where}.{field.name}".lstrip("."), getattr(settings, field.name)
        for place, leaf in _leaves(value, key):
            _check_leaf(place, leaf)
        if "path" in field.metadata:
            setattr(settings, field.name, _each(value, key, expand_home))


def expand_home(path: str, where: str = "path") -> str:
    """Expand `~` and `~user`. Raises ConfigurationError for an empty path, an unknown home and a shell's variable."""
    if not path.strip():
        raise ConfigurationError(f"{where} is empty; name a file or a folder.")
    if found := re.search(r"\$\{?(\w+)", path):
        raise ConfigurationError(
            f"{where}={path} holds a variable of the shell, which is not expanded here; write "
            f"${{oc.env:{found[1]}}} instead."
        )
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ConfigurationError(f"{where}={path} begins with a home folder that cannot be found; write it in full.")
    return expanded


def at_least(where: str, least: float, **values: float) -> None:
    """Raise ConfigurationError for a value below `least`; `where` begins the key, such as "run."."""
    for name, value in values.items():
        if value < least:
            raise ConfigurationError(f"{where}{name}={value} must be at least {least}.")


def above(where: str, least: float, **values: float) -> None:
    """Raise ConfigurationError for a value that is not greater than `least`; `where` begins the key, such as "run."."""
    for name, value in values.items():
        if value <= least:
            raise ConfigurationError(f"{where}{name}={value} must be greater than {least}.")


def at_most(where: str, most: float, **values: float) -> None:
    """Raise ConfigurationError for a value above `most`; `where` begins the key, such as "run."."""
    for name, value in values.items():
        if value > most:
            raise ConfigurationError(f"{where}{name}={value} must be at most {most}.")


def one_of(where: str, value: str, choices: Sequence[str]) -> None:
    """Raise ConfigurationError unless `value` is one of the choices."""
    if value not in choices:
        near = difflib.get_close_matches(value, choices, 1)
        hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(choices[:-1])} or {choices[-1]}."
        raise ConfigurationError(f"{where}={value!r} is unknown; {hint}")


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key; a value that is no mapping is one leaf."""
    if not isinstance(value, Mapping):
        return {key: value}
    parts = (flat(part, f"{key}.{name}".lstrip(".")) for name, part in value.items())
    return {name: leaf for part in parts for name, leaf in part.items()}


def type_at(kind: Any, path: Sequence[str]) -> Any:
    """Return the type of the field at `path` below a dataclass, None where there is no such field."""
    if get_origin(kind) in (Union, UnionType):
        return type_at(next(each for each in get_args(kind) if each is not NoneType), path)
    if not path:
        return kind
    if is_dataclass(kind):
        inner = get_type_hints(kind).get(path[0])
    else:
        inner = get_args(kind)[-1] if get_origin(kind) in (list, dict) else None
    return None if inner is None else type_at(inner, path[1:])


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of a setting, or of all settings in a list or dictionary; check a dataclass instead."""
    if is_dataclass(value):
        check_values(value, key)
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield key, name
            yield from _leaves(each, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for index, each in enumerate(value):
            yield from _leaves(each, f"{key}[{index}]")
    else:
        yield key, value


def _check_leaf(key: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigurationError(f"{key}={value} is not finite; give a finite number.")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ConfigurationError(f"{key}={_short(str(value))} must lie between -{LARGEST} and {LARGEST}.")
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigurationError(f"{key}={value!a} holds bytes that are not UTF-8; type it again.") from None
        if "\0" in value:
            raise ConfigurationError(f"{key}={value!r} holds a NUL character; leave it out.")


def _each(value: Any, key: str, change: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _each(each, f"{key}.{name}", change) for name, each in value.items()}
    if isinstance(value, list):
        return [_each(each, f"{key}[{index}]", change) for index, each in enumerate(value)]
    return value if value is None else change(value, key)


def _short(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:20]}… ({len(text)} characters)"
