"""Read the config.json of a Hugging Face folder; its values may be of any type, and are checked."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError


def read_config_json(folder: Path, where: str) -> dict[str, Any] | None:
    """Return what config.json holds, None for a folder or a file without one.

    Raises ConfigurationError for a file that is no mapping with a `model_type`.
    """
    file = folder / "config.json"
    if not file.is_file():
        return None
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        config["model_type"].casefold()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{where}: config.json names no model_type ({type(error).__name__}); download the folder again."
        ) from error
    return config


def part(config: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """Return a mapping within a config.json, {} where it is left out. Raises ConfigurationError for another value."""
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise ConfigurationError(f"{where}: {name} of config.json is no mapping; download the folder again.")
    return value


def whole_number(config: Mapping[str, Any], name: str, default: int | None, where: str) -> int:
    """Return a size in a config.json, `default` where it is left out. Raises ConfigurationError for another value."""
    value = config.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigurationError(
            f"{where}: {name}={value!r} of config.json is no whole number above 0; download the folder again."
        )
    return value
