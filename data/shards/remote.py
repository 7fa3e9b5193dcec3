"""Read tars of object stores and web servers: any URL that fsspec reads (s3://, gs://, http://, memory://, …).

Credentials and end points are those that the library of the protocol finds: its environment variables and files. A read
is one request for a range of bytes. A store that does not answer within TIMEOUT_S, or that answers with an error of its
own, is a storage that fails: `data.storage.retry` tries again.
"""

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from common.errors import ConfigurationError
from common.files import write_bytes
from common.progress import beat

TIMEOUT_S = 20.0  # of one request
CREDENTIALS_WAIT_S = 1.0  # before the second try to find credentials
GONE = (404, 410)
PIECE = 32 << 20  # bytes of a request, of a whole tar
GIB = 1 << 30

Result = TypeVar("Result")
_answered: set[str] = set()  # servers that have answered this process


def is_url(path: str) -> bool:
    """Return whether a path is a URL, and no path of a local file system."""
    return "://" in path


@lru_cache(maxsize=64)
def _file_system(protocol: str, server: str) -> Any:
    import fsspec

    try:
        return fsspec.core.url_to_fs(f"{protocol}://{server}", skip_instance_cache=False)[0]
    except (ImportError, ValueError) as error:
        raise ConfigurationError(
            f"{protocol}://{server} cannot be read ({str(error).splitlines()[0]}); install the library of the protocol "
            "(pip install s3fs, gcsfs or aiohttp), or correct data.root."
        ) from error


def file_system(url: str) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it; raise ConfigurationError for an unknown protocol."""
    protocol, _, rest = url.partition("://")
    found = _file_system(protocol, rest.split("/", 1)[0])
    return found, found._strip_protocol(url)


def called(url: str, name: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of the file system of a URL; raise OSError where it fails, in at most TIMEOUT_S."""
    from fsspec.asyn import AsyncFileSystem, sync

    system, path = file_system(url)

    def call() -> Any:
        if isinstance(system, AsyncFileSystem) and system.async_impl and hasattr(system, f"_{name}"):
            return sync(system.loop, getattr(system, f"_{name}"), path, *arguments, timeout=TIMEOUT_S, **options)
        return getattr(system, name)(path, *arguments, **options)

    return _as_os_error(call, url)


def _as_os_error(call: Callable[[], Result], url: str) -> Result:
    try:
        return _with_credentials(call, url)
    except FileNotFoundError as error:
        status = getattr(error.__cause__, "status", 404)  # fsspec names any failure of a web server so
        if error.__cause__ is None or not url.startswith("http") or status in GONE:
            raise
        raise OSError(errno.EIO, f"{type(error.__cause__).__name__}, HTTP status {status}", url) from error
    except (PermissionError, IsADirectoryError, NotADirectoryError):
        raise
    except TimeoutError as error:
        raise OSError(errno.ETIMEDOUT, f"no answer within {TIMEOUT_S:g} s", url) from error
    except ConfigurationError:
        raise
    except Exception as error:  # each store has exceptions of its own; OSErrors of fsspec may lack a number
        if isinstance(error, OSError) and error.errno:
            raise
        raise OSError(errno.EIO, f"{type(error).__name__}: {str(error)[:100]}", url) from error


def _with_credentials(call: Callable[[], Result], url: str, last: bool = False) -> Result:
    """Call, and raise ConfigurationError where the library of the protocol finds no credentials.

    A machine's own service of credentials may fail to answer at once -> one more try, and a store that has answered
    before is a storage that fails.
    """
    server = url.split("/", 3)[2]
    try:
        result = call()
    except Exception as error:  # NoCredentialsError of botocore, DefaultCredentialsError of google.auth, …
        if "Credentials" not in type(error).__name__ or server in _answered:
            raise
        if last:
            raise ConfigurationError(
                f"{url} needs credentials ({' '.join(str(error).split())[:100]}); set those of the protocol's library "
                "(for S3 AWS_PROFILE, or FSSPEC_S3_ANON=true for a public bucket)."
            ) from error
        time.sleep(CREDENTIALS_WAIT_S)
        return _with_credentials(call, url, last=True)
    _answered.add(server)
    return result


def listing(url: str) -> dict[str, bool]:
    """List a folder of a store: name -> whether it is a folder; raise FileNotFoundError where there is none."""
    system, _ = file_system(url)
    system.invalidate_cache()
    found = called(url.rstrip("/") + "/", "ls", detail=True)
    here = file_system(url)[1].rstrip("/")
    names = {one["name"].rstrip("/").rpartition("/")[2].partition("?")[0]: one["type"] == "directory"
             for one in found if one["name"].rstrip("/") != here}  # fmt: skip
    if not names:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    return names


def stamp(url: str) -> tuple[int, int]:
    """Return the size of an object, and a number that changes with its content."""
    found = called(url, "info")
    if found.get("type") == "directory" or found.get("size") is None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), url)
    version = next((str(found[name]) for name in ("ETag", "etag", "md5Hash", "LastModified", "mtime", "created")
                    if found.get(name)), "")  # fmt: skip
    return int(found["size"]), int.from_bytes(hashlib.sha256(version.encode()).digest()[:7], "big")


class RemoteHandle:
    """Read one object; its stamp is that of the moment when it was opened."""

    def __init__(self, url: str, cache: "Cache | None" = None) -> None:
        self._url, self._cache, self._stamp = url, cache, stamp(url)

    def stamp(self) -> tuple[int, int]:
        """Return the size and the version that the object had when it was opened."""
        return self._stamp

    def read(self, offset: int, size: int) -> bytes:
        """Return these bytes, fewer at the end of the object."""
        end = min(offset + size, self._stamp[0])
        if end <= offset:
            return b""
        name = f"{self._url} {self._stamp} {offset} {end}"
        found = self._cache.get(name) if self._cache else None
        if found is None or len(found) != end - offset:
            found = bytes(called(self._url, "cat_file", start=offset, end=end))
            if len(found) != end - offset:
                raise OSError(errno.EIO, f"{len(found)} bytes where {end - offset} are due", self._url)
            if self._cache:
                self._cache.put(name, found)
        return found


@contextmanager
def copied(url: str) -> Iterator[str]:
    """Copy an object to a temporary file, piece by piece, and remove it at the end."""
    handle = RemoteHandle(url)
    with TemporaryDirectory(prefix="pali_shard_") as folder:
        path = os.path.join(folder, "shard.tar")
        with open(path, "wb") as file:
            for offset in range(0, handle.stamp()[0], PIECE):
                beat()
                file.write(handle.read(offset, PIECE))
        yield path


class Cache:
    """Keep what was read of stores in files of a folder, at most `most` bytes of them; the oldest are removed first.

    Processes may share a folder. A file that cannot be written, as on a full disk, is not kept.
    """

    def __init__(self, folder: str, most: int) -> None:
        self._folder, self._most, self._lock = Path(folder), most, threading.Lock()
        self._left = 0  # bytes that may be added before the files are counted again

    def get(self, name: str) -> bytes | None:
        """Return what was kept under a name, None if there is nothing."""
        try:
            return self._path(name).read_bytes()
        except OSError:
            return None

    def put(self, name: str, content: bytes) -> None:
        """Keep content under a name."""
        with self._lock:
            self._left -= len(content)
            if self._left < 0:
                self._remove_oldest(len(content))
        path = self._path(name)
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, content)

    def _path(self, name: str) -> Path:
        digest = hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
        return self._folder / digest[:2] / digest[2:]

    def _remove_oldest(self, room: int) -> None:
        """Remove files until a tenth of the space is free; what may be added then is half of what is free."""
        found = []
        for path in self._folder.glob("??/*"):
            with suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total + room <= 0.9 * self._most:
                break
            with suppress(OSError):
                path.unlink()
            total -= size
        self._left = max(0, self._most - total - room) // 2  # another process may add the other half
