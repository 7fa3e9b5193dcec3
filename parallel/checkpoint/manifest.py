"""Make and check the manifest of a checkpoint: the size and SHA-256 of each of its files."""

import hashlib
import json
from pathlib import Path
from typing import Any

from common.progress import beat
from parallel.checkpoint.folder import raise_if_storage_failed


def broken_file(path: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Return a file of a rank's share that is missing, cut short or altered; raises StorageFailed."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise_if_storage_failed(error, path)
        return "manifest.json"
    if not isinstance(manifest, dict) or not {".metadata", "state.json"} <= manifest.keys():
        return "manifest.json"
    for name in sorted(manifest)[rank::world_size]:
        beat(f"checking {path / name}")
        try:
            if checksum(path / name) != manifest[name]:
                return name
        except OSError as error:
            raise_if_storage_failed(error, path)
            return name
    return None


def checksum(file: Path) -> dict[str, Any]:
    """Return a file's size and SHA-256, as a manifest has them."""
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
