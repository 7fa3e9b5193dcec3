"""No mutated input breaks the rule of `tests.fuzz`: a number of seeded cases of each kind, and twenty processes.

The seed is fixed, so a case that fails here fails again under its number. No machine takes longer than half a minute.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz.__main__ import main
from tests.fuzz.values import flipped, mutated, to_json
from tests.unit.data.conftest import record

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("kind", "cases"), [("shards", 100), ("settings", 60)])
def test_only_our_exceptions_and_counts_that_add_up(kind: str, cases: int, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([f"kind={kind}", "minutes=0.5", f"cases={cases}"])
    assert code == 0, capsys.readouterr().out


def test_processes_end_with_an_exit_code_of_the_project_and_a_sentence() -> None:
    words = [sys.executable, "-m", "tests.fuzz", "kind=processes", "cases=20"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=500)
    assert done.returncode == 0 and "20 passed, 0 failed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "draw",
    [lambda rng: to_json(mutated(rng, record(1))), lambda rng: flipped(rng, b"a few bytes")],
    ids=["values", "bytes"],
)
def test_a_case_is_a_function_of_its_seed(draw: Callable[[np.random.Generator], bytes]) -> None:
    first, again = ([draw(np.random.default_rng([1, number])) for number in range(20)] for _ in range(2))
    assert first == again and len(set(first)) > 15
