"""Near-duplicates: planted copies are found, other images and texts are not, in any order of entries."""

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from data.corpus.steps import hashes, neighbors
from data.corpus.steps.hashes import ENTRY, EXACT, IMAGE, TEXT, Entries, entries
from tests.unit.data.corpus.conftest import photo

CROPS = (0.9, 0.8)
LIMITS = {IMAGE: 31, TEXT: hashes.text_distance(0.8)}


def hashed(row: int, image: Image.Image, flags: int = 0) -> list[Entries]:
    return hashes.image_entries("web", row, hashes.image_hashes(np.asarray(image), CROPS), 16, flags)


def found(made: list[Entries], evaluation_end: int = 0) -> dict[int, int]:
    edges = neighbors.edges(np.concatenate([np.zeros(0, ENTRY), *made]), LIMITS, evaluation_end, 2)
    return dict(zip(edges["row"].tolist(), edges["other"].tolist(), strict=True))


def watermarked(image: Image.Image) -> Image.Image:
    marked = image.copy()
    ImageDraw.Draw(marked).text((10, 100), "example.org", (200, 200, 200))
    return marked


def test_changed_copies_are_found_and_other_images_are_not() -> None:
    originals = [photo(n) for n in range(40)]
    image = originals[9]
    width, height = image.size
    copies = [
        image.resize((80, 60)), ImageOps.mirror(image), watermarked(image), ImageOps.mirror(image.resize((320, 240))),
        image.crop((width // 20, height // 20, width - width // 20, height - height // 20)),
    ]  # fmt: skip
    made = [one for row, each in enumerate([*originals, *copies]) for one in hashed(row, each)]
    assert found(made) == {40 + n: 9 for n in range(len(copies))}


def test_a_plain_image_has_no_hash() -> None:
    assert hashes.image_hashes(np.full((100, 100, 3), 200, np.uint8), CROPS) == []


def test_the_order_of_entries_does_not_count() -> None:
    made = [one for row, seed in enumerate([1, 2, 1, 3, 2, 1]) for one in hashed(row, photo(seed))]
    every = np.concatenate(made)
    expected = neighbors.edges(every, LIMITS, 0, 2)
    assert expected["row"].tolist() == [2, 4, 5]
    shuffled = every[np.random.default_rng(0).permutation(len(every))]
    assert np.array_equal(neighbors.edges(shuffled, LIMITS, 0, 2), expected)


def test_curated_rows_are_compared_with_evaluation_sets_alone() -> None:
    image = photo(1)
    made = [*hashed(0, image), *hashed(1, image, hashes.CURATED), *hashed(2, image, hashes.CURATED)]
    assert found(made, evaluation_end=1) == {1: 0, 2: 0}
    assert found(made[len(hashed(0, image)) :]) == {}


def test_a_large_bucket_costs_its_size_and_no_square() -> None:
    """Rows of one bucket, each with two bits of its own: near all others, beyond the window too."""
    number = 3000
    made = entries(IMAGE, 0, [5] * number, np.zeros(4, np.uint64), 0)
    made["row"] = np.arange(number)
    assert len(found([made])) == number - 1


def test_documents_are_compared_by_their_shingles() -> None:
    words = [f"w{n * n % 101}x{n % 13}" for n in range(200)]
    near, far = list(words), list(words)
    near[50] = "other"
    for place in range(0, 200, 6):
        far[place] = f"else{place}"
    texts = [" ".join(each) for each in (words, near, far, ["quite", "another", "text"])]
    made = [one for row, each in enumerate(texts) for one in hashes.text_entries("text", row, each, 0)]
    assert found(made) == {1: 0}
    assert hashes.shingles("Ein Satz") == ["ein satz"]
    assert len(hashes.shingles("一只狗在公园里跑")) == 4  # of five characters each


def test_an_image_with_too_many_texts_is_removed_with_all_its_rows() -> None:
    made = []
    for row, words in enumerate(("a", "b", "c", "a")):
        made.append(entries(EXACT, row, [9], np.array([hashes.digest(words), 0, 0, 0], np.uint64), 0))
    made.append(entries(EXACT, 4, [8], np.array([1, 0, 0, 0], np.uint64), 0))
    edges = neighbors.edges(np.concatenate(made), LIMITS, 0, 2)
    assert edges["row"].tolist() == [0, 1, 2, 3]
    assert {neighbors.CAUSES[cause] for cause in edges["cause"]} == {"too many texts of an image"}
