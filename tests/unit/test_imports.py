"""Imports run one way, `common < model, data, slurm < parallel, evaluation < train < hydra_plugins, benchmarks`."""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "common": set(),
    "model": {"common"},
    "data": {"common"},
    "slurm": {"common"},
    "parallel": {"common", "model"},
    "evaluation": {"common", "data"},
    "train": {"common", "model", "data", "slurm", "parallel", "evaluation"},
    "hydra_plugins": {"common", "slurm", "train"},
    "benchmarks": {"common", "model", "data", "slurm", "parallel", "evaluation", "train"},
    "examples": {"common", "model", "data", "parallel", "train"},
    "tests": {"common", "model", "data", "slurm", "parallel", "evaluation", "train", "hydra_plugins", "benchmarks",
              "examples"},
}  # fmt: skip
NO_CODE = {"conf", "docs"}  # folders of the checkout without a floor


@cache
def modules() -> dict[str, Path]:
    """Return the files of all modules of this project by dotted name."""
    files = [file for room in MAY_IMPORT for file in (ROOT / room).rglob("*.py")]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imported(file: Path) -> set[str]:
    """Return the names that a file imports: at its top, in functions, under TYPE_CHECKING and by `import_module`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        found.update(_names(node, file))
    return found


def _names(node: ast.AST, file: Path) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        folder = file.relative_to(ROOT).parts[: -node.level] if node.level else ()
        base = ".".join([*folder, *filter(None, [node.module])])
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and node.args:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("import_module", "__import__", "find_spec"):
            yield _beginning(node.args[0])


def _beginning(text: ast.expr) -> str:
    """Return the constant beginning of a string: `data.objectives` for f"data.objectives.{name}"."""
    if isinstance(text, ast.JoinedStr) and text.values:
        text = text.values[0]
    return str(text.value).rstrip(".") if isinstance(text, ast.Constant) else ""


@cache
def graph() -> dict[str, set[str]]:
    """Return the modules of this project that each of them imports."""
    return {name: {m for i in imported(file) if (m := _module(i))} - {name} for name, file in modules().items()}


def _module(name: str) -> str | None:
    """Return the module that a dotted name is or lies in, None for one of another project."""
    while name and name not in modules():
        name = name.rpartition(".")[0]
    return name or None


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Find the groups of nodes that all reach each other (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(arrows.get(node, ())):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(arrows):
        if node not in order:
            visit(node)
    return found


def merged(node_name: Callable[[str], str]) -> dict[str, set[str]]:
    """Return the graph with the modules of each node merged."""
    arrows: dict[str, set[str]] = {}
    for name, others in graph().items():
        arrows.setdefault(node_name(name), set()).update({node_name(other) for other in others} - {node_name(name)})
    return arrows


def room(name: str) -> str:
    """Return the room of a module: a folder within a package, or a file beside such folders."""
    parts = name.split(".")
    return ".".join(parts[:2]) if (ROOT / parts[0]).is_dir() and len(parts) > 1 else name


def test_every_folder_of_code_has_a_floor() -> None:
    folders = {file.relative_to(ROOT).parts[0] for file in ROOT.glob("[a-z]*/*.py")}
    assert folders - NO_CODE == set(MAY_IMPORT) - NO_CODE


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_run_one_way(folder: str) -> None:
    up = {
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if name.split(".")[0] == folder and other.split(".")[0] not in MAY_IMPORT[folder] | {folder}
    }
    assert not up


def test_no_modules_import_each_other() -> None:
    assert not circles(graph())


def test_no_rooms_import_each_other() -> None:
    arrows = {node: others for node, others in merged(room).items() if not node.startswith("tests")}
    assert not circles(arrows)


def test_the_graph_sees_imports_in_functions_and_by_name(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import model.pali\n"
        "def f(name):\n    from train import entry\n    import_module(f'data.objectives.{name}')\n",
        encoding="utf-8",
    )
    assert {"model.pali", "train.entry", "data.objectives"} <= imported(file)


def test_evaluation_starts_no_processes() -> None:
    for name, others in ((name, imported(file)) for name, file in modules().items() if name.startswith("evaluation")):
        assert not [other for other in others if other.startswith(("torch.distributed", "deepspeed"))], name


def test_one_file_imports_megatron() -> None:
    ours = {name: file for name, file in modules().items() if not name.startswith("tests.")}
    found = {name: [each for each in imported(file) if each.startswith("megatron")] for name, file in ours.items()}
    # megatron.energon is a package of its own, which benchmarks/data.py measures.
    assert [name for name, own in found.items() if any(not each.startswith("megatron.energon") for each in own)] == [
        "model.megatron"
    ]


def test_a_process_loads_no_compiler_and_no_logger() -> None:
    """Megatron loads them by default, which costs each rank 2 s of CPU time."""
    code = "import sys, train.pretrain; print({'torch._inductor.compile_fx', 'wandb'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.strip() == "set()"


def imported_at_once(module: str, seen: set[str]) -> set[str]:
    """Return the packages that are imported with a module, directly or through other modules of this project."""
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
def test_a_rank_imports_nothing_that_only_the_main_rank_needs(module: str) -> None:
    """A thousand ranks that import matplotlib from a shared disk would load that disk, and never draw."""
    found = imported_at_once(module, set())
    assert {"torch", "hydra"} <= found
    assert not found & {"matplotlib", "bidi", "arabic_reshaper", "wandb"}
