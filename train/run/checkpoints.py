"""Save and restore the checkpoints of a run, and compare what its sources hold with the newest of them."""

import time
from functools import cached_property
from typing import Any, NoReturn

from common.errors import ConfigurationError, RunStopped, StorageFailed
from data.tokenizer import checksum
from model.finite import first_not_finite
from parallel.checkpoint.checkpointer import Checkpointer, NotFinite
from parallel.checkpoint.initial_weights import load_first_weights, thaw
from parallel.checkpoint.together import SaveFailed, SaveStalled
from parallel.engine.base import Engine
from parallel.layout import Layout
from train.config import RunConfig, to_dict
from train.phases import for_phase, spans
from train.run.resume import check_sources
from train.settings.facts import Facts
from train.weights.saved_checkpoint import find_checkpoint, names_step, run_folder
from train.weights.tower_weights import TowerWeights, describe, find_not_finite, open_towers, sources

Extra = dict[str, Any]


class RunCheckpoints:
    """Save and restore the state of a run; all methods but `save_due` are collectives of all ranks."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.config, self.layout = config, layout
        self.checkpointer = Checkpointer.from_run(
            config.run.folder,
            config.checkpoint.keep_last,
            config.checkpoint.keep_every,
            config.checkpoint.keep_best,
        )
        self.tokenizer = checksum(config.data.tokenizer)  # at the start: the file may change during the run
        self.sources: Facts = {}
        self.saved_at = time.monotonic()

    @cached_property
    def first(self) -> list[TowerWeights]:
        """The first weights: opened once, as each opening reads the headers of all their files; none are read."""
        return open_towers(self.config.weights, self.config.vit.num_heads)

    def restore(self, engine: Engine) -> tuple[int, Extra]:
        """Load the newest checkpoint, else the first weights: return (steps done, what was saved with them).

        Raises ConfigurationError where there is nothing to load, or a weight is not finite.
        """
        self.settle()
        found = self.checkpointer.load_latest(engine)
        if found is not None:
            self._thaw(engine, self.checkpointer, found[0])
        if found is None and self.config.run.initial is not None:
            found = self._load_initial(engine, self.config.run.initial)
        if found is None:
            load_first_weights(engine, sources(self.first))
        self._check_finite(engine, found[0] if found else None)
        return found or (0, {})

    def _load_initial(self, engine: Engine, initial: str) -> tuple[int, Extra] | None:
        """Load the weights of another run's checkpoint, the one that the main rank finds; a collective.

        Of a branch, load the optimizer state too, and return (steps done, what was saved with them).
        """
        step, branch = self._initial_step(initial), self.config.run.branch
        checkpointer = Checkpointer.from_run(run_folder(initial, "run.initial"))
        only = step if names_step(initial) or branch else None
        found = checkpointer.load_latest(engine, weights_only=not branch, only=only, read_only=True)
        if found is None:
            raise ConfigurationError(f"run.initial={initial} has no checkpoint; train it first.")
        self._thaw(engine, checkpointer, found[0])
        return found if branch else None

    def _thaw(self, engine: Engine, checkpointer: Checkpointer, step: int) -> None:
        """Read weights that were frozen in a checkpoint, and are trained now, in fp32 from the first weights."""
        frozen = self.layout.broadcast_from_main(lambda: checkpointer.frozen(step))
        thaw(engine, sources(self.first), frozen, str(checkpointer.path(step)))

    def _initial_step(self, initial: str) -> int:
        step, mistake = self.layout.broadcast_from_main(lambda: _find_step(initial))
        if mistake is not None:
            raise ConfigurationError(mistake)
        return step

    def restores(self) -> bool:
        """Return whether `restore` will load every weight (or raise)."""
        return self.config.run.initial is not None or self.layout.broadcast_from_main(
            lambda: bool(self.checkpointer.steps())
        )

    def first_names(self) -> set[str]:
        """Return the logical tensors that `restore` will read from first weights; none where the run goes on."""
        if self.restores():
            return set()
        return {name for each in self.first for name in each.names}

    def describe_first(self) -> list[str]:
        """Describe the first weights, a line each, with what was left out of them."""
        config = for_phase(self.config, spans(self.config)[0])
        return [describe(each, config) for each in self.first]

    def steps_done(self) -> int:
        """Return the step of the newest checkpoint; where there is none, that which a branch begins at, or 0."""
        done = self.layout.broadcast_from_main(lambda: self.checkpointer.latest_step() or 0)
        run = self.config.run
        return self._initial_step(run.initial) if not done and run.branch and run.initial is not None else done

    def skipped_last(self) -> list[int]:
        """Return the batches of the row of skipped steps with which the newest checkpoint ends."""
        return self.layout.broadcast_from_main(lambda: list(self.checkpointer.latest_extra().get("bad", ())))

    def take_sources(self, facts: Facts, extra: Extra) -> None:
        """Keep what the sources of a phase hold; the next checkpoint saves it.

        Raises ConfigurationError on every rank where the restored checkpoint (`extra`) was trained on other records.
        """
        saved = extra.get("sources", {})
        check_sources(saved, facts, self.config)
        self.sources = saved | facts

    def not_finite(self, engine: Engine) -> str | None:
        """Return the name of a weight that is not finite on any rank, None where all are finite."""
        own = first_not_finite((rectangle.name, values) for rectangle, values in engine.held_weights())
        return next(filter(None, self.layout.gather_objects([own])), None)

    def save_due(self) -> bool:
        """Return whether this rank wants a checkpoint; the loop saves where any rank does.

        The main rank does after `checkpoint.every_minutes`, any rank after a failed save, which `save` then reports.
        """
        minutes = self.config.checkpoint.every_minutes
        long_ago = minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes
        return (self.layout.rank == 0 and long_ago) or self.checkpointer.failed

    def save(self, engine: Engine, step: int, extra: Extra) -> None:
        """Begin a checkpoint. Raises as `settle` does if the one before could not be written."""
        own = {"config": to_dict(self.config), "tokenizer": self.tokenizer, "sources": self.sources}
        try:
            self.checkpointer.save(engine, step, own | extra, trusted=not extra.get("bad"))
        except SaveFailed as error:
            _raise_ended(error)
        self.saved_at = time.monotonic()

    def settle(self) -> None:
        """Wait until the last checkpoint is on disk.

        Raises RunStopped if it could not be written, StorageFailed where the cause may pass.
        """
        try:
            self.checkpointer.wait()
        except SaveFailed as error:
            _raise_ended(error)

    def check_older(self, step: int, num_bad: int) -> None:
        """Raise RunStopped where no checkpoint of `step` or before exists to go back to, after `num_bad` bad steps.

        A pending save that fails because its weights are not finite does not matter: it is after that step.
        """
        try:
            self.settle()
        except RunStopped as error:
            if not isinstance(error.__cause__, NotFinite):
                raise
        oldest = self.layout.broadcast_from_main(lambda: min(self.checkpointer.steps(), default=None))
        if step and (oldest is None or oldest > step):
            raise RunStopped(
                f"The run stopped at step {step + num_bad}: {num_bad} steps in a row were skipped, and no "
                f"checkpoint of step {step} or before is in {self.checkpointer.folder} to go back to; bring one "
                "back from a copy, or start again in another run.folder with a smaller checkpoint.every_steps."
            )

    def _check_finite(self, engine: Engine, step: int | None) -> None:
        """Raise ConfigurationError on every rank where a weight that training would begin with is not finite."""
        run, name = self.config.run, self.not_finite(engine)
        if name is None:
            return
        if step is None:
            if run.initial is not None:
                raise ConfigurationError(f"{name} is not finite in run.initial={run.initial}; name another run.")
            raise ConfigurationError(f"{find_not_finite(self.first, name)}.")
        raise ConfigurationError(
            f"{name} is not finite in the checkpoint of step {step} in {self.checkpointer.folder}; remove that "
            "checkpoint to go on from the one before, or choose another run.name."
        )


def _find_step(initial: str) -> tuple[int, str | None]:
    """Return (step of `run.initial`, None), or (0, mistake) where there is no such checkpoint."""
    try:
        return find_checkpoint(initial, "run.initial").step, None
    except ConfigurationError as error:
        return 0, str(error)


def _raise_ended(error: SaveFailed) -> NoReturn:
    """Raise on every rank the exception by which a failed save ends the run."""
    if not isinstance(error, SaveStalled):
        raise RunStopped(str(error)) from error
    failed = StorageFailed(str(error))
    failed.alone = False  # every rank raises it, so the main rank prints it
    raise failed from error
