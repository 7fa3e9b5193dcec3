"""Read the docstring below each field of a dataclass, for `--help` and docs/configuration.md."""

import ast
import inspect
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING as REQUIRED


@cache
def field_docs(kind: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, inherited fields included, on one line each."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if is_dataclass(base):
            found |= _own_docs(base)
    return found


def help_lines(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield `key=default` and docstring of each field below a dataclass; mappings by name are shown once."""
    hints, docs = get_type_hints(kind), field_docs(kind)
    for field in fields(kind):
        inner = hints[field.name]
        key, entry = f"{prefix}{field.name}", get_args(inner)[-1] if get_origin(inner) is dict else None
        if is_dataclass(inner):
            yield from help_lines(inner, f"{key}.")
        elif is_dataclass(entry):
            yield f"{key}.<name>={{…}}\n{_indented(docs.get(field.name, ''))}"
            yield from help_lines(entry, f"{key}.<name>.")
        elif field.name in docs:
            yield f"{key}={shown_default(field)}\n{_indented(docs[field.name])}"


def help_text(description: str | None, kind: Any, reads: Sequence[str] = (), groups: Path | None = None) -> str:
    """Return the text of `--help`: a command's docstring, its groups with their choices, and its keys.

    `reads`: the keys that the command reads, as `common.overrides.check_read` takes them; empty: all. `groups`: folder
    with a folder of YAML files for each group.
    """
    lines = [(description or "").strip()]
    names = [name.rstrip("=") for name in reads]
    for group in sorted(groups.iterdir()) if groups else ():
        if group.is_dir() and group.name != "hydra" and (not reads or group.name in names):
            lines.append(f"{group.name}=<{'|'.join(sorted(path.stem for path in group.glob('*.yaml')))}>")
    keys = [name for name in reads if not name.endswith("=")]
    for entry in help_lines(kind):
        key = entry.partition("=")[0]
        if not reads or any(key == name or key.startswith(f"{name}.") for name in keys):
            lines.append(entry)
    return "\n\n".join(lines)


def shown_default(field: "Field[Any]") -> str:
    """Return the default of a field as a user types it; "???" where it is required."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    if default is REQUIRED or default is MISSING:
        return "???"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    if isinstance(default, list):
        return f"[{','.join(map(str, default))}]"
    return str(default)


def _own_docs(kind: type) -> dict[str, str]:
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError):  # made by make_dataclass
        return {}
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for statement, below in zip(tree.body, tree.body[1:], strict=False):
        documented = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
        if documented and isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            found[statement.target.id] = " ".join(str(below.value.value).split())  # type: ignore[attr-defined]
    return found


def _indented(text: str) -> str:
    return textwrap.fill(text, 100, initial_indent="    ", subsequent_indent="    ")
