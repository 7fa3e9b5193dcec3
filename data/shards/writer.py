"""Write WebDataset tars: `KEY.json` and, if there is an image, `KEY.jpg|png|webp` per sample."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError
from common.files import beside

IMAGE_SIGNATURES = ((b"\xff\xd8", "jpg"), (b"\x89PNG", "png"), (b"RIFF", "webp"))


def image_extension(image: bytes) -> str:
    """Return "jpg", "png" or "webp", by the first bytes; raise ValueError for anything else."""
    for signature, extension in IMAGE_SIGNATURES:
        if image.startswith(signature):
            return extension
    raise ValueError(f"not a JPEG, PNG or WebP image: it begins with {image[:8]!r}")


def write_shard(path: str | Path, samples: Iterable[tuple[str, Mapping[str, Any], bytes | None]]) -> None:
    """Write (key, record, encoded image) samples as one tar; the same samples give the same bytes.

    The tar appears under its name only when it is whole. Raises ConfigurationError for a key that comes twice.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    keys: set[str] = set()
    with beside(path) as scratch, tarfile.open(scratch, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, record, image in samples:
            if key in keys:
                raise ConfigurationError(f"{path} would hold the key {key!r} twice: give every sample its own.")
            keys.add(key)
            if image is not None:
                _add(tar, f"{key}.{image_extension(image)}", image)
            text = json.dumps(record, ensure_ascii=False)
            _add(tar, f"{key}.json", text.encode(errors="backslashreplace"))  # JSON's own escape of half a pair


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time stamp is 0: the same samples give the same bytes
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
