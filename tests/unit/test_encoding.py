"""Files and pipes are UTF-8 under every locale.

Ruff's PLW1514 finds only calls on objects whose type it infers; this test reads the source of every file.
"""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT_FILES = ("open", "read_text", "write_text", "fdopen", "NamedTemporaryFile", "TemporaryFile", "FileHandler")
BINARY_OPENERS = ("tarfile", "Image", "os", "np", "zipfile", "archive")  # they take no encoding; archive: a ZipFile


def python_files() -> list[Path]:
    folders = [each for each in ROOT.iterdir() if not each.name.startswith(".") and any(each.glob("*.py"))]
    return [*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]


def calls_by_locale(source: str) -> Iterator[ast.Call]:
    """Find calls that read or write text in the encoding of the locale."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(node.func.value, "id", "") if isinstance(node.func, ast.Attribute) else ""
        given = {keyword.arg for keyword in node.keywords}
        positional = {"read_text": 1, "write_text": 2}.get(name, len(node.args) + 1) <= len(node.args)
        if "encoding" in given or None in given or positional:
            continue
        text = any(
            k.arg in ("text", "universal_newlines") and getattr(k.value, "value", 0) is True for k in node.keywords
        )
        ours = isinstance(node.func, ast.Name) and name != "open"  # a function of that name has its own encoding
        if text or (name in TEXT_FILES and owner not in BINARY_OPENERS and not ours):
            constants = [a for a in (*node.args, *(k.value for k in node.keywords)) if isinstance(a, ast.Constant)]
            modes = [str(each.value) for each in constants if isinstance(each.value, str)]
            binary_by_default = name.endswith("TemporaryFile") and not any(set(m) <= set("rwxat+") for m in modes)
            if not binary_by_default and not any(set(mode) <= set("rwxab+") and "b" in mode for mode in modes):
                yield node


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("path.read_text()", 1),
        ("open(name)", 1),
        ("open(name, 'rb')", 0),
        ("path.open('a')", 1),
        ("tarfile.open(name)", 0),
        ("path.write_text(t, encoding='utf-8')", 0),
        ("subprocess.run(c, text=True)", 1),
        ("tempfile.NamedTemporaryFile('w')", 1),
        ("tempfile.NamedTemporaryFile()", 0),
        ("write_text(path, text)", 0),
        ("path.write_text(text, 'utf-8')", 0),
        ("example(text=80)", 0),
    ],
)
def test_calls_that_depend_on_the_locale_are_found(source: str, found: int) -> None:
    assert len(list(calls_by_locale(source))) == found


def test_all_text_is_utf_8() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in python_files()
        for call in calls_by_locale(path.read_text(encoding="utf-8"))
    ]
    assert not found


PRINTS = r"""
import warnings
from rich.console import Console
from rich.table import Table
from common.errors import ConfigurationError, Notice
from train import entry

def main() -> None:
    print("gr\u00f6\u00dfe \u65e5\u672c \udcf6")
    warnings.warn(Notice("\u0645\u0631\u062d\u0628\u0627"))
    table = Table("\u65e5\u672c")
    table.add_row("\u65e5\u672c")
    Console().print(table)
    raise ConfigurationError("\u0e20\u0e32\u0e29\u0e32")

entry.use_utf8()
entry.in_one_sentence(main)
"""


def test_every_locale_prints_every_character() -> None:
    ascii_only = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], cwd=ROOT, env=os.environ | ascii_only, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 2 and "größe 日本 \\udcf6" in done.stdout and done.stdout.count("日本") == 3, done.stderr
    assert "مرحبا" in done.stderr and done.stderr.endswith("Configuration: ภาษา\n")
