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


def imported_at_once(module: str, seen: set[str]) -> set[str]:
    """Modules outside of this project that importing one of ours imports, by way of others of ours."""
    file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    if not file.exists():
        file = file.with_suffix("") / "__init__.py"
    if not file.exists():
        return {module.split(".")[0]}
    if module in seen:
        return set()
    seen.add(module)
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {other for name in names for other in imported_at_once(name, seen)}


@pytest.mark.parametrize("module", ["train.pretrain", "train.evaluate", "train.pretrain_vit"])
def test_a_rank_imports_nothing_that_only_the_first_one_needs(module: str) -> None:
    """A thousand ranks that import matplotlib from a shared disk wait for it, and never draw."""
    found = imported_at_once(module, set())
    assert {"torch", "hydra"} <= found
    assert not found & {"matplotlib", "bidi", "arabic_reshaper", "wandb"}
