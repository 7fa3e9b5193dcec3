"""Evaluate a checkpoint on a task of official files: predictions, scores, a report and a file for the test server."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.errors import ConfigurationError, Notice
from common.files import write_text
from common.launcher import is_main_rank
from data.tasks.folders import choices
from data.tasks.item import Item
from data.tasks.overlap import seen_in_training
from data.tasks.read import read_task
from data.tasks.stream import ItemStream
from data.tokenizer import Tokenizer
from evaluation.html_report import Entry, data_url, write_report
from evaluation.sample_sheet import Sample
from evaluation.submission import write_submission
from evaluation.tasks import check_metrics, item_scores, left_out, task_scores
from parallel.checkpoint.checkpointer import Checkpointer
from parallel.layout import Layout
from train.build import build_phase_engine
from train.config import Phase, RunConfig
from train.step.predict import predictions
from train.step.reader import HeldOutReader
from train.step.reduction import gather_to_main
from train.tasks.answers_table import send_answers
from train.tasks.follow import follow

# Least score of an item that the report shows as right: half of the highest, and for CIDEr-D a score of 100.
RIGHT, RIGHT_BY_METRIC = 0.5, {"cider": 1.0, "xm3600": 1.0}


def prepare_task(config: RunConfig) -> list[Item]:
    """Return the task's items; raise ConfigurationError for files, a prompt or metrics that cannot work.

    The main rank warns of scores that packages which are not installed leave out.
    """
    check_metrics(config.task)
    items = read_task(config.task)
    if is_main_rank():
        for sentence in left_out(config.task, items):
            warnings.warn(sentence, Notice, stacklevel=2)
    return items


def for_task(config: RunConfig) -> RunConfig:
    """Return the settings of a phase with the task's resolution and length of predictions."""
    size = config.task.image_size or config.model.image_size
    if size % config.vit.patch_size:
        raise ConfigurationError(
            f"task.image_size={size} must be a multiple of vit.patch_size={config.vit.patch_size}."
        )
    return replace(
        config,
        model=replace(config.model, image_size=size),
        evaluation=replace(config.evaluation, max_new_tokens=config.task.max_new_tokens),
    )


def evaluate_task(
    config: RunConfig, phase: Phase, checkpointer: Checkpointer, layout: Layout, items: Sequence[Item]
) -> None:
    """Predict on all ranks; the main rank scores and writes. `config`: as `for_task` returns it.

    With `evaluation.follow`, every checkpoint of the run that is not scored yet, and those to come. Raises
    ConfigurationError for a run without a checkpoint, and RunStopped where no new one comes.
    """
    engine = build_phase_engine(config, phase, layout, restored=True)
    tokenizer, size, settings = Tokenizer(config.data.tokenizer), config.model.image_size, config.evaluation
    stream = ItemStream(config.task, items, tokenizer, size, config.vit.num_tokens(size))
    reader = HeldOutReader(layout, stream)
    seen = layout.broadcast_from_main(lambda: seen_in_training(config.task, items, config.data.tasks.values()))
    texts = choices(config.task) if config.task.choose else []
    for wanted in follow(config, layout) if settings.follow else [settings.step]:
        restored = checkpointer.load_latest(engine, weights_only=True, only=wanted, average=settings.average)
        if restored is None and settings.follow:
            continue  # the run has removed it meanwhile
        if restored is None:
            raise ConfigurationError(f"{config.run.folder} holds no checkpoint; train the run first.")
        batches = reader.held_out(settings.batch, None)
        own = list(predictions(engine, batches, tokenizer, config, config.task.blind, texts))
        found = gather_to_main(own if layout.is_replica_leader else [], layout.device)
        if layout.rank == 0:
            samples = sorted(found, key=lambda one: one.index)
            report(config, restored[0], items, samples, reader, stream.cut, seen)


def task_folder(config: RunConfig, step: int) -> Path:
    """Return the folder of the files of one evaluation."""
    return Path(config.run.folder, "tasks", config.task.name, f"step_{step:08d}")


def report(
    config: RunConfig,
    step: int,
    items: Sequence[Item],
    samples: Sequence[Sample],
    reader: HeldOutReader,
    cut: int,
    seen: Sequence[str] = (),
) -> None:
    """Write evaluation.json, predictions.jsonl, report.html and the submission below the run's folder; print scores.

    `seen`: ids of the items whose images were trained on. The tracker gets the scores and answers too.
    """
    task, folder = config.task, task_folder(config, step)
    folder.mkdir(parents=True, exist_ok=True)
    found = {sample.id: sample.prediction for sample in samples}
    blind = {sample.id: sample.blind_prediction or "" for sample in samples} if task.blind else {}
    results: dict[str, Any] = {
        "task": task.name,
        "step": step,
        "items": len(items),
        "without_references": sum(not item.references for item in items),
        "without_image": len(items) - len(samples),
        "cut_prompts": cut,
        "seen_in_training": len(seen),
        "scores": task_scores(task, items, found),
        "blind": task_scores(task, items, blind) if task.blind else {},
    }
    write_text(folder / "evaluation.json", json.dumps(results, indent=1, ensure_ascii=False))
    write_text(folder / "predictions.jsonl", "".join(f"{sample.line}\n" for sample in samples))
    title = f"{task.name}, step {step} of {config.run.folder}"
    shown = {name: score["score"] for name, score in results["scores"].items()}
    entries = _entries(config, items, samples, reader)
    write_report(folder / "report.html", title, shown, entries)
    written = ["evaluation.json", "predictions.jsonl", "report.html"]
    if task.submission != "none":
        write_submission(task.submission, found, items, folder / "submission.json")
        written.append("submission.json")
    console = Console()
    console.print(table(results))
    for count, what in (
        ("without_references", "references, which no score counts"),
        ("without_image", "a readable image, scored as empty predictions (COCO's and VQA's own scripts stop instead)"),
    ):
        if results[count]:
            console.print(f"{results[count]:,} of {len(items):,} items without {what}", highlight=False)
    if cut:
        console.print(f"{cut:,} of {len(items):,} prompts cut to fit a row", highlight=False)
    if seen:
        console.print(
            f"{len(seen):,} of {len(items):,} items with an image that the run was trained on (such as {seen[0]}), so "
            "that the scores are too high; leave them out of task.train.files, or score other items",
            highlight=False,
        )
    console.print(f"{folder}: {', '.join(written)}", highlight=False)
    send_answers(config, step, shown, entries, folder)


def _entries(config: RunConfig, items: Sequence[Item], samples: Sequence[Sample], reader: HeldOutReader) -> list[Entry]:
    scores = item_scores(config.task, items, {sample.id: sample.prediction for sample in samples})
    least = RIGHT_BY_METRIC.get(config.task.metrics[0], RIGHT)
    entries = []
    for sample in samples[: config.task.report_items]:
        pixels, score = reader.image(sample.index, None), scores.get(sample.id)
        entries.append(
            Entry(
                task=config.task.name,
                id=sample.id,
                language=sample.language,
                prompt=sample.prompt,
                references=list(dict.fromkeys(sample.references)),  # ten annotators often agree
                prediction=sample.prediction,
                score=score,
                right=sample.correct if score is None else score >= least,
                blind=sample.blind_prediction,
                image="" if pixels is None else data_url(pixels),
            )
        )
    return entries


def table(results: dict[str, Any]) -> Table:
    """Return a table of the scores in percent (CIDEr-D too, as papers print it), with those of languages and groups."""
    shown = Table(title=f"{results['task']}, step {results['step']}, {results['items']:,} items")
    for heading in ("score", "percent", "blind", "items", "without prediction"):
        shown.add_column(heading, justify="left" if heading == "score" else "right")
    for name, one in results["scores"].items():
        blind = results["blind"].get(name)
        counts = one["counts"]
        unseen = "" if blind is None else f"{100 * blind['score']:.2f}"
        values = (f"{100 * one['score']:.2f}", unseen, f"{counts['scored']:,}", f"{counts['without_prediction']:,}")
        shown.add_row(name, *values)
        for kind in ("languages", "groups"):
            for part, score in one[kind].items():
                shown.add_row(f"  {part}", f"{100 * score:.2f}")
    return shown
