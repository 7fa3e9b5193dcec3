"""Read the settings that a run was trained with, from `config.yaml` in its folder."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from common.errors import ConfigurationError
from common.values import expand_home
from train.config import RunConfig, to_run_config

NAME = "config.yaml"
GROUPS = ("run", "vit", "mt5", "stage")  # the settings of every run have them


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
    """Return `settings` with the values of `composed` for the keys that `overrides` name."""
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        OmegaConf.update(settings, key, OmegaConf.select(composed, key), merge=False)
    return to_run_config(settings)
