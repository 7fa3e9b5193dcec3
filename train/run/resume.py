"""Compare the settings of a run with those of its newest checkpoint: report changes, and refuse those that alter steps.

The settings in `FIXED` decide which examples a step trains on, and how rows hold them. As long as they stay, a step
number determines the whole state of a run. `run.allow_changes` allows changes of the settings that it names.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from common.errors import ConfigurationError
from train.config import Phase, RunConfig, ScheduleConfig, to_dict
from train.phases import Span, find_span, lay_out
from train.schedule import learning_rate
from train.settings.facts import Facts, described

SOURCES, PHASES, MIXTURE = "data.sources", "phases", "mixture"
ROWS = (
    *(
        "data.global_batch_size",
        "data.num_streams",
        "data.epoch",
        "data.fields",
        "data.pool_examples",
        "data.encoder_length",
        "data.decoder_length",
        "data.target_length",
        "data.images_per_row",
    ),
    *("data.holdout", "data.exif_orientation", "data.max_megapixels", "data.max_member_mib", "model.image_size"),
)  # a phase may set each of them under its name without the group
FIXED = ("run.seed", *ROWS, MIXTURE, "optimizer.name")
ALLOWABLE = (*FIXED, SOURCES, PHASES)
MODEL = ("vit", "mt5", "classifier")
# Settings that change no step: names, folders, what a run reports, and settings of other commands.
SILENT = (
    "run.name",
    "run.folder",
    "run.allow_changes",
    "run.rehearse",
    "run.from_scratch",
    "weights",
    "tracker",
    "profile",
)
NOTHING = "nothing"


@dataclass(frozen=True)
class Change:
    """A setting whose value differs from that in the newest checkpoint."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.before)} -> {_shown(self.now)}"


def changes(saved: Mapping[str, Any], config: RunConfig) -> list[Change]:
    """Return the settings that changed since `saved` (those of a checkpoint), without those that change no step.

    A setting that `saved` lacks, because an earlier version wrote it, had its default. One that no longer exists is
    left out.
    """
    before, now, defaults = _flat(saved), _flat(to_dict(config)), _defaults()
    found = []
    for key in [*now, *(key for key in before if key not in now and _is_item(key))]:
        old, new = before.get(key, NOTHING if _is_item(key) else defaults.get(key)), now.get(key, NOTHING)
        known = key in before or key in defaults or _is_item(key)
        same = _same(old, new) if _under(key, (MIXTURE,)) else old == new
        if key == MIXTURE and set(old or ()) != set(new):
            continue  # added and removed components are changes themselves -> the list of names is not
        if known and not same and not _under(key, SILENT):
            found.append(Change(key, old, new))
    return found


def check_resume(saved: Mapping[str, Any], config: RunConfig, done: int) -> None:
    """Raise ConfigurationError where a changed setting alters the steps after step `done`, or the model.

    `saved`: the settings of the checkpoint. One sentence names all such changes.
    """
    found, allowed = changes(saved, config), config.run.allow_changes
    check_same_model(saved, config)
    if not _under(PHASES, allowed):
        _check_phases(saved, config, done)
    phase = find_span(lay_out(config.phases, config.run.steps), done + 1).name
    of_phase = [*(_key_in_phase(phase, key) for key in ROWS), f"{PHASES}.{phase}.objectives"]
    if saved_phase(saved, done) != phase:  # the phase has not begun -> its rows may change
        of_phase = []
    now = to_dict(config)
    same = [key for key in ROWS if _in_phase(saved, phase, key) == _in_phase(now, phase, key)]
    moved = [either for key in same for either in (key, _key_in_phase(phase, key))]
    fixed = [c for c in found if _under(c.key, (*FIXED, *of_phase)) and c.key not in moved]
    refused = [c for c in fixed if not _under(c.key, allowed)]
    if refused:
        names = dict.fromkeys(next((f for f in ALLOWABLE if _under(c.key, (f,))), c.key) for c in refused)
        was = "; ".join(f"{change.key}={_shown(change.before)}, now it is {_shown(change.now)}" for change in refused)
        raise ConfigurationError(
            f"{config.run.folder} holds a run with {was}; the steps to come would differ from those of that run; "
            f"choose another run.name, or go on all the same with run.allow_changes=[{','.join(names)}]."
        )


def check_same_model(saved: Mapping[str, Any], config: RunConfig, keys: Sequence[str] = MODEL) -> None:
    """Raise ConfigurationError where the settings `saved` describe another model than `config`."""
    for change in changes(saved, config):
        if _under(change.key, keys):
            raise ConfigurationError(
                f"{config.run.folder} holds a run with {change.key}={_shown(change.before)}, now it is "
                f"{_shown(change.now)}; choose another run.name."
            )


def check_allowed(names: Sequence[str]) -> None:
    """Raise ConfigurationError for a name in `run.allow_changes` that allows nothing."""
    for name in names:
        if not _under(name, ALLOWABLE):
            near = difflib.get_close_matches(name, ALLOWABLE, 1)
            hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(ALLOWABLE)}."
            raise ConfigurationError(f"run.allow_changes={name} names no setting whose change is refused; {hint}")


def note(saved: Mapping[str, Any], config: RunConfig, done: int) -> str | None:
    """Return a sentence with every setting that changed since the checkpoint of step `done`, None where none did."""
    if not saved:
        return f"The checkpoint of step {done} holds no settings, so changes since then are not reported."
    found = changes(saved, config)
    if not found:
        return None
    before, now = _rate(saved, done + 1), learning_rate(config.schedule, done + 1, config.run.steps)
    rate = ""
    if before is not None and before != now:
        rate = f"; so the learning rate of step {done + 1} is {now:.4g} instead of {before:.4g}"
    return f"Changed since step {done}: {'; '.join(map(str, found))}{rate}."


def check_sources(saved: Mapping[str, Any], facts: Facts, config: RunConfig) -> None:
    """Raise ConfigurationError where a source holds other records than when the newest checkpoint was saved.

    A shard that is added or removed changes the order of all records of its source.
    """
    if _under(SOURCES, config.run.allow_changes):
        return
    for source, now in facts.items():
        if (before := saved.get(source, now)) != now:
            raise ConfigurationError(
                f"{config.run.folder} was trained on {described(before)} of {source}, now there are {described(now)}; "
                "the steps to come would read other records; bring back the old ones, choose another run.name, or "
                f"go on all the same with run.allow_changes=[{SOURCES}]."
            )


def note_sources(saved: Mapping[str, Any] | None, facts: Facts, done: int) -> str | None:
    """Return one sentence with every source that changed since the checkpoint of step `done`, None where none did."""
    if saved is None:
        return f"The checkpoint of step {done} holds no facts of its sources, so they are not compared."
    found = [f"{source}: {described(saved[source])} -> {described(now)}"
             for source, now in facts.items() if saved.get(source, now) != now]  # fmt: skip
    return f"Changed since step {done}: {'; '.join(found)}." if found else None


def saved_phase(saved: Mapping[str, Any], step: int) -> str | None:
    """Return the name of a step's phase under the settings of a checkpoint, None where they cannot be read."""
    laid_out = _saved_spans(saved)
    return find_span(laid_out, step).name if laid_out else None


def _check_phases(saved: Mapping[str, Any], config: RunConfig, done: int) -> None:
    """Raise ConfigurationError where a step that is done would belong to another phase; new steps are of the last."""
    laid_out = lay_out(config.phases, config.run.steps)
    for span in _saved_spans(saved):
        for step in {span.first, min(span.last, done)}:
            now = find_span(laid_out, step)
            if span.first <= done and now.name != span.name:
                raise ConfigurationError(
                    f"{config.run.folder} holds a run whose step {step} was of phase {span.name!r}; with "
                    f"run.steps={config.run.steps} and these phases it would be of {now.name!r}; give all "
                    "phases but the last the steps that they took, and the last one none, so that new steps are of the "
                    "last phase."
                )


def _key_in_phase(phase: str, key: str) -> str:
    return f"{PHASES}.{phase}.{key.partition('.')[2]}"


def _in_phase(settings: Mapping[str, Any], phase: str, key: str) -> Any:
    """Return the value of a setting in a phase, which may have its own; the default where neither is saved."""
    group, _, name = key.partition(".")
    own = settings.get(PHASES, {}).get(phase, {}).get(name)
    return settings.get(group, {}).get(name, _defaults().get(key)) if own is None else own


def _saved_spans(saved: Mapping[str, Any]) -> list[Span]:
    try:
        phases = {name: Phase(steps=phase["steps"]) for name, phase in saved[PHASES].items()}
        return lay_out(phases, int(saved["run"]["steps"]))
    except (KeyError, TypeError, ValueError):  # also ConfigurationError (a ValueError): saved by another version
        return []


def _rate(saved: Mapping[str, Any], step: int) -> float | None:
    try:
        names = {field.name for field in fields(ScheduleConfig)}
        schedule = ScheduleConfig(**{name: value for name, value in saved["schedule"].items() if name in names})
        return learning_rate(schedule, step, int(saved["run"]["steps"]))
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


@cache
def _defaults() -> dict[str, Any]:
    return _flat(to_dict(RunConfig()))


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    return dict(_items("", settings))


def _items(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if prefix == PHASES and isinstance(value, Mapping):
        yield PHASES, list(value)
        for name, phase in value.items():
            yield from ((f"{PHASES}.{name}.{key}", item) for key, item in (vars(Phase()) | phase).items())
    elif prefix == MIXTURE and isinstance(value, Mapping):
        used = {name: component for name, component in value.items() if component.get("weight", 1)}
        yield MIXTURE, list(used)
        yield from ((f"{MIXTURE}.{name}", component) for name, component in used.items())
    elif isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _items(f"{prefix}.{key}" if prefix else str(key), item)
    else:
        yield prefix, value


def _is_item(key: str) -> bool:
    """Return whether a key is of a table that the user fills (components, sources), so that its absence is a value."""
    return _under(key, (MIXTURE, SOURCES))


def _same(before: Any, now: Any) -> bool:
    """Return whether two components are equal; a key that one of them lacks came with another version."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return all(before[key] == now[key] for key in before.keys() & now.keys())
    return bool(before == now)


def _under(key: str, names: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return str(value) if isinstance(value, str | float) else json.dumps(value)
