"""Hash images and documents for finding near-duplicates.

Images: PDQ (256 bits of the signs of a 16 x 16 DCT; Meta's ThreatExchange), of the image and its mirror image;
crops are found by data/corpus/steps/features.py. Documents: 256 minima over shingles of five words (Broder 1997);
the lowest bit of each is the payload, whose differing bits estimate the Jaccard similarity J as 1 - 2 d / 256 (Li and
Koenig 2010).
Each hash has bands: two rows are compared only where a band of theirs is equal.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from common.errors import ConfigurationError
from data.objectives.split_captioning import word_starts

ENTRY = np.dtype([("key", "<u8"), ("row", "<u8"), ("kind", "u1"), ("flags", "u1"), ("hash", "<u8", (4,))])
ID, EXACT, IMAGE, TEXT, FEATURE = range(5)  # kinds of entries
VARIANT, CURATED = 1, 2  # flags: a mirror image; a row that is compared with evaluation sets alone
BITS = 256
LEAST_QUALITY = 50  # of 100; below it PDQ's authors call an image too plain for its hash
PDQ_SIDE = 128  # pixels; PDQ itself reduces to 64
SHINGLE, PERMUTATIONS, TEXT_BANDS, SEED = 5, 256, 32, 1

Entries = NDArray[np.void]


def digest(*parts: bytes | str | int) -> int:
    """Return 64 bits of BLAKE2 over parts, which are kept apart."""
    found = blake2b(digest_size=8)
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        found.update(len(content).to_bytes(8, "little") + content)
    return int.from_bytes(found.digest(), "little")


def entries(kind: int, row: int, keys: Sequence[int], payload: NDArray[np.uint64] | None, flags: int) -> Entries:
    """Return entries of one hash: one for each key."""
    made = np.zeros(len(keys), ENTRY)
    made["key"], made["row"], made["kind"], made["flags"] = keys, row, kind, flags
    if payload is not None:
        made["hash"] = payload
    return made


def image_hashes(pixels: NDArray[np.uint8]) -> list[NDArray[np.uint64]]:
    """Return the hashes of an image, its own and its mirror image's; none if it is too plain.

    `pixels`: uint8 [height, width, 3]. A hash is uint64 [4].
    """
    square = Image.fromarray(pixels).resize((PDQ_SIDE, PDQ_SIDE), Image.Resampling.BOX)
    made = []
    # `compute_dihedral` derives the mirror image's hash from samples that lie half a pixel aside -> hash its pixels
    for each in (np.asarray(square), np.asarray(square)[:, ::-1]):
        bits, quality = _pdq()(np.ascontiguousarray(each))
        if quality < LEAST_QUALITY:
            return []
        made.append(np.packbits(bits.astype(np.uint8)).view("<u8"))
    return made


def image_entries(
    source: str, row: int, hashes: Sequence[NDArray[np.uint64]], band_bits: int, flags: int
) -> list[Entries]:
    """Return the entries of an image's hashes in the buckets of a source."""
    made = []
    for number, own in enumerate(hashes):
        bands = own.view(f"<u{band_bits // 8}")
        keys = [digest("image", source, band, int(value)) for band, value in enumerate(bands)]
        made.append(entries(IMAGE, row, keys, own, flags | (VARIANT if number else 0)))
    return made


def text_entries(source: str, row: int, text: str, flags: int) -> list[Entries]:
    """Return the entries of a document in the buckets of a source."""
    minima = _minima(shingles(text))
    payload = np.packbits((minima & 1).astype(np.uint8)).view("<u8")
    bands = minima.reshape(TEXT_BANDS, -1)
    keys = [digest("text", source, band, values.tobytes()) for band, values in enumerate(bands)]
    return [entries(TEXT, row, keys, payload, flags)]


def shingles(text: str) -> list[str]:
    """Return the runs of five words of a text, case-folded; the whole of a shorter one."""
    folded = " ".join(text.casefold().split())
    starts = [*word_starts(folded), len(folded)]
    if len(starts) <= SHINGLE + 1:
        return [folded]
    return [folded[start:end].strip() for start, end in zip(starts, starts[SHINGLE:], strict=False)]


def text_distance(similarity: float) -> int:
    """Return the bits of 256 that texts of a Jaccard similarity differ by, in the mean."""
    return round(BITS * (1 - similarity) / 2)


def _minima(found: list[str]) -> NDArray[np.uint32]:
    try:
        from rensa import RMinHash
    except ImportError as error:
        raise _missing("texts", error) from error
    minhash = RMinHash(num_perm=PERMUTATIONS, seed=SEED)
    minhash.update(found)
    return np.array(minhash.digest(), "<u4")


def _pdq():  # type: ignore[no-untyped-def]
    try:
        import pdqhash
    except ImportError as error:
        raise _missing("images", error) from error
    return pdqhash.compute


def _missing(name: str, error: ImportError) -> ConfigurationError:
    return ConfigurationError(
        f"duplicates.{name}=true needs a package ({error}); pip install '.[corpus]', or set it to false."
    )
