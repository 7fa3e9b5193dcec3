"""Read `key=value` words into dataclasses, for the commands that train nothing."""

import difflib
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from common.errors import (
    EXIT_CONFIGURATION,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    ConfigurationError,
    ReadingStopped,
    StorageFailed,
)
from common.field_docs import help_text
from common.overrides import as_typed, check_choices, check_phase_keys, check_read, open_names, stored_schema
from common.terminal import use_utf8
from common.values import in_one_line, type_at, typed

PHASES = dict[str, dict[str, Any]]  # schema for `compose_groups`: a phase may hold keys of any group
CONF = Path(__file__).resolve().parent.parent / "conf"

Options = TypeVar("Options")


def parse(arguments: Sequence[str], kind: type[Options]) -> Options:
    """Read `key=value` words into the dataclass `kind`; for `--help`, print its options and exit.

    Raises ConfigurationError for unknown keys and values of a wrong type.
    """
    if {"-h", "--help"} & set(arguments):
        print(help_text(inspect.getdoc(inspect.getmodule(kind)), kind))
        raise SystemExit(0)
    for argument in arguments:
        if "=" not in argument:
            raise ConfigurationError(f"{argument!r} is not of the form key=value; write it so.")
        key = argument.partition("=")[0]
        known = [field.name for field in fields(cast(Any, kind))]
        if key.partition(".")[0].partition("[")[0] not in known:
            raise ConfigurationError(f"{key} is not an option; known here: {', '.join(known)}.")
    try:
        return typed(kind, OmegaConf.from_dotlist([_as_typed(argument, kind) for argument in arguments]))
    except OmegaConfBaseException as error:
        raise ConfigurationError(in_one_line(error)) from error


def _as_typed(argument: str, kind: type) -> str:
    """Quote the value of a field of text where YAML would read a number, a bool or, after a colon, a mapping."""
    key, _, raw = argument.partition("=")
    try:
        plain = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={raw}"]))
    except (YAMLError, ValueError) as error:  # or an integer of thousands of digits
        raise ConfigurationError(f"{argument!r} cannot be read as YAML; put the value in quotes.") from error
    other = isinstance(cast(dict[str, Any], plain)["value"], bool | int | float | dict)
    return f"{key}={json.dumps(raw)}" if other and type_at(kind, key.split(".")) is str else argument


def run_command(main: Callable[[Sequence[str]], None]) -> None:
    """Run `main` on the words of the command line; print an expected error as one sentence and exit with its code."""
    use_utf8()
    try:
        main(sys.argv[1:])
    except ConfigurationError as error:
        print(f"Configuration: {error}", file=sys.stderr)
        sys.exit(EXIT_CONFIGURATION)
    except ReadingStopped as error:
        print(error, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED if isinstance(error, StorageFailed) else EXIT_STOPPED)


def split_own(words: Sequence[str], kind: type[Options]) -> tuple[Options, list[str]]:
    """Return a command's own options, of the dataclass `kind`, and the words that are left for the configuration."""
    names = {field.name for field in fields(cast(Any, kind))} | {"-h", "--help"}
    own = [word for word in words if word.partition("=")[0] in names]
    return parse(own, kind), [word for word in words if word not in own]


def read_words(
    words: Sequence[str], kind: type[Options], command: str, reads: Sequence[str], phase_reads: Sequence[str]
) -> tuple[Options, list[str]]:
    """Return the options of a command, of the dataclass `kind`, and the overrides of the configuration that it reads.

    `reads`: the keys that it reads, `phase_reads` those of a phase. Raises ConfigurationError for other ones.
    """
    own, overrides = split_own(words, kind)
    check_read(overrides, reads, command)
    check_phase_keys(overrides, phase_reads, command)
    return own, overrides


def compose_groups(words: Sequence[str], groups: Mapping[str, Any]) -> dict[str, Any]:
    """Return these groups of conf/pretrain.yaml, composed with `words`, as plain values.

    `groups`: the schema of each group: a dataclass, `dict[str, <dataclass>]`, or a plain default. With it, a folder
    below `train` composes parts of a run's configuration without importing `RunConfig`. Raises ConfigurationError.
    """
    kinds = {f"{group}.": kind for group, kind in groups.items() if isinstance(kind, type) or get_origin(kind)}
    schema = {group: _node(kind) for group, kind in groups.items()}
    try:
        check_choices(words, CONF)
        with stored_schema("run_schema", schema), initialize_config_dir(str(CONF), version_base=None):
            composed = compose("pretrain", open_names(as_typed(words, kinds), kinds))
        return {group: OmegaConf.to_container(composed[group], resolve=True) for group in groups}
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigurationError(sentence(error)) from error


def first_phase(phases: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return name and settings of the first phase. Raises ConfigurationError where there is none."""
    for name, phase in phases.items():
        return name, phase or {}
    raise ConfigurationError("phases is empty; give at least one phase (see conf/phases).")


def _node(kind: Any) -> Any:
    if get_origin(kind) is dict:
        element = get_args(kind)[1]
        return DictConfig({}, element_type=element if is_dataclass(element) else Any)
    return OmegaConf.structured(kind) if isinstance(kind, type) else kind


def sentence(error: BaseException) -> str:
    """Return one line with the mistake and the change to make, for an error of ours, of Hydra or of OmegaConf."""
    chain = _causes(error)
    for link in chain:
        if isinstance(link, ConfigurationError):
            return str(link)
        if isinstance(link, MissingConfigException):
            return _missing_option(link)
        if isinstance(link, OverrideParseException):
            return f"{link.override!r} cannot be read as key=value ({_one_line(str(link))})"
    if found := re.match(r"Could not delete from config\. '(.+)' does not exist\.", str(error)):
        return f"{found[1]} does not exist; there is nothing to leave out."
    for link in chain:
        if isinstance(link, MissingMandatoryValue) and link.full_key:
            return f"{link.full_key} is not given; set it on the command line."
        if isinstance(link, OmegaConfBaseException) and link.full_key:
            return _bad_key(link)
    return _one_line(str(error))


def _causes(error: BaseException | None) -> list[BaseException]:
    """Return the error and those that caused it, innermost first."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.insert(0, error)
        error = error.__cause__ or error.__context__
    return chain


def _missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    if option == "slurm_array":  # hydra_plugins/slurm_array.py registers it where submitit is installed
        return "hydra/launcher=slurm needs the extra `slurm`: pip install '.[slurm]'."
    if not option or not error.options:
        return _one_line(str(error))
    near = difflib.get_close_matches(option, error.options, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{group}={option} does not exist; {hint}choose one of {', '.join(error.options)}."


def _bad_key(error: OmegaConfBaseException) -> str:
    what = _one_line(str(error.msg or error).split("full_key:")[0])
    key = str(error.full_key)
    if "not in" not in what:
        return what if what.startswith(key) else f"{key}: {what}"
    parent, _, leaf = key.rpartition(".")
    known: list[str] = []
    if is_dataclass(error.object_type):  # also for an item of a list, whose index OmegaConf leaves out of the key
        known = [field.name for field in fields(error.object_type)]
    elif isinstance(error.parent_node, DictConfig):
        known = [str(name) for name in error.parent_node]
    near = difflib.get_close_matches(leaf, known, 1)
    prefix = f"{parent}." if parent else ""
    hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(prefix + name for name in known)}."
    return f"{key} is not a setting; {hint}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
