"""List the small changes to a file: of operators, constants, conditions and returned values, and removed calls.

A change replaces the source of one node of the syntax tree; all other source stays as it is. Nodes that no test should
check are not changed: annotations, docstrings and other text, errors, log lines, `__repr__`, assertions that narrow a
type, code that only runs with CUDA, and the lines of equivalent.txt.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import islice
from pathlib import Path

HERE = Path(__file__).parent
CORE = ("model", "parallel", "data", "evaluation", "train")
# Not changed: code made for tests (data/miniature), and images and tables for people.
LEFT_OUT = (
    "data/miniature/",
    "train/run/display.py",
    "evaluation/text_drawing.py",
    "evaluation/sample_sheet.py",
    "train/scaling",
    "train/studies/figures.py",
)
SILENT = {"print", "warn", "warning", "info", "debug", "beat", "add_row", "add_column", "Table", "cast", "TypeVar"}

COMPARISONS: dict[type[ast.cmpop], tuple[type[ast.cmpop], ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


@dataclass(frozen=True)
class Mutant:
    """A change of one file: bytes [start, end), which `before` shows on one line, become `after`."""

    file: str
    line: int
    start: int
    end: int
    before: str
    after: str

    def applied(self, source: bytes) -> bytes:
        return source[: self.start] + self.after.encode() + source[self.end :]


def draw(root: Path, count: int, seed: int, files: str = "") -> list[Mutant]:
    """Draw `count` mutants of the core, all with the same probability; return them sorted by file.

    Those with the smallest hashes of `seed` and their own text are drawn. So a commit changes those mutants of a draw
    alone whose lines it changes, and what was found of the others still holds. `files`: the beginning of the paths of
    files to change.
    """
    paths = sorted(path for folder in CORE for path in (root / folder).rglob("*.py"))
    names = [path.relative_to(root).as_posix() for path in paths]
    sources = {
        name: (root / name).read_bytes() for name in names if name.startswith(files) and not name.startswith(LEFT_OUT)
    }
    hashed = {_hash(seed, *named): named[0] for name in sources for named in _numbered(name, sources[name])}
    every = (hashed[key] for key in sorted(hashed))
    others = (mutant for mutant in every if is_another_program(sources[mutant.file], mutant))
    return sorted(islice(others, count), key=lambda mutant: (mutant.file, mutant.start, mutant.after))


def _numbered(file: str, source: bytes) -> Iterator[tuple[Mutant, str, int]]:
    """Yield each mutant of a file, the text of its line, and how many equal ones come before it."""
    lines, seen = source.decode().splitlines(), Counter[tuple[str, str, str]]()
    for mutant in mutants(file, source):
        line = lines[mutant.line - 1].strip()
        same = line, mutant.before, mutant.after
        yield mutant, line, seen[same]
        seen[same] += 1


def _hash(seed: int, mutant: Mutant, line: str, number: int) -> bytes:
    return sha256(repr((seed, mutant.file, line, mutant.before, mutant.after, number)).encode()).digest()


@cache
def mutants(file: str, source: bytes) -> tuple[Mutant, ...]:
    """Return every mutant of a file."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    found = []
    for node, after in _changes(ast.parse(source)):
        if (file, lines[node.lineno - 1].decode().strip()) in equivalent():
            continue
        assert node.end_lineno is not None and node.end_col_offset is not None
        start, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        found.append(Mutant(file, node.lineno, start, end, ast.unparse(node), after))
    return tuple(found)


def is_another_program(source: bytes, mutant: Mutant) -> bool:
    """Return whether the mutant parses to another program. Raises SyntaxError where it does not parse."""
    return ast.dump(ast.parse(mutant.applied(source))) != _program(source)


@cache
def _program(source: bytes) -> str:
    return ast.dump(ast.parse(source))


@cache
def equivalent() -> frozenset[tuple[str, str]]:
    """Return (file, line without indentation) of each line in equivalent.txt, which gives the reasons."""
    lines = (HERE / "equivalent.txt").read_text(encoding="utf-8").splitlines()
    entries = [line.split(": ", 1) for line in lines if line and not line.startswith(("#", " "))]
    return frozenset((file, text) for file, text in entries)


Change = tuple["ast.expr | ast.stmt", str]


def _changes(node: ast.AST) -> Iterator[Change]:
    """Yield (node, its new source) for a node and all nodes below it."""
    if _is_left_alone(node):
        return
    yield from _of(node)
    for name, value in ast.iter_fields(node):
        if name not in _skipped(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _changes(child)


def _is_left_alone(node: ast.AST) -> bool:
    match node:
        case ast.Raise() | ast.Assert() | ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return True
        case ast.FunctionDef(name=name):
            return name in ("__repr__", "__str__")
        case ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
            return True
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name in SILENT
        case ast.Expr(value=ast.Call() as call):
            return _is_left_alone(call)
    return False


def _skipped(node: ast.AST) -> set[str]:
    """Return the fields of a node that are not changed; under a condition on CUDA, the branch that needs it too."""
    skipped = {"annotation", "returns", "decorator_list"}
    if isinstance(node, ast.If | ast.IfExp) and _asks_for_cuda(node.test):
        skipped |= {"test", "orelse" if ast.unparse(node.test).startswith("not ") else "body"}
    return skipped


def _asks_for_cuda(test: ast.expr) -> bool:
    return "cuda" in ast.unparse(test)


def _of(node: ast.AST) -> Iterator[Change]:
    match node:
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            for i, op in enumerate(ops):
                for other in COMPARISONS[type(op)]:
                    yield node, _bracketed(ast.Compare(left, [*ops[:i], other(), *ops[i + 1 :]], comparators))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC and not _is_text(node):
            yield node, _bracketed(ast.BinOp(left, ARITHMETIC[type(op)](), right))
        case ast.AugAssign(op=op) if type(op) in ARITHMETIC:
            yield node, ast.unparse(ast.AugAssign(node.target, ARITHMETIC[type(op)](), node.value))
        case ast.BoolOp(op=op, values=values):
            yield node, _bracketed(ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values))
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield node, _bracketed(operand)
        case ast.Constant(value=value):
            yield from ((node, repr(other)) for other in _constants(value))
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            own = isinstance(test, ast.Compare | ast.BoolOp | ast.UnaryOp)  # such a node has changes of its own
            if not (own or _asks_for_cuda(test)):
                yield test, f"(not {_bracketed(test)})"
        case ast.Return(value=ast.expr() as value) if not _is_none(value):
            yield node, "return None"
        case ast.Expr(value=ast.Call()):
            yield node, "pass"


def _constants(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1] if value else [1]
    return [value * 2, 0.0] if isinstance(value, float) and value else []


def _bracketed(node: ast.expr) -> str:
    return f"({ast.unparse(node)})"


def _is_text(node: ast.BinOp) -> bool:
    return any(isinstance(side, ast.JoinedStr) or _is_str(side) for side in (node.left, node.right))


def _is_str(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
