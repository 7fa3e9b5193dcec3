"""Turn a composed configuration into the typed settings of a run, with lengths in examples resolved into steps."""

import difflib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import MISSING, DictConfig, OmegaConf

from common.errors import ConfigurationError
from common.values import PATH, typed
from data.config import DataConfig
from data.labels import Labels
from model.config import MT5Config, ViTConfig
from model.weights.source import TOWERS
from train.config import RunConfig, RunSettings, ScheduleConfig
from train.settings.from_task import take_from_task
from train.settings.from_weights import take_from_weights


@dataclass
class ComposedRun(RunSettings):
    """The settings of a run before `examples` is resolved: a number of steps may be left out."""

    steps: int | None = None  # type: ignore[assignment]
    """See RunSettings."""

    def __post_init__(self) -> None:
        """Check nothing: the resolved settings are checked."""


@dataclass
class ComposedSchedule(ScheduleConfig):
    """The schedule before `warmup_examples` is resolved: a number of steps may be left out."""

    warmup_steps: int | None = None  # type: ignore[assignment]
    """See ScheduleConfig."""

    def __post_init__(self) -> None:
        """Check nothing: the resolved schedule is checked."""


@dataclass
class ComposedData(DataConfig):
    """The data before null values are taken: `tokenizer` from the weights, the shape of rows from the task."""

    tokenizer: str | None = field(default=MISSING, metadata=PATH)  # type: ignore[assignment]
    """See DataConfig."""
    encoder_length: int | None = MISSING  # type: ignore[assignment]
    """See DataConfig."""
    num_streams: int | None = MISSING  # type: ignore[assignment]
    """See DataConfig."""


def _nullable(kind: type) -> type:
    """Return a dataclass whose settings may be null until they are taken from the weights; nothing is checked."""
    hints = get_type_hints(kind)
    settings = [(one.name, hints[one.name] | None, field(default=one.default)) for one in fields(kind)]
    return make_dataclass(
        f"Composed{kind.__name__}", settings, bases=(kind,), namespace={"__post_init__": lambda self: None}
    )


# The groups of a composed configuration in which a value may be left out, and their schemas.
COMPOSED = {
    "run": ComposedRun,
    "schedule": ComposedSchedule,
    "data": ComposedData,
    "vit": _nullable(ViTConfig),
    "mt5": _nullable(MT5Config),
}


def to_run_config(
    composed: DictConfig, weights: bool = True, earlier: Mapping[Path, RunConfig] | None = None
) -> RunConfig:
    """Return the typed settings of a composed configuration, not yet checked against each other.

    `weights`: whether first weights are read, so that files which an experiment leaves open must be given. `earlier`:
    settings of runs that are still to be trained, by folder. Raises ConfigurationError for a value that is impossible
    on its own.
    """
    composed = composed.copy()
    for tower in ("vit", "mt5"):
        if "weights" in composed and OmegaConf.is_missing(composed.weights, tower):
            if weights and not composed.run.get("from_scratch"):
                raise ConfigurationError(
                    f"weights.{tower} is not given; name a folder or a file of the pretrained {TOWERS[tower]} (or set "
                    f"run.from_scratch=true and weights.{tower}=null)."
                )
            composed.weights[tower] = None
    plain = OmegaConf.to_container(composed)  # plain: of typed values a merge takes keys added by `+`
    _check_components(plain.get("mixture") or {})  # type: ignore[union-attr]
    if not plain.get("phases"):  # type: ignore[union-attr]
        raise ConfigurationError("phases is empty; give at least one phase (see conf/phases).")
    examples = [_take_examples(plain, *key) for key in (("run", "examples", "steps"),
                                                        ("schedule", "warmup_examples", "warmup_steps"))]  # fmt: skip
    take_from_weights(plain, earlier or {})  # type: ignore[arg-type]
    if "task" in composed:
        take_from_task(plain, OmegaConf.to_container(composed.task, resolve=True))  # type: ignore[arg-type]
    config = typed(RunConfig, plain)
    labels = config.data.tokenizer  # where it is still to come, the checks count no class
    if config.classifier.head != "none" and not config.classifier.num_classes and os.path.exists(labels):
        config.classifier.num_classes = len(Labels(labels).names)
    if examples[0] is not None:
        config.run.steps = _steps_of_run(config, examples[0])
    if examples[1] is not None:
        config.schedule.warmup_steps = _steps_after(config, examples[1])
    return config


def _take_examples(plain: Any, group: str, examples: str, steps: str) -> float | None:
    """Return a length in examples and leave both keys out, where it replaces the one in steps."""
    settings = plain.get(group) or {}
    if settings.get(steps) is None:
        settings.pop(steps, None)
    if settings.get(examples) is None:
        return None
    if steps in settings:
        raise ConfigurationError(
            f"{group}.{steps}={settings[steps]} and {group}.{examples}={settings[examples]} give the same length "
            "twice; set one of them to null."
        )
    length = float(settings.pop(examples))
    if not 1 <= length < math.inf:
        raise ConfigurationError(f"{group}.{examples}={length:g} must be at least 1.")
    return length


def _steps_of_run(config: RunConfig, examples: float) -> int:
    """Return how many steps of the phases, each with its own batch size, take so many examples."""
    sizes = [phase.global_batch_size or config.data.global_batch_size for phase in config.phases.values()]
    given = [phase.steps for phase in config.phases.values()]
    rest = examples - sum((steps or 0) * size for steps, size in zip(given, sizes, strict=True))
    if None not in given:
        if rest:
            raise ConfigurationError(
                f"run.examples={examples:g} is not what the phases take ({examples - rest:g}); leave run.examples out, "
                "or the steps of one phase."
            )
        return sum(steps or 0 for steps in given)
    if rest <= 0:
        raise ConfigurationError(
            f"run.examples={examples:g} leaves none for phase {list(config.phases)[given.index(None)]}, as the others "
            f"take {examples - rest:g}; ask for more."
        )
    return sum(steps or 0 for steps in given) + math.ceil(rest / sizes[given.index(None)])


def _steps_after(config: RunConfig, examples: float) -> int:
    """Return after how many steps of the run so many examples were read."""
    done, total = 0, config.run.steps
    given = sum(phase.steps or 0 for phase in config.phases.values())
    for phase in config.phases.values():
        steps, size = phase.steps or total - given, phase.global_batch_size or config.data.global_batch_size
        if examples <= steps * size:
            break
        done, examples = done + steps, examples - steps * size
    return done + math.ceil(examples / size)


def _check_components(mixture: dict[str, Any]) -> None:
    """Raise ConfigurationError for a component that lacks a required key, as one of a misspelled name does."""
    required = ("source", "objective", "weight")
    given = {
        name: [key for key in required if (one or {}).get(key, MISSING) == MISSING] for name, one in mixture.items()
    }
    for name, missing in given.items():
        if missing:
            near = difflib.get_close_matches(name, [other for other in mixture if not given[other]], 1)
            hint = f"did you mean mixture.{near[0]}?" if near else f"give it, or leave mixture.{name} out."
            raise ConfigurationError(f"mixture.{name}.{missing[0]} is not given; {hint}")
