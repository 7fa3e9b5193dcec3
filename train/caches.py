"""Point the caches of libraries to a temporary folder where the home is missing or cannot be written to."""

import os
import stat
import tempfile
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path

# Variable -> folder below one common folder; each library makes its own.
CACHES = {
    "XDG_CACHE_HOME": "cache",
    "XDG_CONFIG_HOME": "config",
    "XDG_DATA_HOME": "data",
    "MPLCONFIGDIR": "matplotlib",
    "TRITON_HOME": "triton",
    "TRITON_CACHE_DIR": "triton/cache",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TORCH_HOME": "torch",
    "HF_HOME": "huggingface",
    "WANDB_CACHE_DIR": "wandb/cache",
    "WANDB_CONFIG_DIR": "wandb/config",
    "CUDA_CACHE_PATH": "cuda",
    "NUMBA_CACHE_DIR": "numba",
}
# Also read: a read-only home may hold settings, models and keys, so these stay there.
READ_TOO = ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "TORCH_HOME", "HF_HOME", "WANDB_CONFIG_DIR")


def set_writable_caches(environment: MutableMapping[str, str]) -> None:
    """Set the variables of CACHES that are not set, if the home is missing or cannot be written to.

    The folder is on the node, so that a thousand ranks do not compile into one shared folder.
    """
    home = environment.get("HOME") or os.path.expanduser("~")
    exists = os.path.isabs(home) and home != "/" and os.path.isdir(home)  # containers have / without a home
    if exists and os.access(home, os.W_OK | os.X_OK):
        return
    with suppress(OSError):  # no temporary folder either: libraries use their defaults
        place = private_folder(Path(tempfile.gettempdir()))
        for name, folder in CACHES.items():
            if not (exists and name in READ_TOO):
                environment.setdefault(name, str(place / folder))


def private_folder(temporary: Path) -> Path:
    """Return a folder that no other user can write to, because libraries load code from their caches."""
    place = temporary / f"pali-caches-{os.getuid()}"
    with suppress(OSError):
        place.mkdir(mode=0o700, exist_ok=True)
        found = place.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return place
    return Path(tempfile.mkdtemp(prefix="pali-caches-", dir=temporary))
