"""Count the code itself: files, imports, docstrings, parameters, and calls that receive a configuration.

    python -m benchmarks.house                        # this checkout
    git worktree add /tmp/before b9287ed
    python -m benchmarks.house roots=[/tmp/before,.]  # two checkouts, side by side
    python -m benchmarks.house trace=true             # also runs the first step of experiment=equivalence, a minute

Files of the rooms (`common/ model/ …`) and Python files in the root count; tests and examples do not.
"""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.command_line import parse, run_command
from common.errors import ConfigurationError

FLOORS = {
    "common": 0, "model": 1, "data": 1, "slurm": 1, "parallel": 2, "evaluation": 2, "train": 3, "hydra_plugins": 4,
    "benchmarks": 4, "tests": 5,
}  # fmt: skip
ROOMS = tuple(room for room in FLOORS if room != "tests")
OPENING = re.compile(r"(What|Who|Where|Which|How|Whether)\b")
RULES = ("D401", "D102", "D205", "D103")
FEW_PARAMETERS, LONG_FUNCTION, LONG_FILE = 5, 60, 400  # above these a function or file is counted

# Runs in the other checkout: counts calls with a configuration among their arguments until the first update.
TRACER = """
import dataclasses, json, os, sys
root, out = os.getcwd() + os.sep, sys.argv.pop(1)
sys.path.insert(0, root)
found, calls = set(), 0
def is_config(value):
    kind = type(value)
    return dataclasses.is_dataclass(kind) and kind.__name__.endswith(("Config", "Settings", "Phase", "Span"))
def count(frame, event, _):
    global calls
    code = frame.f_code
    if event != "call" or not code.co_filename.startswith(root) or os.sep + ".venv" in code.co_filename:
        return
    if code.co_name == "update" and os.sep + "engine" in code.co_filename:
        sys.setprofile(None)
        json.dump({"calls": calls, "functions": len(found)}, open(out, "w"))
        return
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if any(name != "self" and is_config(frame.f_locals.get(name)) for name in names):
        calls += 1
        found.add((code.co_filename, code.co_qualname))
sys.argv[0] = root + "train/pretrain.py"
from train import pretrain
from train.entry import entry
sys.setprofile(count)
entry("pretrain", pretrain.main, pretrain.READS) if hasattr(pretrain, "READS") else entry("pretrain", pretrain.main)
"""


@dataclass
class Options:
    """Count the code itself: files, imports, docstrings, parameters, and calls that receive a configuration."""

    roots: list[str] = field(default_factory=lambda: ["."])
    """Checkouts to count, one column each."""
    trace: bool = False
    """Also run the first training step of experiment=equivalence, to count calls that receive a configuration."""


def sources(root: Path) -> dict[str, Path]:
    """Return the files to count, by module name."""
    files = [path for room in ROOMS for path in sorted((root / room).rglob("*.py"))]
    files += [path for path in sorted(root.glob("*.py")) if path.stem not in ("setup", "conftest")]
    return {".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imported(module: str, tree: ast.Module, known: Mapping[str, Path]) -> Iterator[str]:
    """Yield the modules of ours that a module imports, inside functions and by `import_module` too."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            names += [
                arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)
            ]
    for name in names:
        while name and name not in known and not name.startswith("tests."):
            name = name.rpartition(".")[0]
        if name and name != module:
            yield name


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the sets of two or more nodes that reach each other."""
    reached = {node: _reach(graph, node) for node in graph}
    found = {frozenset({b for b in reached[a] if a in reached.get(b, set())} | {a}) for a in graph if a in reached[a]}
    return [set(circle) for circle in found if len(circle) > 1]


def _reach(graph: Mapping[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    waiting = [start]
    while waiting:
        for node in graph.get(waiting.pop(), set()) - found:
            found.add(node)
            waiting.append(node)
    return found


def count_imports(trees: Mapping[str, ast.Module], known: Mapping[str, Path], root: Path) -> dict[str, object]:
    """Count arrows and circles between rooms, and circles between files."""

    def room(module: str) -> str:
        return "common" if module in known and known[module].parent == root else module.partition(".")[0]

    files = {module: set(imported(module, tree, known)) for module, tree in trees.items()}
    rooms: dict[str, set[str]] = {}
    up = Counter[str]()
    for module, targets in files.items():
        for target in targets:
            if room(target) != room(module):
                rooms.setdefault(room(module), set()).add(room(target))
                if FLOORS[room(target)] >= FLOORS[room(module)]:
                    up[f"{room(module)} -> {room(target)}"] += 1
    # A package's own file holds no part of a circle: importing a module runs it before.
    plain = {
        module: {t for t in targets if known.get(t, Path("x")).stem != "__init__"} for module, targets in files.items()
    }
    return {
        "imports between rooms (arrows)": sum(map(len, rooms.values())),
        "arrows up or sideways": _listed(up),
        "circles of rooms": _sets(circles(rooms)),
        "circles of files": _sets(circles(plain)),
    }


def _listed(counts: Mapping[str, int]) -> str:
    names = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
    return f"{len(counts)}: {names}" if counts else "0"


def _sets(found: list[set[str]]) -> str:
    names = "; ".join(", ".join(sorted(each)) for each in sorted(found, key=sorted))
    return f"{len(found)}: {names}" if found else "0"


def count_functions(trees: Mapping[str, ast.Module]) -> dict[str, object]:
    """Count parameters and lines of functions, and docstrings that open with a question word."""
    longest, many, long, openings = (0, ""), 0, 0, 0
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                number = len([name for name in names if name not in ("self", "cls")])
                longest = max(longest, (number, f"{module}.{node.name}"))
                many += number > FEW_PARAMETERS
                long += (node.end_lineno or node.lineno) - node.lineno + 1 > LONG_FUNCTION
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                openings += bool(OPENING.match(ast.get_docstring(node) or ""))
    return {
        "docstrings that open with What, Who, Where, …": openings,
        "longest parameter list": f"{longest[0]}: {longest[1]}",
        f"functions of more than {FEW_PARAMETERS} parameters": many,
        f"functions of more than {LONG_FUNCTION} lines": long,
    }


def count_docstrings(root: Path, files: list[Path]) -> dict[str, object]:
    """Count ruff's findings about docstrings."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--preview", "--select", ",".join(RULES)]
    names = [str(path.relative_to(root)) for path in files]
    done = subprocess.run(
        [*command, "--output-format", "json", *names], cwd=root, capture_output=True, encoding="utf-8"
    )
    found = Counter(finding["code"] for finding in json.loads(done.stdout))
    return {f"docstrings failing {rule}": found[rule] for rule in RULES}


def count_rooms(root: Path, files: list[Path]) -> dict[str, object]:
    """Count files by folder."""
    folders = Counter(path.parent.relative_to(root).as_posix() for path in files if path.name != "__init__.py")
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in files]
    largest = folders.most_common(3)
    return {
        "files": len(files),
        "lines": sum(lines),
        "rooms (folders with files)": len(folders),
        "fullest rooms (files)": ", ".join(f"{name} {count}" for name, count in largest),
        f"files of more than {LONG_FILE} lines": sum(each > LONG_FILE for each in lines),
    }


def count_configuration(root: Path) -> dict[str, object]:
    """Run the first step, and count the calls and functions that receive a configuration before its update."""
    with tempfile.TemporaryDirectory() as folder:
        corpus, out = Path(folder, "corpus"), Path(folder, "found.json")
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(root)}
        make = [sys.executable, "-m", "data.miniature", f"folder={corpus}", "scale=0.01", "languages=[en,de]"]
        train = [sys.executable, "-m", "data.tokenizer", f"root={corpus}", "vocab_size=1024"]
        overrides = ["experiment=equivalence", "run.steps=1", f"data.root={corpus}", f"run.folder={folder}/run"]
        step = [sys.executable, "-c", TRACER, str(out), *overrides]
        for command in (make, train, step):
            done = subprocess.run(command, cwd=root, env=environment, capture_output=True, encoding="utf-8")
            if done.returncode and command is not step:
                raise ConfigurationError(f"{' '.join(command[1:4])} failed in {root}: {done.stderr.strip()[-300:]}")
        if not out.exists():
            raise ConfigurationError(f"the first step failed in {root}: {done.stderr.strip()[-300:]}")
        found = json.loads(out.read_text(encoding="utf-8"))
    return {
        "calls that receive a configuration before the first update": found["calls"],
        "functions that receive a configuration before the first update": found["functions"],
    }


def count(root: Path, trace: bool) -> dict[str, object]:
    """Return all counts of a checkout, by their names."""
    root = root.resolve()
    known = sources(root)
    if not known:
        raise ConfigurationError(f"roots={root} holds none of {', '.join(ROOMS)}; name a checkout.")
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in known.items()}
    files = list(known.values())
    found = count_rooms(root, files) | count_imports(trees, known, root) | count_functions(trees)
    return found | count_docstrings(root, files) | (count_configuration(root) if trace else {})


def main(options: Options) -> None:
    """Print a Markdown table with a column for each checkout."""
    columns = [count(Path(root), options.trace) for root in options.roots]
    print("| | " + " | ".join(options.roots) + " |")
    print("|---|" + "---|" * len(columns))
    for name in columns[0]:
        print(f"| {name} | " + " | ".join(str(column[name]) for column in columns) + " |")


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
