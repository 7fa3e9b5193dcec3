"""All members of a tar are in a sample or counted, whatever the tar looks like."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.shards.scan import (
    HIDDEN,
    LONGEST_HEADER,
    NO_FILE,
    NO_TARGET,
    OTHER_KIND,
    SPARSE,
    TWICE,
    ShardIndex,
    _Bounded,
    scan,
)

Member = tuple[str | tarfile.TarInfo, bytes]


def write(path: Path, *members: Member, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form, encoding="utf-8", errors="surrogateescape") as tar:
        for name, content in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pair(key: str) -> list[Member]:
    return [(f"{key}.jpg", f"image {key!r}".encode()), (f"{key}.json", json.dumps({"alt_text": key}).encode())]


def contents(path: Path, found: ShardIndex) -> list[list[bytes | None]]:
    """What lies at the spans."""
    whole = path.read_bytes()
    return [[whole[o : o + n] if n >= 0 else None for o, n in row] for row in found.spans.tolist()]


def adds_up(found: ShardIndex) -> bool:
    return found.members == int((found.spans[:, :, 1] >= 0).sum()) + sum(found.left_out.values())


def test_members_of_a_key_may_lie_anywhere(tmp_path):
    keys = [f"{number:02d}" for number in range(5)]
    path = write(tmp_path / "0.tar", *(pair(key)[0] for key in keys), *(pair(key)[1] for key in keys))
    found = scan(str(path))
    assert found.keys == keys and found.left_out == {} and found.defect is None
    assert contents(path, found) == [[pair(key)[1][1], None, pair(key)[0][1]] for key in keys]


def test_dots_are_part_of_a_key_where_no_member_has_the_key_before_them(tmp_path):
    keys = ["photo.1.v2", "photo.3.v2", "plain", "a.b/c"]
    extras: list[Member] = [("plain.seg.png", b"mask"), ("plain.cls", b"3")]
    path = write(tmp_path / "0.tar", *extras, *(member for key in keys for member in pair(key)))
    found = scan(str(path))
    assert found.keys == keys and found.left_out == {OTHER_KIND: 2} and adds_up(found)
    assert contents(path, found) == [[pair(key)[1][1], None, pair(key)[0][1]] for key in keys]


def test_a_second_member_of_a_kind_is_counted_and_replaces_nothing(tmp_path):
    path = write(tmp_path / "0.tar", *pair("a"), *pair("b"), *pair("a"), ("b.png", b"other"), ("b.txt", b"text"))
    found = scan(str(path))
    assert found.keys == ["a", "b"] and found.left_out == {TWICE: 3} and adds_up(found)
    assert contents(path, found)[1] == [pair("b")[1][1], b"text", pair("b")[0][1]]


def test_other_members_are_counted_by_cause(tmp_path):
    folder, fifo = tarfile.TarInfo("folder"), tarfile.TarInfo("pipe.json")
    folder.type, fifo.type = tarfile.DIRTYPE, tarfile.FIFOTYPE
    others: list[Member] = [(folder, b""), (fifo, b""), ("._a.jpg", b"junk"), ("README", b"text"), ("x.parquet", b"")]
    found = scan(str(write(tmp_path / "0.tar", *pair("a"), *others)))
    assert found.keys == ["a"] and found.left_out == {NO_FILE: 1, HIDDEN: 1, OTHER_KIND: 2} and adds_up(found)


def test_links_are_for_the_members_they_point_to(tmp_path):
    hard, soft, broken = (tarfile.TarInfo(f"x/{name}.jpg") for name in ("b", "c", "d"))
    hard.type, hard.linkname = tarfile.LNKTYPE, "./x/a.jpg"
    soft.type, soft.linkname = tarfile.SYMTYPE, "a.jpg"
    broken.type, broken.linkname = tarfile.SYMTYPE, "/etc/passwd"
    links: list[Member] = [(hard, b""), (soft, b""), (broken, b"")]
    path = write(tmp_path / "0.tar", *pair("x/a"), *links, ("x/d.json", b"{}"))
    found = scan(str(path))
    assert found.keys == ["x/a", "x/b", "x/c", "x/d"] and found.left_out == {NO_TARGET: 1} and adds_up(found)
    assert [row[2] for row in contents(path, found)] == [b"image 'x/a'"] * 3 + [None]


def test_links_may_are_before_the_members_they_point_to(tmp_path):
    """As in a tar whose members are sorted by name; a circle of links has no bytes."""
    names = {"a": "b", "b": "c", "d": "e", "e": "d"}
    links: list[Member] = [(tarfile.TarInfo(f"{name}.jpg"), b"") for name in names]
    for (link, _), target in zip(links, names.values(), strict=True):
        link.type, link.linkname = tarfile.SYMTYPE, f"{target}.jpg"
    path = write(tmp_path / "0.tar", *links, *pair("c"), ("a.json", b"{}"))
    found = scan(str(path))
    assert found.keys == ["a", "b", "c"] and found.left_out == {NO_TARGET: 2} and adds_up(found)
    assert [row[2] for row in contents(path, found)] == [b"image 'c'"] * 3


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_every_name_becomes_one_key(tmp_path, form):
    names = ["a\nb", "tab\there", "bytes\udcff", "długa/" + "x" * 200, "空", "e\u0301", "nul", "line\u2028sep"]
    path = write(tmp_path / "0.tar", *(member for name in names for member in pair(name)), form=form)
    found = scan(str(path))
    assert found.keys[:3] == ["a\\nb", "tab\\there", "bytes\\udcff"] and len(found.keys) == len(names)
    assert all(key.isprintable() for key in found.keys)
    assert [row[0] for row in contents(path, found)] == [pair(name)[1][1] for name in names]


def test_a_sparse_member_is_no_run_of_its_bytes(tmp_path):
    sparse = tarfile.TarInfo("a.jpg")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.size": "4096", "GNU.sparse.map": "4000,96"}
    found = scan(str(write(tmp_path / "0.tar", (sparse, b"x" * 96), *pair("b"))))
    assert found.keys == ["b"] and found.left_out == {SPARSE: 1} and adds_up(found)


def test_empty_members_are_members(tmp_path):
    found = scan(str(write(tmp_path / "0.tar", ("a.jpg", b""), ("a.json", b""))))
    assert found.spans[0, :, 1].tolist() == [0, -1, 0] and adds_up(found)


@pytest.mark.parametrize(
    ("defect", "number"),
    [
        ("gzip-compressed tar", 0),
        ("not a tar", 0),
        ("truncated tar", 0),
        ("data behind the end of the tar", 2),
        (None, 0),
    ],
)
def test_what_is_wrong_with_a_whole_tar_is_named(tmp_path, defect, number):
    path = write(tmp_path / "0.tar", *pair("a"), *pair("b"))
    whole = path.read_bytes()
    empty = write(tmp_path / "empty.tar").read_bytes()
    content = {
        "gzip-compressed tar": gzip.compress(whole),
        "not a tar": b"<html>404</html>" * 100,
        "truncated tar": b"",
        "data behind the end of the tar": whole + whole,
        None: empty,
    }[defect]
    path.write_bytes(content)
    found = scan(str(path))
    assert (found.defect, len(found.keys)) == (defect, number) and found.truncated == (defect == "truncated tar")


def header(path: Path, name: str, type_: bytes, size: bytes) -> None:
    """A tar with two whole samples, a header with these bytes as its size, and another sample."""
    first = write(path, *pair("a"), *pair("b")).read_bytes()[: 4 * 1024]
    odd = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT)[:512])
    odd[124:136], odd[156:157] = size, type_
    odd[148:156] = b" " * 8
    odd[148:156] = b"%06o\0 " % sum(odd)
    path.write_bytes(first + bytes(odd) + write(path, *pair("c")).read_bytes())


@pytest.mark.parametrize("type_", [b"0", b"x", b"L", b"g", b"S", b"5"])
@pytest.mark.parametrize(
    "size", [b"\xff" * 11 + b"\xf8", b"\xff" * 10 + b"\xfe\x00", b"\x80" + b"\x7f" * 11, b"77777777777\0"]
)
def test_sizes_that_cannot_be_end_a_tar(tmp_path, type_, size):
    header(tmp_path / "0.tar", "odd.jpg", type_, size)
    found = scan(str(tmp_path / "0.tar"))
    assert adds_up(found) and found.keys[:2] == ["a", "b"]
    assert (found.spans.sum(-1) <= (tmp_path / "0.tar").stat().st_size).all()


def test_a_thousand_headers_of_headers_end_a_tar(tmp_path):
    one = tarfile.TarInfo("x")
    one.type = b"x"
    path = write(tmp_path / "0.tar", *pair("a"), *pair("b"))
    path.write_bytes(path.read_bytes()[:4096] + one.tobuf(tarfile.USTAR_FORMAT)[:512] * 5000)
    found = scan(str(path))
    assert found.keys == ["a", "b"] and found.defect == "truncated tar"


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_raise_nothing_and_members_add_up(tmp_path, seed):
    rng = np.random.default_rng(seed)
    path = write(tmp_path / "0.tar", *(member for key in ("a", "b" * 150, "c\n") for member in pair(key)))
    content = bytearray(path.read_bytes())
    for place in rng.integers(len(content), size=1 + seed // 4):
        content[place] = rng.integers(256)
    path.write_bytes(content[: rng.integers(len(content))] if seed % 3 == 0 else content)
    found = scan(str(path))
    assert adds_up(found) and (found.spans.sum(-1) <= path.stat().st_size).all()


@pytest.mark.parametrize("size", [-512, LONGEST_HEADER + 512])
def test_a_header_that_asks_for_much_reads_nothing(size):
    file = io.BytesIO(bytes(100))
    with pytest.raises(tarfile.ReadError):
        _Bounded(file).read(size)
    assert file.tell() == 0
