"""Find the values that a setting may take by trying them, so that the checks of its dataclass are the only source."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from common.errors import ConfigurationError
from common.values import type_at

INTEGERS = (-(2**31), 2**31 - 1)  # common.values.typed takes these
NUMBERS = (-1e30, 1e30)
TRIED = (1, 0, 2, 8, 64)  # where the setting has no number yet
DIGITS = 6  # of a limit that is no integer
CHOICES = re.compile(r" is unknown; choose (.+) or (.+)\.$")  # the sentence of common.values.one_of
NO_CHOICE = "?"


Check = Callable[[Any], None]  # raises ConfigurationError


def allowed(settings: Any, name: str, check: Check) -> str:
    """Return the values that a field may take while the others stay as in `settings`; "" where each will do.

    A number has limits such as `≥ 1`, `> 0` or `0 … 1`, a text choices such as `fp32, bf16`. `check` refuses values
    that `__post_init__` does not.
    """

    def change(value: Any) -> None:
        check(replace(settings, **{name: value}))

    def accepts(value: Any) -> bool:
        try:
            change(value)
        except (ConfigurationError, ArithmeticError, ValueError):
            return False
        return True

    kind = type_at(type(settings), [name])
    if kind is int:
        return _range(accepts, getattr(settings, name), INTEGERS, _bisect_integers)
    if kind is float:
        return _range(accepts, getattr(settings, name), NUMBERS, _bisect_numbers)
    if kind in (str, list[str]):
        return _choices(change, NO_CHOICE if kind is str else [NO_CHOICE])
    return ""


Accepts = Callable[[float], bool]
Bisect = Callable[[Accepts, float, float], tuple[float, bool] | None]


def _range(accepts: Accepts, now: float | None, ends: tuple[float, float], bisect: Bisect) -> str:
    start = next((each for each in (now, *TRIED) if isinstance(each, int | float) and accepts(each)), None)
    if start is None:
        return ""
    limits = [None if accepts(end) else bisect(accepts, end, start) for end in ends]
    if any(limit is None and not accepts(end) for limit, end in zip(limits, ends, strict=True)):
        return ""  # as multiples of a number, whose limits are not plain
    least, most = limits
    if least and most:
        return f"{'' if least[1] else '> '}{_shown(least[0])} … {'' if most[1] else '< '}{_shown(most[0])}"
    if least:
        return f"{'≥' if least[1] else '>'} {_shown(least[0])}"
    return f"{'≤' if most[1] else '<'} {_shown(most[0])}" if most else ""


def _shown(number: float) -> str:
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


def _bisect_integers(accepts: Accepts, refused: float, accepted: float) -> tuple[float, bool] | None:
    """Return (the accepted integer nearest to `refused`, True), None where a neighbor of it is refused."""
    step = 1 if accepted > refused else -1
    while abs(accepted - refused) > 1:
        middle = (accepted + refused) // 2
        accepted, refused = (middle, refused) if accepts(middle) else (accepted, middle)
    return (accepted, True) if accepts(accepted + step) and accepts(accepted + 2 * step) else None


def _bisect_numbers(accepts: Accepts, refused: float, accepted: float) -> tuple[float, bool] | None:
    """Return (the limit between the two, whether it is accepted), None where it has more than DIGITS digits."""
    step = 1 if accepted > refused else -1
    while abs(accepted - refused) > 10.0 ** -(DIGITS + 3) * max(1.0, abs(accepted)):
        middle = (accepted + refused) / 2
        accepted, refused = (middle, refused) if accepts(middle) else (accepted, middle)
    limit = round(accepted, DIGITS)
    near = step * 10.0**-DIGITS * max(1.0, abs(limit))
    if accepts(limit - near) or not accepts(limit + near):
        return None
    return limit, accepts(limit)


def _choices(change: Check, value: Any) -> str:
    try:
        change(value)
    except ConfigurationError as error:
        if found := CHOICES.search(str(error)):
            return f"{found[1]}, {found[2]}"
    return ""
