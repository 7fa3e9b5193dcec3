"""Find the members of one sample in the bytes of a tar that hold it, from its first header to its last byte.

The index keeps where these bytes begin, how many there are, and a *pattern*: which of the entries is the JSON, which
the text and which the image. Names and sizes are read from the headers, so that the index holds neither.
"""

from collections.abc import Callable
from typing import NamedTuple

from data.shards.scan import BLOCK, IMAGE, KINDS, NUM_KINDS, printable

SCATTERED = 0xFF  # the pattern of a sample whose members do not lie side by side
MOST_ENTRIES = 5  # that a pattern can choose from; the digit 5 is an absent kind
WINDOW = 4 * BLOCK  # bytes that are read with a header: most captions are shorter
FILE, LINK, LONG_NAME, LONG_LINK, PAX, GLOBAL = b"0\x007", b"12", ord("L"), ord("K"), ord("x"), ord("g")


class Entry(NamedTuple):
    """A file or link of a tar: its name, and the place of its content in the bytes; a link has none (size -1)."""

    name: str
    offset: int
    size: int


class Members(NamedTuple):
    """Hold a sample's key and the bytes of its members, None where there is none, in the order of KINDS.

    `image_at`: offset and size of the image in the bytes that the sample was found in.
    """

    key: str
    contents: list[bytes | None]
    image_at: tuple[int, int] | None = None


def entries(content: bytes) -> list[Entry]:
    """Return the files and links of a tar's bytes, which begin with a header; stop at what is no header."""
    found: list[Entry] = []
    place, long_name = 0, ""
    while place + BLOCK <= len(content):
        header = content[place : place + BLOCK]
        size = _number(header[124:136])
        if size is None or not any(header):
            break
        kind, data = header[156], place + BLOCK
        place = data + -(-size // BLOCK) * BLOCK
        if kind == LONG_NAME:
            long_name = _text(content[data : data + size])
        elif kind == PAX:
            long_name = _pax_path(content[data : data + size]) or long_name
        elif kind not in (LONG_LINK, GLOBAL):
            if kind in FILE or kind in LINK:
                name = long_name or _name(header)
                found.append(Entry(name, data, size) if kind in FILE else Entry(name, data, -1))
            long_name = ""
            if kind in LINK:
                place = data
    return found


def read_without_image(read: Callable[[int, int], bytes], begin: int, size: int) -> bytes:
    """Return the bytes of a sample with zeros in place of its image, which is not read.

    `read` takes offset and size. A header is read together with what lies behind it, so that texts take one read more
    than they have images before them.
    """
    content, place, there, long_name = bytearray(size), 0, 0, ""
    while place + BLOCK <= size:
        if place + BLOCK > there:
            there = _read_into(content, read, begin, place, min(place + WINDOW, size))
            if place + BLOCK > there:
                return bytes(content[:there])
        header = bytes(content[place : place + BLOCK])
        length = _number(header[124:136])
        if length is None or not any(header):
            break
        end = min(place + BLOCK + -(-length // BLOCK) * BLOCK, size)
        image = KINDS.get((long_name or _name(header)).rpartition(".")[2].lower()) == IMAGE
        if end > there and not image:
            there = _read_into(content, read, begin, there, end)
            if end > there:
                return bytes(content[:there])
        data, long_name = bytes(content[place + BLOCK : end]) if header[156] in (LONG_NAME, PAX) else b"", ""
        if data:  # the name of the next header, which holds a part of it only
            long_name = _text(data) if header[156] == LONG_NAME else _pax_path(data[:length]) or ""
        place = end
    return bytes(content)


def _read_into(content: bytearray, read: Callable[[int, int], bytes], begin: int, start: int, stop: int) -> int:
    """Read bytes start … stop of a sample, and return where the file ended."""
    found = read(begin + start, stop - start)
    content[start : start + len(found)] = found
    return start + len(found)


def key(name: str) -> str:
    """Return the key of a member that is part of a sample: its name without the kind at its end."""
    return printable(name.rpartition(".")[0])


def pattern(found: list[Entry], name: str, spans: list[tuple[int, int]]) -> int:
    """Return the pattern that gives these members, (offset, size) in the bytes, or SCATTERED if none does."""
    number = 0
    for offset, size in spans:
        digit = MOST_ENTRIES
        if size >= 0:
            same = (at for at, one in enumerate(found) if (one.offset, one.size) == (offset, size))
            digit = next((at for at in same if key(found[at].name) == name), MOST_ENTRIES)
            if digit >= MOST_ENTRIES:
                return SCATTERED
        number = number * (MOST_ENTRIES + 1) + digit
    return number


def chosen(content: bytes, number: int) -> Members | None:
    """Return the sample that a pattern finds in the bytes; None if they hold other members."""
    found, digits = entries(content), []
    for _ in range(NUM_KINDS):
        number, digit = divmod(number, MOST_ENTRIES + 1)
        digits.append(digit)
    name, contents, image_at = None, list[bytes | None](), None
    for kind, digit in enumerate(reversed(digits)):
        if digit == MOST_ENTRIES:
            contents.append(None)
            continue
        if digit >= len(found) or KINDS.get(found[digit].name.rpartition(".")[2].lower()) != kind:
            return None
        one = found[digit]
        if one.size < 0 or one.offset + one.size > len(content):
            return None
        name = name or key(one.name)
        contents.append(content[one.offset : one.offset + one.size])
        image_at = (one.offset, one.size) if kind == IMAGE else image_at
    return None if name is None else Members(name, contents, image_at)


def _number(digits: bytes) -> int | None:
    """Return a size as tars write it, octal or (GNU) binary; None if it is neither."""
    if digits[0] == 0x80:
        return int.from_bytes(digits[1:], "big")
    try:
        return int(digits.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return None


def _name(header: bytes) -> str:
    name = _text(header[:100])
    folder = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{folder}/{name}" if folder else name


def _pax_path(content: bytes) -> str | None:
    """Return the path of a PAX header, records of "<length> path=<value>\\n"."""
    path = None
    while content:
        digits, _, _ = content.partition(b" ")
        if not digits.isdigit() or not 0 < int(digits) <= len(content):
            break
        record, content = content[len(digits) + 1 : int(digits) - 1], content[int(digits) :]
        name, _, value = record.partition(b"=")
        if name == b"path":
            path = _text(value)
    return path


def _text(content: bytes) -> str:
    return content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
