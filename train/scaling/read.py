"""Read a finished sweep over towers: size, training arithmetic and score of each run, return per added parameter."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import ConfigurationError
from common.values import flat
from model.config import ModelConfig, MT5Config, PaLIConfig, ViTConfig
from model.pali import plan_on_meta
from train.settings.option_name import option_name
from train.settings.saved_run import read_settings

VIT_PARAMETERS = ("patches.", "vit_block_", "bridge.vit_norm.")
OWN_TO_A_RUN = (
    "run.name", "run.folder", "run.seed", "run.allow_changes", "run.initial",
    "run.from_scratch", "weights",
    "classifier", "tracker", "vit", "mt5", "parallel", "checkpoint",
)  # fmt: skip
VALIDATION, EVALUATION = "validation/", "evaluation/"


class Unusable(Exception):
    """Report a run that cannot be compared; the message is half a sentence."""


@dataclass(frozen=True)
class Score:
    """Name the score to compare: a key of `metrics.jsonl` (`validation/loss`), or `evaluation/<objective>/<score>`."""

    key: str

    def __post_init__(self) -> None:
        if not self.key.startswith((VALIDATION, EVALUATION)):
            raise ConfigurationError(
                f"score={self.key} is unknown; give validation/loss (or another validation/… of metrics.jsonl) or "
                "evaluation/<objective>/<score>, such as evaluation/vqa/exact_match."
            )

    @property
    def lower_is_better(self) -> bool:
        """Smaller values are better: true of losses alone."""
        return self.key.startswith(f"{VALIDATION}loss")

    @property
    def unit(self) -> str:
        """Losses are in nats per target token, all other scores are shares, shown in percent."""
        return "nats per target token" if self.lower_is_better else "percent"

    def from_run(self, folder: Path, last_line: dict[str, Any]) -> float:
        """Read the score of the run in that folder, in `unit`."""
        if self.key.startswith(VALIDATION):
            found = last_line.get(self.key)
            where = "the last line of its metrics.jsonl"
        else:
            found, where = self._evaluated(folder), "its evaluation.json"
        if not isinstance(found, float | int) or not math.isfinite(found):
            raise Unusable(f"{self.key} is not in {where}")
        return float(found) if self.lower_is_better else 100.0 * float(found)

    def _evaluated(self, folder: Path) -> Any:
        objective, _, name = self.key.removeprefix(EVALUATION).partition("/")
        try:
            results = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
            return results["objectives"][objective][name]["score"]
        except FileNotFoundError:
            raise Unusable("it has no evaluation.json (python -m train.evaluate makes it)") from None
        except (ValueError, KeyError, TypeError):
            return None


@dataclass(frozen=True)
class Trained:
    """Hold a finished run, or the mean of several that differ in their seed alone.

    Parameters are counts; `training_tflop` is the model arithmetic of all its steps; `score` in the score's unit.
    """

    name: str
    vit: str
    mt5: str
    vit_parameters: int
    mt5_parameters: int
    training_tflop: float
    score: float
    runs: int = 1

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.vit_parameters + self.mt5_parameters


@dataclass(frozen=True)
class Return:
    """Hold the gain of a larger tower, with the other tower `beside` it unchanged: positive is better.

    `gain` in the score's unit, `gain_per_million` per million added parameters.
    """

    tower: str
    beside: str
    smaller: str
    larger: str
    added_parameters: int
    gain: float

    @property
    def gain_per_million(self) -> float:
        """Gain per million added parameters."""
        return self.gain / self.added_parameters * 1e6


def read_sweep(folder: Path, score: Score) -> tuple[list[Trained], dict[str, str]]:
    """Return (finished runs by size, {run: reason to leave it out}); raise ConfigurationError if nothing is left."""
    if not folder.is_dir():
        raise ConfigurationError(f"folder={folder} is not a folder; name that of a sweep, such as runs/scaling.")
    candidates = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    settings, found, left_out = {}, [], {}
    for path in candidates:
        try:
            run, config = read_run(path, score)
        except Unusable as reason:
            left_out[path.name] = str(reason)
        else:
            found.append(run)
            settings[run.name] = config
    if len(found) < 2:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        raise ConfigurationError(
            f"folder={folder} holds {len(found)} finished runs with {score.key}, and a comparison needs 2 or more"
            + (f" (left out: {why})." if why else ".")
        )
    return _averaged(found, settings), left_out


def read_run(folder: Path, score: Score) -> tuple[Trained, dict[str, Any]]:
    """Read a finished run and its settings. Raises Unusable."""
    config = _settings(folder)
    try:
        lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        last, arithmetic = lines[-1], math.fsum(line["tflop"] for line in lines)
        done, steps = int(last["step"]), int(config["run"]["steps"])
    except FileNotFoundError:
        raise Unusable("it has no metrics.jsonl") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise Unusable(f"its metrics.jsonl cannot be read ({type(error).__name__}: {error})") from None
    if done < steps:
        raise Unusable(f"it is at step {done} of {steps}")
    vit, mt5 = _tower(ViTConfig, config, "vit"), _tower(MT5Config, config, "mt5")
    phase = list(config["phases"].values())[-1]
    image_size = int(phase.get("image_size") or config["model"]["image_size"])
    in_vit, in_mt5 = count_parameters(vit, mt5, image_size)
    run = Trained(
        folder.name, option_name("vit", vars(vit)), option_name("mt5", vars(mt5)), in_vit, in_mt5, arithmetic,
        score.from_run(folder, last),
    )  # fmt: skip
    return run, config


def count_parameters(vit: ViTConfig, mt5: MT5Config, image_size: int) -> tuple[int, int]:
    """Count (parameters of the ViT, parameters of all else: the mT5 and the projection into it)."""
    plan = plan_on_meta(PaLIConfig(vit, mt5, ModelConfig(image_size=image_size)))
    counts = {name: parameter.numel() for name, parameter in plan.named_parameters()}
    in_vit = sum(count for name, count in counts.items() if name.startswith(VIT_PARAMETERS))
    return in_vit, sum(counts.values()) - in_vit


def returns(runs: Iterable[Trained], lower_is_better: bool) -> list[Return]:
    """Compute the gain of each step to the next larger ViT at every mT5, and the other way round."""
    found, sign = [], -1.0 if lower_is_better else 1.0
    for tower, other in (("vit", "mt5"), ("mt5", "vit")):
        for beside, line in lines_of_constant(runs, other).items():
            for a, b in pairwise(line):
                added = b.parameters - a.parameters
                found.append(
                    Return(tower, beside, getattr(a, tower), getattr(b, tower), added, sign * (b.score - a.score))
                )
    return found


def lines_of_constant(runs: Iterable[Trained], tower: str) -> dict[str, list[Trained]]:
    """Group runs by `tower` ("vit" or "mt5"), smallest tower first, smallest model first in each group."""
    lines: dict[str, list[Trained]] = {}
    for run in sorted(runs, key=lambda run: (getattr(run, f"{tower}_parameters"), run.parameters)):
        lines.setdefault(getattr(run, tower), []).append(run)
    return lines


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = read_settings(folder)
    except ConfigurationError as error:
        raise Unusable(str(error).partition(";")[0].replace(f"{folder}/", "its ")) from error
    if settings is None:
        raise Unusable("it has no config.yaml")
    return {str(key): value for key, value in cast(dict[str, Any], OmegaConf.to_container(settings)).items()}


def _tower(kind: type, config: dict[str, Any], group: str) -> Any:
    names = {field.name for field in fields(kind)}
    try:
        return kind(**{key: value for key, value in config[group].items() if key in names})
    except (ConfigurationError, TypeError, OmegaConfBaseException) as error:
        raise Unusable(f"its {group} is not one of a model ({error})") from None


def _averaged(found: list[Trained], settings: dict[str, dict[str, Any]]) -> list[Trained]:
    """Average runs of a pair of towers. Raises ConfigurationError if runs differ in more than towers and seed."""
    first = found[0]
    for run in found[1:]:
        differing = _differences(settings[first.name], settings[run.name])
        if differing:
            raise ConfigurationError(
                f"{first.name} and {run.name} differ in {', '.join(differing)}, not only in towers and seed; keep one "
                "setting in a folder."
            )
    same: dict[tuple[str, str], list[Trained]] = {}
    for run in found:
        same.setdefault((run.vit, run.mt5), []).append(run)
    means = []
    for runs in same.values():
        one, many = runs[0], len(runs)
        score = math.fsum(run.score for run in runs) / many
        tflop = math.fsum(run.training_tflop for run in runs) / many
        means.append(Trained(one.name, one.vit, one.mt5, one.vit_parameters, one.mt5_parameters, tflop, score, many))
    return sorted(means, key=lambda run: (run.vit_parameters, run.mt5_parameters))


def _differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    flat_a, flat_b = flat(a), flat(b)  # a key that only one has comes from another version
    keys = sorted(key for key in flat_a.keys() & flat_b.keys() if flat_a[key] != flat_b[key])
    return [key for key in keys if not any(key == own or key.startswith(f"{own}.") for own in OWN_TO_A_RUN)]
