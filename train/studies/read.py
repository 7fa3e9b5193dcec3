"""Read the scores of a study's runs from their evaluation.json, over seeds."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.studies.plan import Cell, StudySweep

# The score of each objective that the tables show; all are better the higher.
SCORES = {
    "vqa": "exact_match",
    "ocr": "exact_match",
    "captioning": "token_f1",
    "split_captioning": "token_f1",
    "vqg": "token_f1",
    "object_vqa": "label_f1",
    "detection": "box_f1",
    "span_corruption": "token_f1",
}
Languages = Callable[[str], bool]


@dataclass(frozen=True)
class Measured:
    """Hold a score in percent: of each seed, and of one seed half the width of its 95 % interval."""

    seeds: tuple[float, ...]
    half: float
    blind: float | None
    examples: int

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return math.fsum(self.seeds) / len(self.seeds)

    def text(self) -> str:
        """Return the score with its interval, or with its least and greatest value of several seeds."""
        if len(self.seeds) == 1:
            return f"{self.mean:.1f} ± {self.half:.1f}"
        return f"{self.mean:.1f} ({min(self.seeds):.1f} to {max(self.seeds):.1f})"


@dataclass(frozen=True)
class Difference:
    """Hold what a run has more than another, in points: the mean over seeds, and its least and greatest value.

    Of one seed these are the ends of a 95 % interval, as if the two scores were independent. They are of the same
    examples, so that the true interval is smaller.
    """

    mean: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Zero lies outside."""
        return self.low > 0 or self.high < 0

    def text(self) -> str:
        """Return the difference with its sign, bold where it is certain."""
        shown = f"{self.mean:+.1f}"
        return f"**{shown}**" if self.certain else shown


def difference(a: Measured, b: Measured) -> Difference:
    """Return a - b; of several seeds, over those of the same number."""
    each = [x - y for x, y in zip(a.seeds, b.seeds, strict=False)]
    mean = math.fsum(each) / len(each)
    if len(each) > 1:
        return Difference(mean, min(each), max(each))
    half = math.hypot(a.half, b.half)
    return Difference(mean, mean - half, mean + half)


class Results:
    """The evaluations of a study's runs."""

    def __init__(self, sweeps: Mapping[str, StudySweep]) -> None:
        self.sweeps = sweeps

    def runs(self, sweep: str, values: Mapping[str, str]) -> list[Cell]:
        """Return the runs of a sweep with these values, by seed."""
        found = self.sweeps[sweep].cells() if sweep in self.sweeps else []
        return [run for run in found if values.items() <= run.values.items()]

    def cell(self, objective: str, cell: str, languages: Languages | None = None) -> Measured | None:
        """Return the score of an objective of one of conf/cell, as `score` does."""
        return self.score(objective, "cells", {"cell": cell}, languages)

    def score(
        self, objective: str, sweep: str, values: Mapping[str, str], languages: Languages | None = None
    ) -> Measured | None:
        """Return the score of an objective, over the seeds that are evaluated; None without any."""
        found = []
        for cell in self.runs(sweep, values):
            own = read_objective(cell, objective)
            if own is not None and (one := one_score(own, SCORES[objective], languages)) is not None:
                found.append(one)
        if not found:
            return None
        blind = [one.blind for one in found if one.blind is not None]
        return Measured(
            tuple(one.mean for one in found),
            found[0].half,
            math.fsum(blind) / len(blind) if blind else None,
            found[0].examples,
        )

    def missing(self) -> list[str]:
        """Return the names of the runs that are to be evaluated, and are not yet."""
        sweeps = [sweep for sweep in self.sweeps.values() if sweep.config.evaluate]
        return [f"{sweep.name}/{cell.folder.name}" for sweep in sweeps for cell in sweep.cells() if not cell.evaluated]


def read_objective(cell: Cell, objective: str) -> dict[str, Any] | None:
    """Return the scores of an objective in the run's evaluation.json; None where it is not done."""
    if not cell.evaluated:
        return None
    found = json.loads((cell.folder / "evaluation.json").read_text(encoding="utf-8"))["objectives"].get(objective)
    return found if isinstance(found, dict) else None


def one_score(own: Mapping[str, Any], name: str, languages: Languages | None) -> Measured | None:
    """Return a score of all languages, or of the examples of some; None where there is nothing to score."""
    chosen = [own] if languages is None else [each for code, each in own["languages"].items() if languages(code)]
    chosen = [each for each in chosen if each[name]["score"] is not None]
    total = sum(each["examples"] for each in chosen)
    if not total:
        return None
    shares = [each["examples"] / total for each in chosen]
    halves = [50 * (each[name]["high"] - each[name]["low"]) for each in chosen]
    blind = [each[name]["blind"] for each in chosen]
    return Measured(
        (100 * _weighted(shares, [each[name]["score"] for each in chosen]),),
        math.hypot(*(share * half for share, half in zip(shares, halves, strict=True))),
        None if None in blind else 100 * _weighted(shares, blind),
        total,
    )


def _weighted(shares: Sequence[float], values: Sequence[float]) -> float:
    return math.fsum(share * value for share, value in zip(shares, values, strict=True))


def curve(folder: Path, key: str, window: int = 25) -> tuple[list[int], list[float]]:
    """Return (steps, means over the last `window` steps that have it) of a key of a run's metrics.jsonl."""
    steps, values = [], []
    try:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError:
        return [], []
    for line in lines:
        with_key = json.loads(line) if line.endswith("}") else {}
        if with_key.get(key) is not None:
            steps.append(int(with_key["step"]))
            values.append(float(with_key[key]))
    means = [math.fsum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
    return steps, means
