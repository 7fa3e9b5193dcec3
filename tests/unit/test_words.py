"""Prose and names use the words of docs/glossary.md: comments, docstrings, messages, names, YAML comments, docs."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROOMS = ("common", "model", "data", "slurm", "parallel", "evaluation", "train", "hydra_plugins", "benchmarks", "conf")
FILES = ("README.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml", ".ci/run")
KINDS = (".py", ".md", ".yaml", ".toml", ".sh", ".sbatch", "Makefile", "run")
GLOSSARY = ROOT / "docs" / "glossary.md"
OPENING = re.compile(r"(What|Who|Where|How|Which|Whether)\b")


def table(heading: str) -> list[str]:
    """Read the first column of the glossary's table below a heading."""
    section = GLOSSARY.read_text(encoding="utf-8").partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")][2:]
    return [word.strip() for row in rows for word in row.split(",")]


WORDS = re.compile(rf"\b({'|'.join(table('Words not used'))})\b", re.IGNORECASE)
STEMS = [re.sub("ise$", "is(e|ed|es|er|ers|ing|ation|ations)", word) for word in table("American spelling")]
SPELLING = re.compile(rf"(?<![a-z])(?!(?-i:CANCELLED))({'|'.join(STEMS)})(s|ed|ing|al)?\b", re.IGNORECASE)


def prose(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, text) of what a file holds for a reader: all of it, or the comments of YAML and shell."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.NAME and token.string != "tell":  # a method of files
                yield token.start[0], re.sub(r"_+", " ", token.string)
            elif token.type in (tokenize.COMMENT, tokenize.STRING):
                yield token.start[0], " ".join(token.string.split())
    elif file.suffix == ".md":
        yield from enumerate(text.splitlines(), 1)
    else:
        for number, line in enumerate(text.splitlines(), 1):
            yield number, (re.search(r"(^|\s)#.*", line) or [""])[0]


def files() -> Iterator[Path]:
    """Yield the files of this project with words for a reader."""
    found = [path for room in (*ROOMS, "tests", "examples") for path in (ROOT / room).rglob("*")]
    for path in sorted((*found, *(ROOT / name for name in FILES))):
        of_a_kind = path.suffix in KINDS or path.name in KINDS
        if path.is_file() and of_a_kind and path not in (GLOSSARY, Path(__file__)):
            yield path


def docstrings(file: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


def test_words() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {match[0]!r} in {text[max(0, match.start() - 40) : match.end() + 40]!r}"
        for file in files()
        for line, text in prose(file)
        for match in (WORDS.search(text) or SPELLING.search(text),)
        if match
    ]
    assert not found, "\n".join(["docs/glossary.md has another word for:", *found])


def test_docstrings_open_with_what_they_do() -> None:
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text.splitlines()[0]}"
        for file in files()
        if file.suffix == ".py" and "tests" not in file.relative_to(ROOT).parts
        for line, text in docstrings(file)
        if OPENING.match(text)
    ]
    assert not found, "\n".join(["not an imperative verb:", *found])
