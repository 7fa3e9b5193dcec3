"""Mutate one to three settings of a command line, then compose and check it as a run does before it starts."""

import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig

from common.launcher import this_process
from tests.fuzz.shards import check_sentence
from tests.fuzz.values import pick
from train.checks import check, check_training_data
from train.config import RunConfig
from train.entry import CONF, entry
from train.settings.compose import to_run_config

VALUES = (
    "", "null", "true", "false", "on", "no", "0", "-0", "-1", "1", "2", "3", "7", "0.5", "1.5", "1e-300", "1e300",
    "1e999", "nan", "inf", "-inf", "100000000000000000000000000000", "9223372036854775807", "4294967296", "12e4567",
    "007", "08", "0x10", "1_000", "24:00:00", "2024_11_25", "[]", "{}", "[1,2]", "[a,b]", "[no,da]", "[[1]]", "{a: 1}",
    "{a: {b: c}}", "a b", "'quoted'", '"', "${run.name}", "${nope}", "${oc.env:NOPE}", "???", "/", "~", "~/x", ".",
    "/dev/null", "/proc/x", "é", "\u202e", "x" * 300, "{00000..00005}", "{0..", "*", "\\", "$HOME",
)  # fmt: skip
OPTIONS = ("mini", "nano", "paper", "tp2", "zero3", "full_224", "demo")
NUMBERS = (
    "0", "1", "2", "3", "5", "16", "100", "-1", "0.1", "0.999", "1.0", "1.001", "1e3", "1e-3", "1000000007",
    "4294967296", "9223372036854775808", "1e30", "1e-30", "nan", "inf", "-inf", "1e999",
)  # fmt: skip
CODES = (0, 2, 3, 75)


def keys(kind: type = RunConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield name and default of every setting, groups of settings included."""
    for field in fields(kind):
        default: Any = field.default_factory() if callable(field.default_factory) else field.default
        yield prefix + field.name, default
        if is_dataclass(default):
            yield from keys(type(default), f"{prefix}{field.name}.")


def override(rng: np.random.Generator) -> str:
    """Draw one word of a command line."""
    kind = rng.random()
    if kind < 0.1:
        groups = [folder.name for folder in CONF.iterdir() if folder.is_dir()]
        return f"{pick(rng, groups)}={pick(rng, (*VALUES, *OPTIONS))}"
    key, default = pick(rng, list(keys()))
    if kind > 0.4 and isinstance(default, int | float) and not isinstance(default, bool):
        return f"{key}={pick(rng, NUMBERS)}"
    if kind < 0.15:
        key = pick(rng, (key[:-1], key.upper(), f"{key}.x", f"+{key}", f"++{key}", f"~{key}", f"{key}.0", f"x.{key}"))
    if kind < 0.17:
        return pick(rng, (key, f"={key}", f"{key}==1", f"--{key}", "", "=", f"{key}=a=b"))
    return f"{key}={pick(rng, VALUES)}"


def run(rng: np.random.Generator, folder: Path, corpus: Path) -> str:
    """Compose and check a command line with odd words; return how it ended.

    Raises AssertionError where it must not end like that.
    """
    words = [override(rng) for _ in range(pick(rng, (1, 1, 1, 2, 3)))]
    arguments = ["experiment=equivalence", f"data.root={corpus}", f"run.folder={folder / 'run'}", *words]
    return f"exit {checked(arguments)[0]}"


def checked(arguments: list[str]) -> tuple[int, str]:
    """Compose and check a command line in this process; return (exit code, output)."""

    def main(composed: DictConfig) -> None:
        config = to_run_config(composed)
        check(config, this_process().world_size)
        check_training_data(config)

    before, printed, code = sys.argv, io.StringIO(), 0
    sys.argv = ["pretrain", *arguments]
    try:
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed):
            entry("pretrain", main)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception as error:
        raise AssertionError(f"{' '.join(map(repr, arguments))}: {type(error).__name__}: {error}") from error
    finally:
        sys.argv = before
    assert code in CODES, (arguments, code, printed.getvalue())
    if code and not printed.getvalue().startswith("usage: "):  # of a flag that Hydra's parser refuses
        lines = [line for line in printed.getvalue().splitlines() if not line.startswith("Warning: ")]
        assert len(lines) == 1, (arguments, printed.getvalue())
        check_sentence(lines[0])
    return code, printed.getvalue()
