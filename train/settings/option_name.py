"""Name a tower as the option of conf/vit or conf/mt5 with its sizes."""

from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from common.command_line import CONF


def option_name(group: str, tower: Mapping[str, Any]) -> str:
    """Return the name of the option of `conf/<group>` with these values, else its width and depth."""
    for option in sorted((CONF / group).glob("*.yaml")):
        values = OmegaConf.to_container(OmegaConf.load(option))
        if isinstance(values, dict) and all(tower.get(str(key)) == value for key, value in values.items()):
            return option.stem
    keys = ("width", "depth") if group == "vit" else ("d_model", "num_encoder_layers")
    return "x".join(str(tower[key]) for key in keys)
