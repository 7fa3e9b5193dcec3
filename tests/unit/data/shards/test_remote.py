"""Tars of an object store and of a web server are read by ranges, through faults, and never hang or are lost."""

import errno
import http.server
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import ConfigurationError, StorageFailed
from data import index
from data.error_budget import Ledger
from data.shards import remote
from data.shards.remote import Cache
from data.shards.source import ReadOptions, ShardSource
from data.shards.writer import write_shard
from data.skip import Skip
from tests.unit.data.conftest import png, record

BUCKET = "corpus"


def samples(first: int, number: int) -> list:
    return [(f"{n:05d}", record(n), png(n, 60)) for n in range(first, first + number)]


class Server(http.server.ThreadingHTTPServer):
    """Serve a folder with ranges of bytes; `fail` requests are answered with 503, `stall` ones not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.fail, self.stall, self.sent = folder, 0, 0, 0
        self.stopped = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        if self.server.stall:
            self.server.stall -= 1
            self.server.stopped.wait(5)
            return
        if self.server.fail:
            self.server.fail -= 1
            self.send_error(503)
            return
        path = self.server.folder / self.path.lstrip("/")
        if path.is_dir():
            content = "".join(f'<a href="{name}">{name}</a>' for name in sorted(os.listdir(path))).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
        elif path.is_file():
            content = path.read_bytes()
            place = self.headers.get("Range")
            self.send_response(206 if place else 200)
            self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
            self.send_header("Accept-Ranges", "bytes")
            if place:
                first, last = map(int, place.removeprefix("bytes=").split("-"))
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
                content = content[first : last + 1]
        else:
            self.send_error(404)
            return
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.server.sent += len(content)
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    for number in range(2):
        write_shard(root / "webli" / f"train-{number:05d}.tar", samples(10 * number, 10))
    return root


@pytest.fixture
def server(shards) -> Iterator[Server]:
    pytest.importorskip("aiohttp")
    served = Server(shards)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield served
    served.stopped.set()
    served.shutdown()
    served.server_close()


@pytest.fixture(scope="module")
def bucket(shards) -> Iterator[str]:
    """A real S3 server on the loopback."""
    pytest.importorskip("s3fs")
    moto_server = pytest.importorskip("moto.server")
    served = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    names = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
             "AWS_ENDPOINT_URL": f"http://{host}:{port}"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        for name, value in names.items():
            patched.setenv(name, value)
        system = remote.file_system(f"s3://{BUCKET}")[0]
        system.mkdir(BUCKET)
        for path in sorted((shards / "webli").glob("*.tar")):
            system.put_file(str(path), f"{BUCKET}/webli/{path.name}")
        yield f"s3://{BUCKET}"
    served.stop()
    remote._file_system.cache_clear()


def opened(location: str, folder: Path, **options) -> ShardSource:
    kept = ReadOptions(index_folder=str(folder / "indices"), **{"retry_s": 5.0, **options})
    return ShardSource("webli", location, "train", Ledger(1.0, 1000), kept)


def same_as_local(source: ShardSource, shards: Path, folder: Path) -> None:
    local = opened(str(shards / "webli"), folder / "local")
    assert [source[number][:1] + source[number][2:] for number in range(20)] == [
        local[number][:1] + local[number][2:] for number in range(20)
    ]
    assert source.facts.records == local.facts.records and source[3].image == png(3, 60)


def test_an_object_store_is_read_by_ranges(bucket, shards, tmp_path):
    same_as_local(opened(f"{bucket}/webli", tmp_path), shards, tmp_path)
    pattern = opened(f"{bucket}/webli/train-{{00000..00001}}.tar", tmp_path)
    assert len(pattern) == 20 and pattern.paths == [f"{bucket}/webli/train-0000{n}.tar" for n in range(2)]
    with pytest.raises(ConfigurationError, match="no train shards at s3://corpus/nothing"):
        opened(f"{bucket}/nothing", tmp_path)
    index.main([f"root={bucket}", "sources={webli: webli}", f"index_folder={tmp_path}/made", "processes=2"])
    assert len(os.listdir(tmp_path / "made")) == 1


def test_an_object_that_is_replaced_is_indexed_anew_and_never_read_as_the_old_one(bucket, shards, tmp_path):
    system = remote.file_system(bucket)[0]
    system.copy(f"{BUCKET}/webli/train-00000.tar", f"{BUCKET}/changing/train-00000.tar")
    source = opened(f"{bucket}/changing", tmp_path)
    assert source[0].key == "00000"
    write_shard(tmp_path / "other.tar", [("99999", {"alt_text": "x" * 3000}, png(9, 60)), *samples(50, 3)])
    system.put_file(str(tmp_path / "other.tar"), f"{BUCKET}/changing/train-00000.tar")
    for _ in range(2):
        with pytest.raises(Skip, match=r"(changed|unreadable) shard"):
            source[5]
    with pytest.raises(Skip, match="changed shard"):
        source[0]
    again = opened(f"{bucket}/changing", tmp_path)
    assert [again[number].key for number in range(4)] == ["99999", "00050", "00051", "00052"]


def test_a_web_server_is_read_by_ranges(server, shards, tmp_path):
    same_as_local(opened(f"{server.url}/webli", tmp_path), shards, tmp_path)
    source, before = opened(f"{server.url}/webli", tmp_path), server.sent
    assert source[7].key == "00007"
    size = (shards / "webli" / "train-00000.tar").stat().st_size
    assert 0 < server.sent - before < size / 4


def test_a_store_that_fails_for_a_moment_is_waited_for(server, shards, tmp_path):
    source = opened(f"{server.url}/webli", tmp_path)
    server.fail = 2
    assert source[1].image == png(1, 60) and server.fail == 0
    impatient = opened(f"{server.url}/webli", tmp_path, retry_s=0.3)
    server.fail = 10**9
    with pytest.raises(StorageFailed, match=r"train-00001\.tar could not be read for 0\.3 s .*start the same command"):
        impatient[15]


def test_a_store_that_stalls_is_no_hang(server, tmp_path, monkeypatch):
    source = opened(f"{server.url}/webli", tmp_path)
    monkeypatch.setattr(remote, "TIMEOUT_S", 0.5)
    server.stall, began = 1, time.monotonic()
    assert source[2].image == png(2, 60)
    assert 0.5 <= time.monotonic() - began < 5
    with pytest.raises(OSError) as error:
        server.stall = 1
        remote.stamp(f"{server.url}/webli/train-00000.tar")
    assert error.value.errno == errno.ETIMEDOUT


def test_an_object_that_is_missing_is_a_defect_and_a_url_needs_an_index_folder(server, shards, tmp_path):
    names = f"{server.url}/webli/train-{{00000..00002}}.tar"
    source = opened(names, tmp_path)
    assert len(source) == 20 and source.index.notes[2]["defect"] == "unreadable shard"
    with pytest.raises(ConfigurationError, match=r"is a URL, .*; set data\.index_folder"):
        ShardSource("webli", f"{server.url}/webli", "train", Ledger(1.0, 0))
    with pytest.raises(ConfigurationError, match=r"nope://x cannot be read .*install the library"):
        opened("nope://x/webli", tmp_path)


def test_what_was_read_is_kept_up_to_a_bound(server, tmp_path):
    source = opened(f"{server.url}/webli", tmp_path, cache_folder=str(tmp_path / "cache"), cache_gib=0.001)
    first, before = source[4], server.sent
    assert source[4] == first and server.sent == before
    for path in (tmp_path / "cache").glob("??/*"):
        path.write_bytes(b"cut")
    assert source[4] == first and server.sent > before


def test_a_cache_holds_no_more_than_it_may(tmp_path):
    cache = Cache(str(tmp_path), 100_000)
    for number in range(300):
        cache.put(f"{number}", bytes([number % 256]) * 1000)
        assert sum(path.stat().st_size for path in tmp_path.glob("??/*")) <= 100_000
    assert cache.get("299") == bytes([299 % 256]) * 1000 and cache.get("0") is None
    full = Cache("/proc/nowhere", 1000)
    full.put("x", b"y")
    assert full.get("x") is None


def test_a_store_without_credentials_is_a_mistake_unless_it_has_answered(monkeypatch):
    class NoCredentialsError(Exception):
        """As botocore raises it."""

    def refused():
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(remote, "CREDENTIALS_WAIT_S", 0.0)
    with pytest.raises(ConfigurationError, match=r"s3://b/webli/ needs credentials \(Unable to locate .*AWS_PROFILE"):
        remote._as_os_error(refused, "s3://b/webli/")
    assert remote._as_os_error(lambda: 1, "s3://other/webli/") == 1
    with pytest.raises(OSError, match="NoCredentialsError: Unable") as error:
        remote._as_os_error(refused, "s3://other/webli/")
    assert error.value.errno == errno.EIO
