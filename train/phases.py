"""The phases of a run laid out on its step counter."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from common.errors import ConfigurationError
from data.config import MixtureConfig
from train.config import Phase, RunConfig


@dataclass(frozen=True)
class Span:
    """A phase and the steps it takes: `first`..`last`, both included, counted from 1."""

    phase: Phase
    first: int
    last: int


def spans(config: RunConfig) -> list[Span]:
    """The run's phases with their steps; ConfigurationError if they do not add up to `run.steps`."""
    return lay_out(config.stage.phases, config.run.steps)


def lay_out(phases: Sequence[Phase], total: int) -> list[Span]:
    """Phases one after another on `total` steps; ConfigurationError if they do not add up."""
    given = sum(phase.steps or 0 for phase in phases)
    open_ended = [phase.name for phase in phases if phase.steps is None]
    if len(open_ended) > 1:
        raise ConfigurationError(f"stage.phases: {' and '.join(open_ended)} leave steps out; only one phase may.")
    if open_ended and given >= total:
        raise ConfigurationError(
            f"run.steps={total} leaves no step for phase {open_ended[0]!r}; the others take {given}, so ask for more."
        )
    if not open_ended and given != total:
        raise ConfigurationError(f"stage.phases take {given} steps; set run.steps={given} (it is {total}).")
    laid_out, first = [], 1
    for phase in phases:
        steps = phase.steps or total - given
        laid_out.append(Span(phase, first, first + steps - 1))
        first += steps
    return laid_out


def span_of(laid_out: list[Span], step: int) -> Span:
    """The phase that step `step` (from 1) belongs to; the last phase for a step beyond the end."""
    return next((span for span in laid_out if step <= span.last), laid_out[-1])


def for_phase(config: RunConfig, phase: Phase) -> RunConfig:
    """The run's settings as this phase sees them: its image size, batch and mixture in place."""
    own = {
        name: value
        for name in ("global_batch_size", "encoder_length", "decoder_length")
        if (value := getattr(phase, name))
    }
    return replace(
        config,
        model=replace(config.model, image_size=phase.image_size),
        data=replace(config.data, **own),
        parallel=replace(config.parallel, micro_batch_size=phase.micro_batch_size or config.parallel.micro_batch_size),
        mixture=_narrowed(config.mixture, phase) if phase.objectives else config.mixture,
    )


def _narrowed(mixture: MixtureConfig, phase: Phase) -> MixtureConfig:
    """The components of the phase's objectives; an objective's weight is shared out as in the mixture."""
    totals: dict[str, float] = {}
    for component in mixture.components:
        totals[component.objective] = totals.get(component.objective, 0.0) + component.weight
    missing = sorted(set(phase.objectives) - set(totals))
    if missing:
        raise ConfigurationError(
            f"phase {phase.name!r} asks for {', '.join(missing)}; the mixture has only {', '.join(sorted(totals))}."
        )
    kept = [
        replace(c, weight=phase.objectives[c.objective] * c.weight / totals[c.objective])
        for c in mixture.components
        if c.objective in phase.objectives
    ]
    return replace(mixture, components=kept)
