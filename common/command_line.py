"""`key=value` words of a command line as a dataclass, for the programs that need none of Hydra's groups."""

import json
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.errors import ConfigurationError
from common.values import in_one_line, type_at, typed

Options = TypeVar("Options")


def parse(arguments: Sequence[str], kind: type[Options]) -> Options:
    """`kind` with what the words say; `--help` shows its options and ends the process.

    Raises ConfigurationError for unknown keys and values of a wrong type.
    """
    if {"-h", "--help"} & set(arguments):
        print(f"{kind.__doc__}\nkey=value, with these defaults:\n\n{OmegaConf.to_yaml(OmegaConf.structured(kind))}")
        raise SystemExit(0)
    for argument in arguments:
        if "=" not in argument:
            raise ConfigurationError(f"{argument!r} is not of the form key=value.")
        key = argument.partition("=")[0]
        known = [field.name for field in fields(cast(Any, kind))]
        if key.partition(".")[0].partition("[")[0] not in known:
            raise ConfigurationError(f"{key} is not an option; known here: {', '.join(known)}.")
    try:
        return typed(kind, OmegaConf.from_dotlist([_as_typed(argument, kind) for argument in arguments]))
    except OmegaConfBaseException as error:
        raise ConfigurationError(in_one_line(error)) from error


def _as_typed(argument: str, kind: type) -> str:
    """Quote the value of a field of text where YAML would read a number or a bool."""
    key, _, raw = argument.partition("=")
    try:
        plain = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]))
    except (YAMLError, ValueError) as error:  # or an integer of thousands of digits
        raise ConfigurationError(f"{argument!r} cannot be read; quote the value as YAML does.") from error
    number = isinstance(cast(dict[str, Any], plain)["value"], bool | int | float)
    return f"{key}={json.dumps(raw)}" if number and type_at(kind, key.split(".")) is str else argument
