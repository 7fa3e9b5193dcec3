"""Make OmegaConf refuse values that it would change silently; the import patches it for the whole process.

YAML and Hydra read text that looks like a number or a bool as one, and OmegaConf converts it back for a text field:
`007` becomes "7", `on` "True", `24:00:00` "86400", and `12e4567` and `71e9999` both "inf".
"""

from typing import Any

from omegaconf.errors import ValidationError
from omegaconf.nodes import BooleanNode, FloatNode, StringNode, ValueNode

KINDS: tuple[Any, ...] = (StringNode, BooleanNode, FloatNode)
_string, _bool, _float = (kind._validate_and_convert_impl for kind in KINDS)


def _text(node: StringNode, value: Any) -> str:
    """Accept text only; through an interpolation (`${run.seed}`) also an integer, whose text is exact."""
    key = str(node._get_full_key(None))
    is_hydra_key = key.startswith("hydra.") and not key.startswith("hydra.launcher.")
    if type(value) in (bool, int, float) and not is_hydra_key and not (type(value) is int and _is_interpolation(node)):
        raise ValidationError(
            f"{key} is text, but its value reads as the {type(value).__name__} {value}; put it in quotes "
            f"(in YAML: '…', on a command line: {key}=\"'…'\")."
        )
    return str(_string(node, value))


def _true_or_false(node: BooleanNode, value: Any) -> bool:
    if type(value) is int and value not in (0, 1):
        raise ValidationError("Value '$VALUE' is not true or false")
    return bool(_bool(node, value))


def _number(node: FloatNode, value: Any) -> float:
    try:
        return float(_float(node, value))
    except OverflowError as error:
        raise ValidationError("The integer has too many digits for a float") from error


def _is_interpolation(node: ValueNode) -> bool:
    return isinstance(node.__dict__.get("_val"), str) and node._is_interpolation()


for _kind, _convert in zip(KINDS, (_text, _true_or_false, _number), strict=True):
    _kind._validate_and_convert_impl = _convert
