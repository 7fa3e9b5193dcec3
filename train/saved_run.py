"""Read the settings that a run was trained with, from `config.yaml` in its folder."""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from common.errors import ConfigurationError
from common.values import expand_home
from train.config import RunConfig, to_run_config

NAME = "config.yaml"
GROUPS = ("run", "vit", "mt5", "phases")  # the settings of every run have them


def read_settings(folder: Path) -> DictConfig | None:
    """Return the settings in a run's folder, None where there are none.

    Raises ConfigurationError for a file that is not that of a run.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        settings = OmegaConf.load(path)
    except Exception as error:  # PyYAML raises errors of many types
        raise ConfigurationError(
            f"{path} cannot be read ({type(error).__name__}); bring it back from a copy."
        ) from error
    if not isinstance(settings, DictConfig) or not all(isinstance(settings.get(g), DictConfig) for g in GROUPS):
        raise ConfigurationError(f"{path} does not hold the settings of a run; bring it back from a copy.")
    return settings


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
        key, value = override.split("=")[0].lstrip("+~"), parser.parse_override(override).value()
        if key in ("mixture", "phases") and isinstance(value, dict):
            settings[key] = OmegaConf.merge(settings[key], value)
        else:
            OmegaConf.update(settings, key, OmegaConf.select(composed, key), merge=False)
    for name in set(settings.phases) - set(names):
        raise ConfigurationError(f"phases.{name} is not a phase of this run; it has {', '.join(names)}.")
    return to_run_config(settings)
