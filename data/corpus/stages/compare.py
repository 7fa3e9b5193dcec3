"""Find near-duplicates over all parts, and the threshold of similarity. Stages 2 and 3."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.corpus.stages.plan import Plan
from data.corpus.stages.read import ROW_BITS
from data.corpus.stages.work import read_slice, write_slices
from data.corpus.steps import neighbors, similarity
from data.corpus.steps.hashes import ENTRY, IMAGE, TEXT, text_distance
from data.corpus.steps.neighbors import CAUSES, EDGE

OF_EVALUATION = "near-duplicate of evaluation set {}"
LOW = "similarity below the threshold"


def compare_partition(plan: Plan, partition: int, path: Path) -> None:
    """Write the edges that the buckets of one partition give, sorted by row and divided by part."""
    own = [read_slice(plan.path("entries", number), partition, ENTRY) for number in range(len(plan.parts))]
    config = plan.config.duplicates
    distances = {IMAGE: config.image_distance, TEXT: text_distance(config.text_similarity)}
    end = plan.evaluation_end << ROW_BITS
    found = neighbors.edges(np.concatenate(own), distances, end, plan.config.text.max_texts)
    bounds = np.searchsorted(found["row"] >> np.uint64(ROW_BITS), np.arange(len(plan.parts) + 1))
    write_slices(path, found, bounds)


def causes(plan: Plan, number: int) -> dict[int, str]:
    """Return the causes of a part's rows that have a near-duplicate, by place in the part."""
    partitions = range(plan.config.duplicates.partitions)
    own = [read_slice(plan.path("edges", partition), number, EDGE) for partition in partitions]
    found = {}
    for edge in neighbors.settled(np.concatenate(own)):
        other = int(edge["other"]) >> ROW_BITS
        of_evaluation = other < plan.evaluation_end and edge["cause"] != neighbors.TOO_MANY_TEXTS
        name = plan.parts[other].input[1:] if of_evaluation else ""
        cause = OF_EVALUATION.format(name) if of_evaluation else CAUSES[edge["cause"]]
        found[int(edge["row"]) & ((1 << ROW_BITS) - 1)] = cause
    return found


def judged_rows(plan: Plan, number: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (place, line) of a part's rows, with the causes of all stages so far."""
    found = causes(plan, number)
    with open(plan.path("rows", number), encoding="utf-8") as lines:
        next(lines)
        for place, text in enumerate(lines):
            line = json.loads(text)
            if place in found and "drop" not in line:
                line["drop"] = found[place]
            yield place, line


def count_scores(plan: Plan, number: int, path: Path) -> None:
    """Write the numbers of a part's pairs by language and score."""
    counts: dict[str, Counter[int]] = {}
    for _, line in judged_rows(plan, number):
        if "score" in line and "drop" not in line:
            language = line["fields"].get("language", "en")
            counts.setdefault(language, Counter())[line["score"]] += 1
    path.write_text(json.dumps(counts, sort_keys=True), encoding="utf-8")


def thresholds(plan: Plan) -> dict[str, int]:
    """Return the least score that is kept, of all parts together."""
    total: dict[str, Counter[int]] = {}
    for path in plan.paths("scores", plan.evaluation_end):
        for language, own in json.loads(path.read_text(encoding="utf-8")).items():
            total.setdefault(language, Counter()).update({int(score): number for score, number in own.items()})
    return similarity.thresholds(total, plan.config.similarity)
