"""A seed always draws the same mutants; each one parses, and is another program. Tests by chance kill none."""

import ast
import subprocess
from pathlib import Path

import pytest

from tests.mutants import draw as module
from tests.mutants import run
from tests.mutants.draw import Mutant, draw, equivalent, mutants

ROOT = Path(__file__).resolve().parents[2]
SOURCE = b'''"""Text: 1 < 2."""

import torch


def f(x: "int | None" = 3, ready: bool = True) -> int:
    """Docstring."""
    if x is None or not ready:
        raise ValueError(f"{x + 1} is none")
    print(x + 2)
    log.write("w\xc3\xa4re", x)
    return x if x.is_cuda else x * -1


class A:
    def __repr__(self) -> str:
        return str(1 + 1)
'''


def found(source: bytes) -> set[tuple[int, str, str]]:
    return {(mutant.line, mutant.before, mutant.after) for mutant in mutants("model/a.py", source)}


def test_every_kind_of_change_is_made_and_text_is_not_changed() -> None:
    assert found(SOURCE) == {
        (6, "3", "4"),
        (6, "3", "2"),
        (6, "True", "False"),
        (8, "x is None or not ready", "(x is None and (not ready))"),
        (8, "x is None", "(x is not None)"),
        (8, "not ready", "(ready)"),
        (11, "log.write('w\u00e4re', x)", "pass"),
        (12, "return x if x.is_cuda else x * -1", "return None"),
        (12, "x * -1", "(x / -1)"),
        (12, "-1", "(1)"),
        (12, "1", "2"),
        (12, "1", "0"),
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a < b <= c", {"(a <= b <= c)", "(a >= b <= c)", "(a < b < c)", "(a < b > c)"}),
        ("a not in b", {"(a in b)"}),
        ("a @ b + c", {"(a @ b - c)"}),
        ("a // b ** c", {"(a / b ** c)", "(b * c)"}),
        ("f'{a}' + b", set()),
        ("1e-6", {"2e-06", "0.0"}),
        ("0", {"1"}),
        ("a if b else c", {"(not (b))"}),
    ],
)
def test_expressions(before: str, after: set[str]) -> None:
    assert {changed for *_, changed in found(f"x = {before}\n".encode())} == after


def test_a_mutant_changes_its_own_span_alone() -> None:
    for mutant in mutants("model/a.py", SOURCE):
        changed = mutant.applied(SOURCE)
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))
        assert changed[: mutant.start] == SOURCE[: mutant.start]
        assert changed.endswith(SOURCE[mutant.end :])


def test_a_seed_draws_the_same_mutants_of_the_whole_core() -> None:
    drawn = draw(ROOT, 300, seed=1)
    assert {*draw(ROOT, 60, seed=1)} < {*drawn} and not {*draw(ROOT, 60, seed=2)} <= {*drawn}
    assert len(set(drawn)) == 300 and {mutant.file.split("/")[0] for mutant in drawn} == {*module.CORE}
    for mutant in drawn:
        assert ast.parse(mutant.applied((ROOT / mutant.file).read_bytes())), mutant
    assert {mutant.file for mutant in draw(ROOT, 5, 1, "parallel/optimizer/adafactor")} == {
        "parallel/optimizer/adafactor.py"
    }


def test_a_changed_line_changes_its_own_mutants_of_a_draw_alone(tmp_path: Path) -> None:
    lines = [f"x{n} = {n + 10} * y" for n in range(30)]
    file = tmp_path / "model" / "a.py"
    file.parent.mkdir()
    file.write_text("\n".join(lines), encoding="utf-8")
    before = draw(tmp_path, 40, seed=1)
    file.write_text("\n".join(["", *lines[:7], "x7 = y", *lines[8:]]), encoding="utf-8")
    after = {(mutant.line - 1, mutant.before, mutant.after) for mutant in draw(tmp_path, 40, seed=1)}
    kept = {(mutant.line, mutant.before, mutant.after) for mutant in before if mutant.line != 8}
    assert 37 <= len(kept) < 40 and kept <= after


def test_lines_of_equivalent_txt_exist_and_are_not_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    for file, text in equivalent():
        lines = [line.strip() for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
        assert text in lines, f"equivalent.txt: {file} has no line {text!r} any more"
    monkeypatch.setattr(module, "equivalent", lambda: {("model/a.py", "x = 1")})
    assert mutants("model/a.py", b"x = 1\ny = 1\n") == (
        Mutant("model/a.py", 2, 10, 11, "1", "2"),
        Mutant("model/a.py", 2, 10, 11, "1", "0"),
    )


FLAKY = """
def test_fails_once(pytestconfig):
    seen = pytestconfig.rootpath.parent / "seen"
    first = not seen.exists()
    seen.touch()
    assert not first
"""
SHARP = """
from model.a import endless, number
def test_number():
    assert number() == 1
def test_end():
    while endless():
        pass
"""


def test_only_a_test_that_fails_twice_on_the_mutant_detects_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "SLOW_IMPORTS", ())
    monkeypatch.setattr(run, "CPU_S", 3)
    root = tmp_path / "root"
    source = b"def number():\n    return 1\ndef endless():\n    return 0\ndef unused():\n    return 2\n"
    files = {"model/__init__.py": "", "model/a.py": source.decode()}
    files |= {"tests/unit/model/test_a.py": SHARP, "tests/unit/model/test_b.py": FLAKY}
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    (root / "pytest.ini").write_text("[pytest]\npythonpath = .\naddopts = -q", encoding="utf-8")
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    runner = run.Runner(root, tmp_path / "work", further=False)
    changed = {mutant.line: mutant for mutant in mutants("model/a.py", source) if mutant.after.isdigit()}
    assert runner.reach(changed[2]) == "tests/unit/model/test_a.py::test_number"
    assert runner.reach(changed[4]) == "tests/unit/model/test_a.py::test_end"  # takes more CPU time than allowed
    assert runner.reach(changed[6]) is None
    assert "test_b.py::test_fails_once fails once only" in capsys.readouterr().out
    assert (runner.copy / "model" / "a.py").read_bytes() == source
