"""Writes the corpus: each shard is a pure function of (seed, source, split, shard), whatever the number of workers."""

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

from data.miniature.config import SOURCES, SPLITS, VERSION, MiniatureConfig
from data.miniature.records import MAKERS
from data.miniature.render import encode, render
from errors import ConfigurationError

MANIFEST = "corpus.json"
Shard = tuple[str, str, int]  # source, split, index


def make_corpus(config: MiniatureConfig, progress: Callable[[int, int], None] = lambda done, total: None) -> bool:
    """Makes the corpus in `config.folder`; False if the same corpus is there already.

    All is written beside the folder and renamed at the end: a folder with a `corpus.json` is whole. A corpus of other
    settings is replaced; a folder that holds anything else raises ConfigurationError. `progress(done, total)` is told
    of records.
    """
    folder = Path(config.folder)
    manifest = _manifest(config)
    if (folder / MANIFEST).exists():
        if json.loads((folder / MANIFEST).read_text()) == manifest:
            return False
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} exists and is no miniature corpus; choose another folder or remove it.")
    staging = folder.with_name(folder.name + ".partial")
    shutil.rmtree(staging, ignore_errors=True)
    for source in SOURCES:
        (staging / source).mkdir(parents=True)
    _write_shards(config, staging, progress)
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)
    return True


def shards(config: MiniatureConfig) -> list[Shard]:
    """All shards of the corpus."""
    return [
        (source, split, index)
        for source in SOURCES
        for split in SPLITS
        for index in range(-(-config.num_records(source, split) // config.shard_records))
    ]


def write_shard(config: MiniatureConfig, shard: Shard, folder: Path) -> int:
    """Writes `<folder>/<source>/<split>-<index>.tar` and returns its number of records."""
    source, split, index = shard
    seed = np.random.SeedSequence([config.seed, *(zlib.crc32(name.encode()) for name in (source, split)), index])
    rng = np.random.default_rng(seed)
    first = index * config.shard_records
    last = min(first + config.shard_records, config.num_records(source, split))
    path = folder / source / f"{split}-{index:05d}.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for position in range(first, last):
            record, scene = MAKERS[source](rng, split, config.languages)
            key = f"{source}_{split}_{position:07d}"
            if scene is not None:
                _add(tar, f"{key}.jpg", encode(render(scene, config.image_size)))
            _add(tar, f"{key}.json", json.dumps(record, ensure_ascii=False).encode())
    return last - first


def _write_shards(config: MiniatureConfig, folder: Path, progress: Callable[[int, int], None]) -> None:
    todo = shards(config)
    total = sum(config.num_records(source, split) for source in SOURCES for split in SPLITS)
    workers = config.workers or os.cpu_count() or 1
    done = 0
    if workers == 1:
        for shard in todo:
            done += write_shard(config, shard, folder)
            progress(done, total)
        return
    with ProcessPoolExecutor(min(workers, len(todo)), mp_context=get_context("spawn")) as pool:
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
