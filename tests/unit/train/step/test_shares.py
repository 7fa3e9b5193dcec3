"""Shares are compared with the configured ones, with a warning where a source falls short."""

import json

import pytest

from data.config import ComponentConfig
from data.config import shares as shares_of
from train.step.shares import Shares

MIXTURE = {
    "ocr": ComponentConfig("webli", "ocr", 1.0),
    "vqa": ComponentConfig("webli", "vqa", 1.0),
    "more_ocr": ComponentConfig("webli", "ocr", 2.0),
}


def counts(*numbers: int) -> dict[str, int]:
    """Return numbers of examples by component of MIXTURE."""
    return dict(zip(MIXTURE, numbers, strict=True))


def test_shares_are_of_all_examples_since_the_phase_began() -> None:
    shares = Shares(MIXTURE, "mini")
    assert shares.metrics()["share/ocr"] is None  # before the first example
    shares.add(counts(1, 1, 2), due=4)
    shares.add(counts(0, 2, 2), due=4)
    assert shares.metrics() == {
        "share_asked/ocr": 0.25, "share_asked/vqa": 0.25, "share_asked/more_ocr": 0.5,
        "share/ocr": 0.125, "share/vqa": 0.375, "share/more_ocr": 0.5,
    }  # fmt: skip


def test_a_missed_share_is_reported_once_and_not_too_early() -> None:
    shares = Shares(MIXTURE, "mini")
    shares.add(counts(150, 250, 500), due=999)
    assert shares.warning() is None
    shares.add(counts(0, 0, 0), due=1)
    warning = shares.warning()
    assert warning is not None and "ocr 16.67% (asked 25.00%)" in warning and "'mini'" in warning
    assert "vqa 27.78% (asked 25.00%)" in warning and "more than 5%" in warning
    assert shares.warning() is None


@pytest.mark.parametrize(("numbers", "parted"), [([238, 262, 500], []), ([237, 263, 500], ["ocr", "vqa"])])
def test_five_percent_are_relative(numbers: list[int], parted: list[str]) -> None:
    shares = Shares(MIXTURE, "mini")
    shares.add(counts(*numbers), due=1000)
    assert shares.parted() == parted


def test_a_weight_too_small_for_one_example_is_reported() -> None:
    tiny = {"ocr": ComponentConfig("webli", "ocr", 1e-12), "vqa": ComponentConfig("webli", "vqa", 1.0)}
    warning = Shares(tiny, "mini").too_rare(1000, 4096)
    assert warning is not None and "less than one example in its 1,000 steps of ocr (4.1e-06)" in warning
    assert Shares(MIXTURE, "mini").too_rare(1, 4) is None


def test_rounding_of_interleaving_is_not_reported() -> None:
    rare = {"ocr": ComponentConfig("webli", "ocr", 1.0), "vqa": ComponentConfig("webli", "vqa", 999.0)}
    shares = Shares(rare, "mini")
    shares.add({"ocr": 2, "vqa": 998}, due=1000)
    assert shares.parted() == []
    shares.add({"ocr": 0, "vqa": 9000}, due=9000)
    assert shares.parted() == ["ocr"]


def test_a_resumed_run_continues_to_count_the_same_mixture() -> None:
    shares = Shares(MIXTURE, "mini")
    shares.add(counts(1, 1, 2), due=4)
    state = json.loads(json.dumps(shares.state))
    assert Shares(MIXTURE, "mini", state).metrics() == shares.metrics()
    other = MIXTURE | {"text": ComponentConfig("text", "span_corruption", 1.0)}
    assert Shares(other, "mini", state).due == 0


def test_weights_of_any_size_give_shares() -> None:
    huge = {"ocr": ComponentConfig("webli", "ocr", 1e308), "vqa": ComponentConfig("webli", "vqa", 1e308)}
    assert shares_of(huge) == {"ocr": 0.5, "vqa": 0.5}
