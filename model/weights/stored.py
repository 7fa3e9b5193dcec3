"""Open files of named tensors without reading them: .safetensors, .npz and .bin, and folders of shards.

Headers give names, shapes and types. A tensor is mapped into memory by `read`, so that a slice of it reads no more of
the file than its own pages. No file is unpickled, except .bin by torch's `weights_only` reader.
"""

import json
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.errors import ConfigurationError

FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE = ("model.safetensors", "pytorch_model.bin")
POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `read` maps it (or reads it, where it is compressed), and its values are times `scale`.

    `dtype` is a torch type, or the file's word for a type that is no type of weights.
    """

    shape: torch.Size
    dtype: torch.dtype | str
    read: Callable[[], Tensor]
    scale: float = 1.0

    @property
    def nbytes(self) -> int:
        """Size in bytes, of a tensor of weights."""
        assert isinstance(self.dtype, torch.dtype)
        return self.shape.numel() * self.dtype.itemsize


Stored = dict[str, StoredTensor]


class Values(Mapping[str, Tensor]):
    """The values of stored tensors by name; each is read when it is looked up, and is not kept."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        """Read a tensor."""
        stored = self.stored[name]
        return stored.read() if stored.scale == 1.0 else stored.read() * stored.scale

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self.stored)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.stored)


def open_tensors(path: str | Path, key: str = "") -> Stored:
    """Open a .safetensors, .npz or .bin file, or a folder of such files; return its tensors by name.

    A folder's index, as Hugging Face writes it, names its files. `key` begins messages: the setting that names `path`.
    Raises ConfigurationError where there is no such file, or one of them is missing, cut short or of another kind.
    """
    path, opened, key = Path(path), Stored(), f"{key}: " if key else ""
    for file in files_in(path, key) if path.is_dir() else [path]:
        if not file.is_file():
            raise ConfigurationError(f"{key}{file} does not exist; copy it there, or download the weights again.")
        kinds = {".safetensors": _safetensors, ".npz": _npz, ".bin": _bin}
        kind = kinds.get(file.suffix)
        if kind is None:
            raise ConfigurationError(
                f"{key}{file} is neither a .safetensors, an .npz nor a .bin file; save the weights as one of them."
            )
        with file.open("rb") as begin:
            if begin.read(len(POINTER)) == POINTER:
                raise ConfigurationError(
                    f"{key}{file} is a pointer of Git LFS, not the file itself; run git lfs pull there."
                )
        opened |= kind(file, key)
    return opened


def files_in(folder: Path, key: str = "") -> list[Path]:
    """Return the files of weights in a folder: those that its index names, else the whole one, else all shards."""
    for name in INDEXES:
        if (folder / name).is_file():
            named = _weight_map(folder / name, key)
            if missing := sorted(file for file in named if not (folder / file).is_file()):
                more = f" and {len(missing) - 1} more" * (len(missing) > 1)
                raise ConfigurationError(
                    f"{key}{folder} lacks {missing[0]}{more}, which its {name} names; copy the missing files there, or "
                    "download the folder again."
                )
            return [folder / file for file in sorted(named)]
    for name in WHOLE:
        if (folder / name).is_file():
            return [folder / name]
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        found = ", ".join(sorted(file.name for file in folder.iterdir())[:5]) or "nothing"
        raise ConfigurationError(
            f"{key}{folder} holds neither model.safetensors nor pytorch_model.bin, but {found}; name a folder that "
            "transformers saved, or convert them with save_pretrained."
        )
    return shards


def _weight_map(index: Path, key: str) -> set[str]:
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return {str(name) for name in names}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigurationError(
            f"{key}{index} is no index of weights ({type(error).__name__}: {error}); download the folder again."
        ) from error


def _safetensors(file: Path, key: str) -> Stored:
    try:
        with safe_open(str(file), framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(
                    torch.Size(each.get_shape()),
                    DTYPES.get(each.get_dtype(), each.get_dtype()),
                    _read_safetensors(file, name),
                )
                for name, each in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(
            f"{key}{file} is no whole safetensors file ({error}); copy it, or download it, again."
        ) from error


def _read_safetensors(file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        # Opened anew for every tensor -> its pages leave this process with it, not with the last tensor of the file.
        with safe_open(str(file), framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    return read


def _bin(file: Path, key: str) -> Stored:
    try:
        tensors = torch.load(file, weights_only=True, mmap=True, map_location="cpu")
        tensors = tensors.get("state_dict", tensors)
        found: dict[str, Tensor] = {name: x for name, x in tensors.items() if isinstance(x, Tensor)}
    except Exception as error:  # torch raises errors of many types for a file that is not its own
        why = " ".join(str(error).split())[:120]
        raise ConfigurationError(
            f"{key}{file} cannot be read without running code in it, or mapped ({why}); convert it to safetensors with "
            "save_pretrained of transformers."
        ) from error
    return {
        name: StoredTensor(x.shape, x.dtype if x.dtype in FLOATING else str(x.dtype), _constant(x))
        for name, x in found.items()
    }


def _constant(tensor: Tensor) -> Callable[[], Tensor]:
    return lambda: tensor


def _npz(file: Path, key: str) -> Stored:
    try:
        with zipfile.ZipFile(file) as archive:
            return {
                member.filename.removesuffix(".npy"): _array(file, archive, member) for member in archive.infolist()
            }
    except (OSError, ValueError, zipfile.BadZipFile, struct.error) as error:
        raise ConfigurationError(
            f"{key}{file} is no whole .npz file ({error}); copy it, or download it, again."
        ) from error


def _array(file: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> StoredTensor:
    with archive.open(member) as opened:
        version = np.lib.format.read_magic(opened)
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, fortran, dtype = header(opened)
        offset = opened.tell()
    name = member.filename.removesuffix(".npy")
    brain = dtype.kind == "V" and dtype.itemsize == 2  # flax saves bfloat16 as two bytes without a type
    floats: dict[Any, torch.dtype] = {"f8": torch.float64, "f4": torch.float32, "f2": torch.float16}
    kind = torch.bfloat16 if brain else floats.get(dtype.str[1:], str(dtype))

    def read() -> Tensor:
        if member.compress_type == zipfile.ZIP_STORED:  # as np.savez writes it -> mapped where it lies
            begin = _data_offset(file, member) + offset
            order: Any = "F" if fortran else "C"
            array: Any = np.memmap(file, dtype.newbyteorder("="), "c", begin, shape, order) if shape else None
        if member.compress_type != zipfile.ZIP_STORED or not shape:
            with np.load(file, allow_pickle=False) as arrays:
                array = arrays[name]
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if brain else torch.from_numpy(array)

    return StoredTensor(torch.Size(shape), kind, read)


def _data_offset(file: Path, member: zipfile.ZipInfo) -> int:
    """Return where a member's bytes begin: its local header has lengths of its own (zip specification, 4.3.7)."""
    with file.open("rb") as opened:
        opened.seek(member.header_offset + 26)
        name, extra = struct.unpack("<HH", opened.read(4))
    return member.header_offset + 30 + int(name) + int(extra)


def is_weights(dtype: torch.dtype | str) -> bool:
    """Return whether a type is one of weights; quantized ones are not, because their scales are not read."""
    return dtype in FLOATING


def nth_part(stored: StoredTensor, index: int) -> StoredTensor:
    """Return one entry along axis 0 of a stored tensor."""
    return StoredTensor(stored.shape[1:], stored.dtype, lambda: stored.read()[index], stored.scale)


def listed(names: Iterable[str], shown: int = 3) -> str:
    """List the first names and the number of the others."""
    names = sorted(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
