"""Take the sizes of a tower, and the tokenizer, from the weights that it begins with."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError
from common.values import expand_home
from model.weights.source import SIZES
from parallel.checkpoint.folder import CheckpointFolder
from train.config import RunConfig, to_dict
from train.weights.saved_checkpoint import refuse_export, run_folder
from train.weights.tower_weights import open_tower


def take_from_weights(plain: dict[str, Any], earlier: Mapping[Path, RunConfig]) -> None:
    """Fill the sizes, and `data.tokenizer`, that are null in composed settings.

    A run that goes on has them from its newest checkpoint, as it does not read its first weights again; one that begins
    with the weights of `run.initial` has them from there. `earlier`: settings of runs that are still to be trained, by
    folder. Raises ConfigurationError where nothing gives them.
    """
    saved: Any = None
    for tower, kind in SIZES.items():
        group = plain.get(tower) or {}
        null = [one.name for one in fields(kind) if one.name in group and group[one.name] is None]
        if not null:
            continue
        saved = _saved(plain, earlier) if saved is None else saved
        given = (saved.get(tower) or {}) if saved else _opened(plain, tower, f"{tower}.{null[0]} is null").sizes
        defaults = {one.name: one.default for one in fields(kind)}
        if tower == "vit" and (missing := [name for name in null if name not in given]):
            raise ConfigurationError(
                f"vit.{missing[0]} is null, and weights.vit={plain['weights']['vit']} does not show it; set "
                f"vit.{missing[0]}, or name a folder with a config.json."
            )
        group |= {name: given.get(name, defaults[name]) for name in null}
    data = plain.get("data") or {}
    if "tokenizer" in data and data["tokenizer"] is None:
        saved = _saved(plain, earlier) if saved is None else saved
        data["tokenizer"] = ((saved.get("data") or {}).get("tokenizer") if saved else None) or _tokenizer(plain)


def _tokenizer(plain: dict[str, Any]) -> str:
    opened = _opened(plain, "mt5", "data.tokenizer is null")
    if opened.tokenizer is None:
        raise ConfigurationError(
            f"data.tokenizer is null, and {opened.where} holds no tokenizer (spiece.model or tokenizer.json); set "
            "data.tokenizer to the one that it was trained with."
        )
    return str(opened.tokenizer)


def _opened(plain: dict[str, Any], tower: str, why: str) -> Any:
    value = (plain.get("weights") or {}).get(tower)
    if not value or value == "???":
        raise ConfigurationError(
            f"{why}, so weights.{tower} must give it; name a folder of weights, or a run by run.initial, or choose a "
            f"size ({tower}=…)."
        )
    return open_tower(expand_home(value, f"weights.{tower}"), tower, (plain.get("vit") or {}).get("num_heads"))


def _saved(plain: dict[str, Any], earlier: Mapping[Path, RunConfig]) -> Any:
    """Return the settings in the run's newest checkpoint, else those of `run.initial`; {} where there is none."""
    run = plain.get("run") or {}
    found = CheckpointFolder.from_run(Path(run["folder"])).latest_extra().get("config") if run.get("folder") else None
    if not run.get("initial"):
        return found or {}
    folder = run_folder(run["initial"], "run.initial")
    if found is None and folder in earlier:
        return to_dict(earlier[folder])
    refuse_export(folder, "run.initial")
    return found or CheckpointFolder.from_run(folder).latest_extra().get("config") or {}
