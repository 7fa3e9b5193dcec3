"""`key=value` words of a command line as a dataclass, for the programs that need none of Hydra's groups."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from errors import ConfigurationError

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
            OmegaConf.from_dotlist([argument])
        except YAMLError as error:
            raise ConfigurationError(f"{argument!r} cannot be read; quote the value as YAML does.") from error
    try:
        merged = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.from_dotlist(list(arguments)))
        return cast(Options, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigurationError(f"{error.full_key}: {str(error).splitlines()[0].rstrip('.')}.") from error
