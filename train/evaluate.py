"""Evaluate a trained run on a held-out split.

    python -m train.evaluate run.folder=runs/demo
    torchrun --nproc_per_node 2 -m train.evaluate run.folder=runs/demo evaluation.examples=64
    python -m train.evaluate run.folder=runs/demo evaluation.split=validation evaluation.languages=[en,de]
    python -m train.evaluate checkpoint=runs/coco@best task=coco task.images=coco/images

`checkpoint=FOLDER[@STEP]` names a run and one of its checkpoints; `run.folder=FOLDER` means its latest. `task=NAME`
evaluates a task of official files (conf/task, docs/evaluate.md) instead of the run's own held-out records.

The run's own settings (its config.yaml) are used, except those on the command line.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from common.errors import ConfigurationError, RunStopped
from common.files import write_text
from common.values import expand_home
from data import languages
from data.examples import ExampleInfo
from data.tokenizer import Tokenizer
from evaluation.config import EvaluationConfig
from evaluation.sample_sheet import Sample, draw, drawable_first
from evaluation.score import evaluation
from parallel.checkpoint.checkpointer import Checkpointer
from parallel.distributed import launch
from parallel.layout import Layout
from train.build import build_phase_engine
from train.checks import check, check_sources
from train.config import Phase, RunConfig
from train.entry import entry, in_one_sentence
from train.health.device_queue import DeviceQueue
from train.health.watchdog import Watchdog
from train.phases import find_span, for_phase, spans
from train.settings.facts import check_settings_of_ranks
from train.settings.saved_run import NAME as SETTINGS
from train.settings.saved_run import saved_config
from train.step.predict import predictions
from train.step.reader import ReplicaReader
from train.step.reduction import gather_to_main
from train.step.validation import chosen
from train.tasks.evaluate_task import evaluate_task, for_task, prepare_task
from train.tasks.follow import wait_for_run
from train.weights.saved_checkpoint import find_checkpoint

TRAINING_KEYS = ("every_steps", "steps", "samples", "task_items")
READS = ("task", "run.folder", "run.seed", "run.precision", "data", "mixture", "phases", "parallel", "tracker",
         "model.attention",
         *(f"evaluation.{one.name}" for one in fields(EvaluationConfig) if one.name not in TRAINING_KEYS))  # fmt: skip
SHEET_SIZE = 24  # samples on the sheet


def main(composed: DictConfig) -> None:
    """Generate predictions on all ranks, score them, and write a sheet of samples."""
    if composed.evaluation.follow:
        folder = Path(expand_home(composed.run.folder, "run.folder"))
        wait_for_run(folder, SETTINGS, composed.evaluation.follow_s)
    config = saved_config(composed, HydraConfig.get().overrides.task)
    _check_follow(config)
    this = launch()
    checkpointer = Checkpointer.from_run(config.run.folder)
    step = config.evaluation.step or checkpointer.latest_step() or (1 if config.evaluation.follow else None)
    if step is None and (lost := checkpointer.lost()) is not None:
        raise ConfigurationError(
            f"{config.run.folder} holds no checkpoint, though {lost} was one; bring it back from a copy."
        )
    if step is None:
        raise ConfigurationError(f"{config.run.folder} holds no checkpoint yet; train the run first.")
    check(config, this.world_size, trains=False)
    span = find_span(spans(config), step)
    config, phase = for_phase(config, span), span.phase
    items = prepare_task(config) if config.task.name else []
    if items:
        config = for_task(config)
    else:
        check_sources(config, chosen(config.mixture, config.evaluation), config.evaluation.split)
    check_settings_of_ranks(config, this)
    layout = Layout.start(config.parallel, this)
    folder = Path(config.run.folder)
    # Heartbeats in a folder of its own, because the run may still be training.
    with Watchdog(
        config.parallel.timeout_s, folder / "evaluation", layout.rank, layout.world_size, DeviceQueue(layout.device)
    ):
        if items:
            evaluate_task(config, phase, checkpointer, layout, items)
            return
        done, samples, shown = predict(config, phase, checkpointer, layout)
        missing = layout.broadcast_from_main(lambda: without_examples(config, samples))
        if missing and not layout.broadcast_from_main(lambda: len(samples)):
            raise RunStopped(nothing_evaluated(config))
    if layout.rank == 0:
        report(folder, config.evaluation.split, done, samples, shown, missing)


def _check_follow(config: RunConfig) -> None:
    if config.evaluation.follow and (not config.task.name or config.evaluation.step is not None):
        raise ConfigurationError(
            "evaluation.follow=true scores every checkpoint on a task; give task=… and run.folder=…, and no step."
        )


def predict(
    config: RunConfig, phase: Phase, checkpointer: Checkpointer, layout: Layout
) -> tuple[int, list[Sample], list[Sample]]:
    """Return (step of the checkpoint, all samples, samples to show); samples are in order of the records.

    `config`: as the phase sees it. Only the main rank has samples, the others none.
    """
    engine = build_phase_engine(config, phase, layout, restored=True)
    settings = config.evaluation
    restored = checkpointer.load_latest(engine, weights_only=True, only=settings.step, average=settings.average)
    if restored is None:
        raise ConfigurationError(f"{config.run.folder} holds no checkpoint; train the run first.")
    tokenizer = Tokenizer(config.data.tokenizer)
    reader = ReplicaReader(config, layout, tokenizer, chosen(config.mixture, settings), settings.split)
    limit, seed = settings.examples, config.run.seed
    batches = reader.held_out(settings.batch, limit, seed, partial(is_wanted, settings))
    own = list(predictions(engine, batches, tokenizer, config, blind=True))
    samples = sorted(
        gather_to_main(own if layout.is_replica_leader else [], layout.device), key=lambda sample: sample.index
    )
    shown = [replace(sample, image=reader.image(sample.index, limit, seed)) for sample in selection(samples)]
    return restored[0], samples, shown


def is_wanted(settings: EvaluationConfig, info: ExampleInfo) -> bool:
    """Return whether an example is in one of the languages to evaluate."""
    return not settings.languages or languages.accepts(settings.languages, info.language)


def without_examples(config: RunConfig, samples: list[Sample]) -> list[str]:
    """Return the components to evaluate that gave no example."""
    found = {sample.component for sample in samples}
    return [name for name in chosen(config.mixture, config.evaluation) if name not in found]


def nothing_evaluated(config: RunConfig) -> str:
    """Return the sentence for an evaluation without examples, which has no scores."""
    settings = config.evaluation
    wanted = f" in {', '.join(settings.languages)} (evaluation.languages)" if settings.languages else ""
    return (
        f"Nothing was evaluated: the first {settings.examples} records of the {settings.split} split give no example"
        f"{wanted} of {', '.join(chosen(config.mixture, settings))}; choose other evaluation.components, "
        "evaluation.languages or evaluation.split, or more evaluation.examples."
    )


def report(
    folder: Path, split: str, step: int, samples: list[Sample], shown: list[Sample], missing: Sequence[str] = ()
) -> None:
    """Write `evaluation.json`, `predictions.jsonl` (every sample) and `samples.png` (the shown ones).

    Print the scores, the names of the files, and the components in `missing`, of whose records none gave an example.
    """
    results = {
        "step": step,
        "split": split,
        "examples": len(samples),
        "without_examples": list(missing),
        "objectives": evaluation(samples),
        "components": evaluation(samples, "component"),
    }
    scores_at, predictions_at, sheet_at = (folder / n for n in ("evaluation.json", "predictions.jsonl", "samples.png"))
    write_text(scores_at, json.dumps(results, indent=1, ensure_ascii=False))
    write_text(predictions_at, "".join(f"{sample.line}\n" for sample in samples))
    draw(shown, sheet_at)
    console = Console()
    console.print(table(results))
    if missing:
        console.print(f"no example of {', '.join(missing)}: not evaluated", highlight=False)
    console.print(f"scores: {scores_at}\npredictions: {predictions_at}\nsamples: {sheet_at}", highlight=False)


def selection(samples: list[Sample]) -> list[Sample]:
    """Choose samples for the sheet: objectives in turn, languages varied, first those whose letters can be shown."""
    by_objective: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.has_image:
            by_objective.setdefault(sample.objective, []).append(sample)
    columns = [drawable_first(varied(own)[: 4 * SHEET_SIZE]) for own in by_objective.values()]
    turns = chain.from_iterable(zip_longest(*columns))
    return [sample for sample in turns if sample is not None][:SHEET_SIZE]


def varied(samples: list[Sample]) -> list[Sample]:
    """Sort samples: the first of every language before the second of any."""
    found: dict[str, int] = {}
    order = []
    for sample in samples:
        found[sample.language] = found.get(sample.language, 0) + 1
        order.append(found[sample.language])
    return [sample for _, sample in sorted(zip(order, samples, strict=True), key=lambda pair: pair[0])]


def table(results: dict[str, Any]) -> Table:
    """Return a table of the scores over all languages, in percent."""
    shown = Table(title=f"Step {results['step']}, {results['examples']} examples of the {results['split']} split")
    for heading in ("component", "score", "percent", "95 %", "blind", "examples"):
        shown.add_column(heading, justify="left" if heading in ("component", "score") else "right")
    for component, scores in results["components"].items():
        for name, value in scores.items():
            if isinstance(value, dict) and "score" in value:
                blind = "" if value["blind"] is None else f"{100 * value['blind']:.1f}"
                score = "nothing to score" if value["score"] is None else f"{100 * value['score']:.1f}"
                between = "" if value["low"] is None else f"{100 * value['low']:.1f} to {100 * value['high']:.1f}"
                shown.add_row(component, name.replace("_", " "), score, between, blind, str(scores["examples"]))
    return shown


def with_checkpoint(words: Sequence[str]) -> list[str]:
    """Return the words with `checkpoint=FOLDER[@STEP]` as the run's folder and the step that it names."""
    made: list[str] = []
    for word in words:
        key, _, value = word.partition("=")
        if key == "checkpoint":
            found = find_checkpoint(value)
            made += [f"run.folder={found.run}", f"evaluation.step={found.step}"]
        else:
            made.append(word)
    return made


if __name__ == "__main__":
    in_one_sentence(lambda: sys.argv.__setitem__(slice(1, None), with_checkpoint(sys.argv[1:])))
    entry("evaluate", main, READS)
