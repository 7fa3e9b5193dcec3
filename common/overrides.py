"""Prepare the words of a command line for Hydra: keep text as typed; refuse renamed, misspelled and unread keys."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from antlr4 import InputStream
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, QuotedString
from hydra.errors import HydraException
from hydra.grammar.gen.OverrideLexer import OverrideLexer

from common.errors import ConfigurationError
from common.values import type_at

# Key of an earlier version -> key of today.
RENAMED = {
    "parallel.micro_batch": "parallel.micro_batch_size",
    "parallel.persistent_elements": "parallel.param_persistence_threshold",
    "data.batch_examples": "data.global_batch_size",
}


def check_renamed(words: Sequence[str]) -> None:
    """Raise ConfigurationError for a key of an earlier version; the message names the key of today."""
    names = {old.partition(".")[2]: new.partition(".")[2] for old, new in RENAMED.items()}
    for word in words:
        key, value = _key(word), word.partition("=")[2]
        group, _, name = key.rpartition(".")
        now = RENAMED.get(key)
        if group.startswith("phases.") and name in names:
            now = f"{group}.{names[name]}"
        if now:
            raise ConfigurationError(f"{key} is now {now}; write {now}={value}.")
        if key == "run.initial_weights":
            raise ConfigurationError(
                "run.initial_weights is now weights.vit and weights.mt5; write weights.vit=<folder or file> for the "
                "ViT, weights.mt5=<folder or file> for the mT5, or null for none."
            )
        if group == "vit_pretraining":
            raise ConfigurationError(
                "vit_pretraining is gone, as train.pretrain_vit is a run like any other; write run.steps, "
                "data.global_batch_size, schedule.peak and run.folder, and weights.vit=<that folder> for PaLI."
            )
        if key == "stage":
            raise ConfigurationError(f"stage is now phases; write phases={value or 'frozen_224'}.")
        if key.startswith("stage.phases"):
            raise ConfigurationError(
                "stage.phases is now phases, a mapping by name; write phases.<name>.image_size=224 for one key of a "
                "phase, or phases.<name>={…} for a whole one."
            )
        if key.startswith("mixture.components"):
            raise ConfigurationError(
                "mixture.components is now mixture, a mapping by name; write mixture.<name>.weight=1 for one key of a "
                "component, or mixture.<name>={source: …, objective: …, weight: …} for a whole one."
            )


def check_duplicates(words: Sequence[str]) -> None:
    """Raise ConfigurationError for a mapping that has a key twice: Hydra would silently take its last value."""
    for word in words:
        open_keys: list[set[str] | None] = []  # of each open bracket: the keys so far of a mapping, None of another
        name: str | None = ""  # the key that is being read, None after its colon
        for token in _tokens(word) if "{" in word else ():
            if token.type in (OverrideLexer.BRACE_OPEN, OverrideLexer.BRACKET_OPEN, OverrideLexer.POPEN):
                open_keys.append(set() if token.type == OverrideLexer.BRACE_OPEN else None)
                name = ""
            elif token.type in (OverrideLexer.BRACE_CLOSE, OverrideLexer.BRACKET_CLOSE, OverrideLexer.PCLOSE):
                open_keys = open_keys[:-1]
                name = None
            elif token.type == OverrideLexer.COMMA:
                name = ""
            elif token.type == OverrideLexer.COLON and name is not None:
                keys, key, name = open_keys[-1] if open_keys else None, name.strip().strip("'\""), None
                if keys is not None and key in keys:
                    raise ConfigurationError(f"{_key(word)} has {key} twice in {word}; leave one of them out.")
                if keys is not None:
                    keys.add(key)
            elif name is not None:
                name += token.text


def _tokens(word: str) -> list[Any]:
    lexer = OverrideLexer(InputStream(word))
    lexer.removeErrorListeners()  # Hydra reports what it cannot read
    tokens: list[Any] = lexer.getAllTokens()
    return tokens


def as_typed(words: Sequence[str], kinds: dict[str, Any]) -> list[str]:
    """Quote text that looks like a number, a bool or a home folder, so that Hydra keeps the typed characters.

    `kinds`: dataclasses by the beginning of their keys ("" for the whole configuration).
    """
    parser = OverridesParser.create()
    return [_quoted(word, kinds, parser) if "=" in word and not word.startswith("-") else word for word in words]


def check_choices(words: Sequence[str], folder: Path) -> None:
    """Raise ConfigurationError for an old key, and for a group's choice that is not text, on which Hydra crashes.

    And for a mapping with a key twice. `folder` holds a folder of YAML files for each group.
    """
    check_renamed(words)
    check_duplicates(words)
    parser = OverridesParser.create()
    for word in words:
        group = folder / _key(word)
        if word.startswith(("-", "~", "++")) or "=" not in word or not _key(word) or not group.is_dir():
            continue
        try:
            value = parser.parse_override(word).value()
        except (HydraException, ValueError):  # Hydra will refuse it
            continue
        choices = value.list if isinstance(value, ChoiceSweep) else value if isinstance(value, list) else [value]
        if not all(isinstance(choice, str | QuotedString) for choice in choices):
            names = sorted(path.stem for path in group.glob("*.yaml"))
            hint = f"choose one of {', '.join(names)}, or leave it out." if names else "leave it out."
            raise ConfigurationError(f"{word} is not a file of conf/{_key(word)}; {hint}")


def open_names(words: Sequence[str], kinds: dict[str, Any], unseen: bool = False) -> list[str]:
    """Rewrite words whose key lies in a mapping by name, because Hydra refuses new names.

    `data.sources.webli=x` becomes `++data.sources.webli=x`. An entry that is a dataclass is merged into its mapping:
    `mixture.mine={…}` becomes `++mixture={mine: {…}}`. A field of such an entry (`mixture.ocr.weight=0`) stays as it
    is, so that Hydra refuses a misspelled name. Before a word below such a field (`phases.full_588.objectives.ocr=1`)
    comes `phases.full_588={}`: it changes nothing, and Hydra refuses it where the entry does not exist. `unseen`: merge
    fields too and refuse nothing, because Hydra does not have the entries.
    """
    made: list[str] = []
    for word in words:
        opened = "=" in word and word[0] not in "-~"
        if opened and not unseen:
            made += _presence(word, kinds)
        made.append(_opened(word, kinds, unseen) if opened else word)
    return made


@contextmanager
def stored_schema(name: str, node: Any) -> Iterator[None]:
    """Store a schema for the body of the `with` statement, unless Hydra's store has one of this name.

    It is removed afterwards, because the store belongs to the whole process and other callers need other groups.
    """
    store = ConfigStore.instance()
    if f"{name}.yaml" in store.repo:
        yield
        return
    store.store(name, node)
    try:
        yield
    finally:
        del store.repo[f"{name}.yaml"]


def check_read(words: Sequence[str], reads: Sequence[str], command: str, known: Any = None) -> None:
    """Raise ConfigurationError for a word whose key is not among `reads`, which `command` would ignore.

    An entry of `reads` allows a key and all keys below it; with a final "=" that key alone, such as the choice of a
    group. `known`: the dataclass of all settings, if Hydra is to refuse the keys that no command has.
    """
    check_renamed(words)
    for word in words:
        key = _key(word)
        if word.startswith("-") or not key or key.partition(".")[0] == "hydra" or "hydra.launcher" in key:
            continue
        if known is not None and type_at(known, _path(key)) is None:
            continue
        if not any(f"{key}=" == name or key == name or key.startswith(f"{name}.") for name in reads):
            raise ConfigurationError(f"{command} does not read {key}; leave it out (it reads {', '.join(reads)}).")


def check_for_saved_run(words: Sequence[str], folder: Path) -> None:
    """Raise ConfigurationError for a word that cannot change the settings of a saved run, which Hydra does not see.

    Such words leave out a key, or choose a file of a group other than `parallel` and `task`. `folder`: as of
    check_choices.
    """
    for word in words:
        key, _, value = word.lstrip("+").partition("=")
        if word.startswith("~"):
            raise ConfigurationError(
                f"{word} cannot leave out a setting of a saved run; write mixture.<name>.weight=0 for a component."
            )
        if key not in ("", "parallel", "task") and (folder / key).is_dir() and not value.strip(" '\"").startswith("{"):
            if key.startswith(("-", "hydra")):
                continue
            raise ConfigurationError(
                f"{word} cannot choose a file of conf/{key} for a saved run; set single keys of the run instead."
            )


def check_phase_keys(words: Sequence[str], reads: Sequence[str], command: str) -> None:
    """Raise ConfigurationError for a key of one phase (`phases.<name>.<key>`) that is not among `reads`."""
    for word in words:
        path = _path(_key(word))
        if len(path) < 3 or path[0] != "phases" or path[2] in reads:
            continue
        near = difflib.get_close_matches(path[2], reads, 1)
        hint = f"did you mean {'.'.join([*path[:2], near[0]])}?" if near else "leave it out."
        raise ConfigurationError(f"{command} does not read {_key(word)}; {hint}")


def _path(key: str) -> list[str]:
    return re.findall(r"[^.\[\]]+", key)


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")


def _quoted(word: str, kinds: dict[str, Any], parser: OverridesParser) -> str:
    key, _, raw = word.partition("=")
    if not _is_text(_key(word), kinds):
        return word
    raw = raw.strip()
    if re.fullmatch(r"~[^'\"]*", raw):
        return f"{key}='{raw}'"
    try:
        value = parser.parse_override(word).value()
    except HydraException:  # Hydra reports it, except for the braces of a pattern, which are text
        return f"{key}='{raw}'" if re.fullmatch(r"[^'\"\\]*\{[^'\"\\]*\}[^'\"\\]*", raw) else word
    except ValueError as error:  # an integer of thousands of digits
        raise ConfigurationError(f"{key} is a number of too many digits; shorten or quote it.") from error
    if isinstance(value, bool | int | float):
        return f"{key}='{raw}'"
    if isinstance(value, ChoiceSweep) and len(value.list) == len(parts := raw.split(",")):
        quoted = (
            f"'{part.strip()}'" if isinstance(each, bool | int | float) else part
            for part, each in zip(parts, value.list, strict=True)
        )
        return f"{key}={','.join(quoted)}"
    return word


def _opened(word: str, kinds: dict[str, Any], unseen: bool) -> str:
    key, value = _key(word), word.partition("=")[2]
    for beginning, kind in kinds.items():
        path = _path(key[len(beginning) :]) if key.startswith(beginning) else []
        mappings = [end for end in range(len(path)) if get_origin(type_at(kind, path[:end])) is dict]
        if not mappings:
            mapping = type_at(kind, path) if path else None
            if get_origin(mapping) is dict and not is_dataclass(get_args(mapping)[-1]):
                return f"++{word.lstrip('+')}"
            continue
        outer, inner = path[: mappings[0]], path[mappings[0] :]
        if not is_dataclass(get_args(type_at(kind, outer))[-1]):
            return f"++{word.lstrip('+')}"
        is_field = len(inner) > 1 and len(mappings) == 1 and get_origin(type_at(kind, path)) is not dict
        if is_field and not unseen:
            return word
        for name in reversed(inner):
            value = f"{{{name}: {value}}}"
        return f"++{beginning}{'.'.join(outer)}".rstrip(".") + f"={value}"
    return word


def _presence(word: str, kinds: dict[str, Any]) -> list[str]:
    """Return the word that Hydra refuses where the entry above a forced key does not exist; none for other keys."""
    key = _key(word)
    for beginning, kind in kinds.items():
        path = _path(key[len(beginning) :]) if key.startswith(beginning) else []
        mappings = [end for end in range(len(path)) if get_origin(type_at(kind, path[:end])) is dict]
        forced = len(mappings) > 1 or get_origin(type_at(kind, path)) is dict
        if mappings and len(path) > mappings[0] + 1 and forced:
            return [f"{beginning}{'.'.join(path[: mappings[0] + 1])}={{}}"]
    return []


def _is_text(key: str, kinds: dict[str, Any]) -> bool:
    for beginning, kind in kinds.items():
        if key.startswith(beginning) and type_at(kind, _path(key[len(beginning) :])) is str:
            return True
    return False
