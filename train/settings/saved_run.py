"""Read the settings that a run was trained with, from `config.yaml` in its folder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from common.errors import ConfigurationError
from common.overrides import RENAMED
from common.values import expand_home
from train.config import RunConfig
from train.settings.compose import to_run_config

NAME = "config.yaml"
GROUPS = ("run", "vit", "mt5", "phases")  # the settings of every run have these groups


def read_settings(folder: Path) -> DictConfig | None:
    """Return the settings in a run's folder, None where there are none.

    Raises ConfigurationError for a file that does not hold the settings of a run.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        settings = OmegaConf.create(convert(OmegaConf.to_container(OmegaConf.load(path))))  # type: ignore[arg-type]
    except Exception as error:  # PyYAML raises errors of many types
        raise ConfigurationError(
            f"{path} cannot be read ({type(error).__name__}); bring it back from a copy."
        ) from error
    if not isinstance(settings, DictConfig) or not all(isinstance(settings.get(g), DictConfig) for g in GROUPS):
        raise ConfigurationError(f"{path} does not hold the settings of a run; bring it back from a copy.")
    return settings


def convert(settings: Any) -> Any:
    """Return the settings of a run, from a file or a checkpoint, with today's keys for those of earlier versions."""
    if not isinstance(settings, dict):
        return settings
    settings = dict(settings)
    for old, new in RENAMED.items():
        group, _, name = old.partition(".")
        if isinstance(settings.get(group), dict) and name in settings[group]:
            settings[group] = _renamed(settings[group], {name: new.partition(".")[2]})
    if isinstance(run := settings.get("run"), dict) and "initial_weights" in run:
        settings["run"] = {key: value for key, value in run.items() if key != "initial_weights"}
        settings["weights"] = _tower_weights(run["initial_weights"], settings.get("weights"))
    settings.pop("vit_pretraining", None)  # of a command that is a run of its own now
    stage, mixture = settings.get("stage"), settings.get("mixture")
    if isinstance(stage, dict) and "phases" not in settings:
        settings["phases"] = {phase["name"]: _phase(phase) for phase in settings.pop("stage").get("phases", ())}
    if isinstance(mixture, dict) and isinstance(mixture.get("components"), list):
        named: dict[str, Any] = {}
        for component in mixture["components"]:
            again = sum(one["objective"] == component["objective"] for one in named.values())
            named[f"{component['objective']}_{again + 1}" if again else component["objective"]] = component
        settings["mixture"] = named
    return settings


def _tower_weights(files: Any, weights: Any) -> dict[str, Any]:
    """Return `weights` with the files of the former `run.initial_weights`: the ViT's, then the mT5's."""
    given = dict(weights) if isinstance(weights, dict) else {}
    free = [tower for tower in ("vit", "mt5") if given.get(tower) is None]
    files = files if isinstance(files, list) else []
    return {"vit": None, "mt5": None} | given | dict(zip(free, files, strict=False))


def _phase(phase: dict[str, Any]) -> dict[str, Any]:
    names = {old.partition(".")[2]: new.partition(".")[2] for old, new in RENAMED.items()}
    return _renamed({key: value for key, value in phase.items() if key != "name"}, names)


def _renamed(group: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in group.items()}


def saved_config(composed: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """Return the settings of the run in `run.folder`, with the values of `composed` where `overrides` name a key.

    Raises ConfigurationError where the folder holds no run.
    """
    folder = Path(expand_home(composed.run.folder, "run.folder"))
    settings = read_settings(folder)
    if settings is None:
        raise ConfigurationError(f"run.folder={folder} holds no run (no {NAME}); train one first.")
    return overridden(settings, composed, overrides)


def overridden(settings: DictConfig, composed: DictConfig, overrides: Sequence[str]) -> RunConfig:
    """Return `settings` with the values of `composed` for the keys that `overrides` name.

    Components and phases are merged into those of `settings` (`common.overrides.open_names` made them dictionaries).
    """
    parser, names = OverridesParser.create(), list(settings.phases)
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        if key in ("mixture", "phases"):
            settings[key] = OmegaConf.merge(settings[key], parser.parse_override(override).value())
        else:
            OmegaConf.update(settings, key, OmegaConf.select(composed, key), merge=False)
    for name in set(settings.phases) - set(names):
        raise ConfigurationError(f"phases.{name} is not a phase of this run; it has {', '.join(names)}.")
    return to_run_config(settings)
