"""A golden file changes only with a reason, which it keeps; every changed value is shown."""

import json
from pathlib import Path

import pytest

from tests import golden
from tests.golden.__main__ import main

NOW: golden.Lists = {"loss": [2.0, 1.5], "keys": ["a", "b", "c"]}


def compute() -> golden.Lists:
    return NOW


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(golden, "FOLDER", tmp_path)
    monkeypatch.setitem(golden.FILES, "mine", f"{__name__}:compute")
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"loss": [2.0, 2.0], "keys": ["a", "x"]}), encoding="utf-8")
    return path


def test_without_a_reason_nothing_is_written(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = file.read_bytes()
    assert main(["mine"]) == 1
    assert file.read_bytes() == before and list(file.parent.iterdir()) == [file]
    printed = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    assert ["loss", "2", "2.0", "1.5", "-2.50e-01"] in printed
    assert ["keys", "2", "x", "b"] in printed and ["keys", "3", "None", "c"] in printed
    assert ["mine.json:", "3", "of", "4", "values", "differ"] in printed


def test_the_reason_is_kept_beside_the_values(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mine", "--because", " the loss is smaller "]) == 0
    assert json.loads(file.read_text(encoding="utf-8")) == {"because": "the loss is smaller", **NOW}
    assert golden.expected("mine") == NOW
    capsys.readouterr()
    assert main(["mine"]) == 0
    assert capsys.readouterr().out == "mine.json: all 5 values are the same\n"


@pytest.mark.parametrize("arguments", [["theirs"], ["--because", "all"], ["mine", "--because", " "]])
def test_wrong_arguments_write_nothing(file: Path, arguments: list[str]) -> None:
    before = file.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and file.read_bytes() == before


def test_every_golden_file_has_a_function() -> None:
    assert {path.stem for path in Path(golden.__file__).parent.glob("*.json")} == {*golden.FILES}
