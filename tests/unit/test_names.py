"""Every module has a test file of its name, or a line in tests/README.md that names the files that test it."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOMS = ("common", "model", "data", "slurm", "parallel", "evaluation", "train", "hydra_plugins", "benchmarks")


def table() -> dict[str, list[str]]:
    """Read the table of tests/README.md: pattern of modules -> test files."""
    section = (TESTS / "README.md").read_text(encoding="utf-8").partition("## Where a module is tested")[2]
    found: dict[str, list[str]] = {}
    for line in section.partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            modules, tests = line.strip("|").split("|")
            names = [
                name for name in re.findall(r"`([^`]+)`", tests) if name.startswith(("unit/", "distributed/", "slurm/"))
            ]
            found |= dict.fromkeys(re.findall(r"`([^`]+)`", modules), names)
    return found


def modules() -> Iterator[str]:
    for room in ROOMS:
        for file in sorted((TESTS.parent / room).rglob("*.py")):
            if file.name != "__init__.py":
                yield file.relative_to(TESTS.parent).as_posix()


def test_every_module_has_its_test_or_a_line() -> None:
    patterns = table()
    assert len(patterns) > 30
    for module in modules():
        folder, _, name = module.rpartition("/")
        own = TESTS / "unit" / folder / f"test_{name}"
        assert own.exists() or any(fnmatchcase(module, pattern) for pattern in patterns), module


def test_every_line_names_modules_and_tests_that_exist() -> None:
    every = [*modules()]
    for pattern, tests in table().items():
        assert any(fnmatchcase(module, pattern) for module in every), pattern
        assert tests and all((TESTS / test).exists() for test in tests), (pattern, tests)
