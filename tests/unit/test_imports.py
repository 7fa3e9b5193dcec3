"""Imports run one way: train -> data, parallel, model; parallel -> model; and one file of model/ knows Megatron."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {"model": set(), "data": set(), "parallel": {"model"}, "train": {"model", "data", "parallel"}}


def imported(file: Path) -> set[str]:
    """Modules that a file names, wherever it imports them."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_one_way(folder: str) -> None:
    for file in (ROOT / folder).rglob("*.py"):
        ours = {name.split(".")[0] for name in imported(file)} & {*MAY_IMPORT, "benchmarks", "tests"}
        assert ours <= MAY_IMPORT[folder] | {folder}, file


def test_one_file_of_the_model_knows_megatron() -> None:
    knows = [file.name for file in (ROOT / "model").glob("*.py") if any("megatron" in name for name in imported(file))]
    assert knows == ["layers.py"]
