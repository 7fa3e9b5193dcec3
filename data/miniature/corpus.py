"""Writes the corpus: each shard is a pure function of (seed, source, split, shard), whatever the number of workers
and ranks."""

import io
import json
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigurationError
from data.miniature.config import SOURCES, SPLITS, VERSION, MiniatureConfig
from data.miniature.ranks import Ranks
from data.miniature.records import MAKERS
from data.miniature.render import encode, render

MANIFEST = "corpus.json"
ALONE = Ranks()
Shard = tuple[str, str, int]  # source, split, index


def make_corpus(
    config: MiniatureConfig, progress: Callable[[int, int], None] = lambda done, total: None, ranks: Ranks = ALONE
) -> bool:
    """Makes the corpus in `config.folder`; False if the same corpus is there already.

    All is written beside the folder and renamed at the end: a folder with a `corpus.json` is whole. A corpus of other
    settings is replaced; a folder that holds anything else raises ConfigurationError. `progress(done, total)` is told
    of this rank's records. A collective of `ranks`, who share the file system and deal the shards out.
    """
    folder = Path(config.folder)
    staging = folder.with_name(folder.name + ".partial")
    if not ranks.first_only(lambda: _prepare(config, folder, staging)):
        return False
    _write_shards(config, staging, ranks, progress)
    ranks.first_only(lambda: _publish(config, folder, staging))
    return True


def _prepare(config: MiniatureConfig, folder: Path, staging: Path) -> bool:
    """Makes the folders to write in; False if the corpus is there already."""
    if (folder / MANIFEST).exists():
        if _manifest_in(folder) == _manifest(config):
            return False
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} exists and is no miniature corpus; choose another folder or remove it.")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        for source in SOURCES:
            (staging / source).mkdir(parents=True)
    except OSError as error:
        raise ConfigurationError(f"folder={folder} cannot be made ({error.strerror}); choose another.") from error
    return True


def _manifest_in(folder: Path) -> Any:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{folder}/{MANIFEST} is no JSON; choose another folder or remove it.") from error


def _publish(config: MiniatureConfig, folder: Path, staging: Path) -> None:
    (staging / MANIFEST).write_text(json.dumps(_manifest(config), indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)


def shards(config: MiniatureConfig) -> list[Shard]:
    """All shards of the corpus."""
    return [
        (source, split, index)
        for source in SOURCES
        for split in SPLITS
        for index in range(-(-config.num_records(source, split) // config.shard_records))
    ]


def num_shard_records(config: MiniatureConfig, shard: Shard) -> int:
    """The last shard of a split may hold fewer than the others."""
    source, split, index = shard
    return min(config.shard_records, config.num_records(source, split) - index * config.shard_records)


def write_shard(config: MiniatureConfig, shard: Shard, folder: Path) -> int:
    """Writes `<folder>/<source>/<split>-<index>.tar` and returns its number of records."""
    source, split, index = shard
    seed = np.random.SeedSequence([config.seed, *(zlib.crc32(name.encode()) for name in (source, split)), index])
    rng = np.random.default_rng(seed)
    first = index * config.shard_records
    last = first + num_shard_records(config, shard)
    path = folder / source / f"{split}-{index:05d}.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for position in range(first, last):
            record, scene = MAKERS[source](rng, split, config.languages)
            key = f"{source}_{split}_{position:07d}"
            if scene is not None:
                _add(tar, f"{key}.jpg", encode(render(scene, config.image_size)))
            _add(tar, f"{key}.json", json.dumps(record, ensure_ascii=False).encode())
    return last - first


def _write_shards(config: MiniatureConfig, folder: Path, ranks: Ranks, progress: Callable[[int, int], None]) -> None:
    """This rank's shards: every `size`-th, so that each rank gets its part of every source."""
    todo = shards(config)[ranks.rank :: ranks.size]
    total = sum(num_shard_records(config, shard) for shard in todo)
    workers = min(len(todo), config.workers or ((os.cpu_count() or 1) if ranks.size == 1 else 1))
    done = 0
    if workers <= 1:
        for shard in todo:
            done += write_shard(config, shard, folder)
            progress(done, total)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(write_shard, config, shard, folder) for shard in todo]):
            done += future.result()
            progress(done, total)


def _manifest(config: MiniatureConfig) -> dict[str, Any]:
    """What decides the bytes of the corpus."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("folder", "workers")}
    return {"version": VERSION, "config": settings}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # its time stamp is 0: same seed, same bytes
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))
