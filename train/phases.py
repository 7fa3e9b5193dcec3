"""Lay out the phases of a run on its step counter."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from common.errors import ConfigurationError
from common.values import replacing
from data.config import DataConfig, for_objectives
from model.config import ModelConfig
from parallel.config import ParallelConfig
from train.config import Phase, RunConfig
from train.schedule import learning_rate


@dataclass(frozen=True)
class Span:
    """A phase and its steps: `first`..`last`, both included, counted from 1."""

    name: str
    phase: Phase
    first: int
    last: int


def spans(config: RunConfig) -> list[Span]:
    """Return the run's phases with their steps; raise ConfigurationError if they do not add up to `run.steps`."""
    return lay_out(config.phases, config.run.steps)


def lay_out(phases: Mapping[str, Phase], total: int) -> list[Span]:
    """Return the phases one after another on `total` steps; raise ConfigurationError if they do not add up."""
    given = sum(phase.steps or 0 for phase in phases.values())
    open_ended = [name for name, phase in phases.items() if phase.steps is None]
    if len(open_ended) > 1:
        raise ConfigurationError(
            f"phases {' and '.join(open_ended)} have no steps; only one phase may take the remaining steps."
        )
    if open_ended and given >= total:
        raise ConfigurationError(
            f"run.steps={total} leaves no step for phase {open_ended[0]!r}; the others take {given}; set more."
        )
    if not open_ended and given != total:
        raise ConfigurationError(f"The phases take {given} steps; set run.steps={given} (it is {total}).")
    laid_out, first = [], 1
    for name, phase in phases.items():
        steps = phase.steps or total - given
        laid_out.append(Span(name, phase, first, first + steps - 1))
        first += steps
    return laid_out


def find_span(laid_out: list[Span], step: int) -> Span:
    """Return the span of a step (from 1); for a step beyond the end, the last span."""
    return next((span for span in laid_out if step <= span.last), laid_out[-1])


def phase_learning_rate(config: RunConfig, span: Span, step: int) -> float:
    """Return the learning rate of a step of `span`: by the phase's own schedule if it has one, else by the run's."""
    own, factor = span.phase.learning_rate, span.phase.learning_rate_factor
    if own is None:
        return learning_rate(config.schedule, step, config.run.steps) * factor
    return learning_rate(own, step - span.first + 1, span.last - span.first + 1) * factor


def for_phase(config: RunConfig, span: Span) -> RunConfig:
    """Return the run's settings, with those of the phase in their place and the mixture of its objectives."""
    try:
        model, data = _replaced(config.model, span.phase, ModelConfig), _replaced(config.data, span.phase, DataConfig)
        if config.classifier.head != "none":  # an image and EOS for each slot
            data = replace(data, encoder_length=data.images_per_row * (config.vit.num_tokens(model.image_size) + 1))
        return replace(
            config,
            model=model,
            data=data,
            parallel=_replaced(config.parallel, span.phase, ParallelConfig),
            mixture=for_objectives(config.mixture, span.phase.objectives, span.name),
        )
    except ConfigurationError as error:
        mistake = str(error)
    # Raised outside `except`, because `sentence` prints the innermost error of a chain, which does not name the phase.
    raise ConfigurationError(f"phases.{span.name}: {mistake}")


def _replaced(config: Any, phase: Phase, kind: type) -> Any:
    return replace(config, **replacing(kind, vars(phase)))
