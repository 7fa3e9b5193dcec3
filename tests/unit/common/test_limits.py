"""The limits of a setting are found by trying its values."""

from dataclasses import dataclass, field

import pytest

from common.errors import ConfigurationError
from common.limits import allowed
from common.values import above, at_least, at_most, one_of


@dataclass
class Settings:
    steps: int = 5
    few: int = 3
    both: int | None = None
    heads: int = 8
    rate: float = 0.5
    share: float = 0.25
    beta: float | None = 0.5
    bias: float = -3.0
    part: float = 1e-9
    kind: str = "one"
    kinds: list[str] = field(default_factory=list)
    name: str = ""
    on: bool = False

    def __post_init__(self) -> None:
        at_least("", 1, steps=self.steps)
        at_most("", 4, few=self.few)
        if self.both is not None:
            at_least("", -2, both=self.both)
            at_most("", 7, both=self.both)
        if self.heads % 4:
            raise ConfigurationError("heads")
        above("", 0, rate=self.rate)
        at_least("", 0, share=self.share)
        at_most("", 1, share=self.share)
        if self.beta is not None and not 0 <= self.beta < 1:
            raise ConfigurationError("beta")
        if 1 / self.part < 0:
            raise ConfigurationError("part")
        one_of("kind", self.kind, ("one", "two", "three"))
        for each in self.kinds:
            one_of("kinds", each, ("one", "two"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("steps", "≥ 1"), ("few", "≤ 4"), ("both", "-2 … 7"), ("heads", ""), ("rate", "> 0"), ("share", "0 … 1"),
        ("beta", "0 … < 1"), ("bias", ""), ("kind", "one, two, three"), ("kinds", "one, two"), ("name", ""), ("on", ""),
    ],
)  # fmt: skip
def test_allowed(name: str, expected: str) -> None:
    assert allowed(Settings(), name, lambda settings: None) == expected


def test_a_further_check_counts() -> None:
    assert allowed(Settings(), "steps", lambda settings: at_most("", 12_000, steps=settings.steps)) == "1 … 12,000"
