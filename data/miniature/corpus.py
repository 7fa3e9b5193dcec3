"""Write the corpus: each shard is a pure function of (seed, source, split, shard), for any number of workers."""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigurationError
from common.files import read_manifest
from data.miniature.config import SOURCES, SPLITS, VERSION, MiniatureConfig
from data.miniature.records import MAKERS
from data.miniature.render import encode, render
from data.ranks import Ranks
from data.shards.writer import write_shard

MANIFEST = "corpus.json"
ALONE = Ranks()
Shard = tuple[str, str, int]  # source, split, index


def make_corpus(
    config: MiniatureConfig, progress: Callable[[int, int], None] = lambda done, total: None, ranks: Ranks = ALONE
) -> bool:
    """Make the corpus in `config.folder`; return False if the same corpus is there already.

    All files are written beside the folder and renamed at the end: a folder with a `corpus.json` is whole. A corpus of
    other settings is replaced; a folder with anything else in it, such as a tokenizer, raises ConfigurationError.
    `progress(done, total)` is called with this rank's records. A collective of `ranks`, which share a file system; each
    writes some of the shards.
    """
    folder = Path(config.folder)
    staging = folder.with_name(folder.name + ".partial")
    if not ranks.on_first(lambda: _prepare(config, folder, staging)):
        return False
    _write_shards(config, staging, ranks, progress)
    ranks.on_first(lambda: _publish(config, folder, staging))
    return True


def _prepare(config: MiniatureConfig, folder: Path, staging: Path) -> bool:
    """Make the folders to write in; return False if the corpus is there already."""
    if (folder / MANIFEST).exists():
        if read_manifest(folder / MANIFEST) == _manifest(config):
            return False
        if others := sorted(path.name for path in folder.iterdir() if path.name not in (*SOURCES, MANIFEST)):
            raise ConfigurationError(
                f"folder={folder} holds a corpus of other settings and {', '.join(others)}, which would be lost; "
                "remove the folder, or choose another."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} exists and is no miniature corpus; choose another folder or remove it.")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        for source in SOURCES:
            (staging / source).mkdir(parents=True)
    except OSError as error:
        raise ConfigurationError(f"folder={folder} cannot be made ({error.strerror}); choose another.") from error
    return True


def _publish(config: MiniatureConfig, folder: Path, staging: Path) -> None:
    (staging / MANIFEST).write_text(json.dumps(_manifest(config), indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(staging, folder)


def shards(config: MiniatureConfig) -> list[Shard]:
    """Return all shards of the corpus."""
    return [
        (source, split, index)
        for source in SOURCES
        for split in SPLITS
        for index in range(-(-config.num_records(source, split) // config.shard_records))
    ]


def num_shard_records(config: MiniatureConfig, shard: Shard) -> int:
    """Return the number of records of a shard; the last one of a split may hold fewer than the others."""
    source, split, index = shard
    return min(config.shard_records, config.num_records(source, split) - index * config.shard_records)


def make_shard(config: MiniatureConfig, shard: Shard, folder: Path) -> int:
    """Write `<folder>/<source>/<split>-<index>.tar` and return its number of records."""
    source, split, index = shard
    write_shard(folder / source / f"{split}-{index:05d}.tar", _samples(config, shard))
    return num_shard_records(config, shard)


def _samples(config: MiniatureConfig, shard: Shard) -> Iterator[tuple[str, dict[str, Any], bytes | None]]:
    """Yield (key, record, JPEG) of each record of a shard."""
    source, split, index = shard
    seed = np.random.SeedSequence([config.seed, *(zlib.crc32(name.encode()) for name in (source, split)), index])
    rng = np.random.default_rng(seed)
    first = index * config.shard_records
    for position in range(first, first + num_shard_records(config, shard)):
        record, scene = MAKERS[source](rng, split, config)
        image = None if scene is None else encode(render(scene, config.image_size))
        yield f"{source}_{split}_{position:07d}", record, image


def _write_shards(config: MiniatureConfig, folder: Path, ranks: Ranks, progress: Callable[[int, int], None]) -> None:
    """Write this rank's shards: every `size`-th, so that each rank gets its part of every source."""
    todo = shards(config)[ranks.rank :: ranks.size]
    total = sum(num_shard_records(config, shard) for shard in todo)
    workers = min(len(todo), config.workers or ((os.cpu_count() or 1) if ranks.size == 1 else 1))
    done = 0
    if workers <= 1:
        for shard in todo:
            done += make_shard(config, shard, folder)
            progress(done, total)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(make_shard, config, shard, folder) for shard in todo]):
            done += future.result()
            progress(done, total)


def _manifest(config: MiniatureConfig) -> dict[str, Any]:
    """Return the settings that decide the bytes of the corpus."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("folder", "workers")}
    if not config.aligned:
        del settings["aligned"]  # corpora from before the option stay as they are
    return {"version": VERSION, "config": settings}
