"""Pack this project, and the wheels that benchmarks.gpu needs beside torch, into one folder for a bare GPU machine.

    python -m benchmarks.gpu.pack folder=gpu_bench python=3.12
    # copy the folder; there, with torch >= 2.10 and numpy installed:
    bash gpu_bench/run.sh minutes=10

Wheels come from the package index, of the versions in constraints.txt. Raises where the folder would exceed its limit.
"""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from common.command_line import parse, run_command
from common.errors import ConfigurationError, RunStopped

ROOT = Path(__file__).parents[2]
FOLDERS = ("benchmarks", "common", "conf", "data", "model", "parallel")
# What the commands import beside torch and numpy, and what Hugging Face's side needs.
PACKAGES = (
    "hydra-core", "omegaconf", "antlr4-python3-runtime", "PyYAML", "packaging", "rich", "Pygments", "markdown-it-py",
    "mdurl", "megatron-core", "deepspeed", "einops", "hjson", "msgpack", "ninja", "psutil", "py-cpuinfo", "pydantic",
    "pydantic_core", "annotated-types", "typing-inspection", "tqdm", "transformers", "tokenizers", "safetensors",
    "huggingface_hub", "regex", "httpx2", "httpcore2", "h11", "anyio", "sniffio", "idna", "certifi", "truststore",
    "click", "typer", "filelock", "fsspec",
)  # fmt: skip
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
RUN = """#!/bin/bash
# Run benchmarks.gpu with this folder's code and packages; torch and numpy are those of the machine.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
if [ ! -d "$here/packages" ]; then
    python3 -m pip install --quiet --no-index --no-deps --target "$here/packages" "$here"/wheels/*.whl
fi
cd "$here/code"
PYTHONPATH="$here/packages" exec python3 -m benchmarks.gpu "$@"
"""


@dataclass
class Options:
    """Pack this project and its wheels for a bare GPU machine."""

    folder: str = "gpu_bench"
    """Folder to make; it must not exist."""
    python: str = "3.12"
    """Version of Python of the GPU machine, 3.11 or 3.12."""
    limit_mib: float = 60.0
    """Most MiB of the folder."""


def pinned(name: str, constraints: str) -> str:
    """Return `name==version` as in constraints.txt; the name alone where it is not pinned."""
    same = re.compile(rf"^{re.sub(r'[-_.]+', '[-_.]+', re.escape(name))}==(\\S+)", re.IGNORECASE | re.MULTILINE)
    found = same.search(constraints)
    return f"{name}=={found[1]}" if found else name


def fetch_wheels(folder: Path, python: str) -> None:
    """Download a wheel of every package; build one of a package that has none. Raises RunStopped where that fails."""
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    ready = ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]
    for name in PACKAGES:
        package = pinned(name, constraints)
        print(f"packing {package}", flush=True)
        common = ["--quiet", "--no-deps", package]
        for command in (["download", *ready, "--dest"], ["wheel", "--no-build-isolation", "--wheel-dir"]):
            words = [sys.executable, "-m", "pip", *command, str(folder), *common]
            done = subprocess.run(words, capture_output=True, encoding="utf-8")
            if done.returncode == 0:
                break
        else:
            raise RunStopped(f"{package} could not be packed: {done.stderr.strip().splitlines()[-1]}")


def copy_code(folder: Path) -> None:
    """Copy the folders that the benchmark imports."""
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))


def main(options: Options) -> None:
    """Make the folder; raise ConfigurationError where it exists, RunStopped where it becomes too large."""
    folder = Path(options.folder)
    if folder.exists():
        raise ConfigurationError(f"folder={folder} exists; remove it, or choose another.")
    (folder / "wheels").mkdir(parents=True)
    copy_code(folder / "code")
    fetch_wheels(folder / "wheels", options.python)
    (folder / "run.sh").write_text(RUN, encoding="utf-8")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
    if size > options.limit_mib:
        raise RunStopped(f"{folder} has {size:.1f} MiB, more than limit_mib={options.limit_mib}; leave packages out.")
    print(f"{folder}: {size:.1f} MiB, {len(list((folder / 'wheels').iterdir()))} wheels")


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
