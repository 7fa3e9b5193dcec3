"""Near-duplicates: planted copies are found, other images and texts are not, in any order of entries."""

import io

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from data.corpus.config import DuplicateConfig
from data.corpus.steps import features, hashes, neighbors
from data.corpus.steps.hashes import ENTRY, EXACT, IMAGE, TEXT, Entries, entries
from tests.unit.data.corpus.conftest import jpeg, photo

LIMITS = {IMAGE: 31, TEXT: hashes.text_distance(0.8)}


def hashed(row: int, image: Image.Image, flags: int = 0) -> list[Entries]:
    return features.compared("web", row, np.asarray(image), DuplicateConfig(), flags)


def found(made: list[Entries], evaluation_end: int = 0) -> dict[int, int]:
    edges = neighbors.edges(np.concatenate([np.zeros(0, ENTRY), *made]), LIMITS, evaluation_end, 2)
    edges = neighbors.settled(edges)
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


def test_crops_at_any_place_are_found_by_their_features() -> None:
    """A corner of two thirds of the area, scaled and compressed again; whichever comes first."""
    originals = [photo(n, 320, 240) for n in range(10)]
    boxes = ((0, 0, 262, 196), (58, 0, 320, 196), (0, 44, 262, 240), (58, 44, 320, 240))
    copies = [originals[n].crop(box).resize((400, 300)) for n, box in enumerate(boxes)]
    copies = [Image.open(io.BytesIO(jpeg(one, 50))) for one in copies]
    made = [one for row, each in enumerate([*originals, *copies]) for one in hashed(row, each)]
    assert found(made) == {10 + n: n for n in range(len(copies))}
    made = [one for row, each in enumerate([*copies, *originals]) for one in hashed(row, each)]
    assert found(made) == {4 + n: n for n in range(len(copies))}


def test_votes_must_agree_and_spread() -> None:
    points = np.random.default_rng(0).uniform(0.1, 0.9, (12, 2))
    steps = features.PLACES * np.concatenate([points, points * (1.2, 1.1) - 0.1], 1).clip(0, 1)
    assert features.agreeing(steps.astype(np.uint16)) >= 10
    near = features.PLACES * np.concatenate([points / 10, points / 10], 1)  # a logo of two images
    assert features.agreeing(near.astype(np.uint16)) == 0
    shuffled = np.concatenate([steps[:, :2], steps[::-1, 2:]], 1)
    assert features.agreeing(shuffled.astype(np.uint16)) < features.LEAST_VOTES


def test_a_plain_image_has_no_hash() -> None:
    assert hashes.image_hashes(np.full((100, 100, 3), 200, np.uint8)) == []


def test_hashes_of_another_day_can_be_compared() -> None:
    """Entries lie in files that a later start continues with: each number below would spoil them if it changed."""
    assert hashes.digest("a", 1, b"x") == 2081291212300472124
    (text,) = hashes.text_entries("s", 3, "one two three four five six seven", hashes.CURATED)
    assert text["key"][:2].tolist() == [6062868893941276673, 17681108735245102562] and len(text) == 32
    assert text["hash"][0].tolist() == [
        16008311497397365572, 14268026848427098175, 11727127865277499947, 13152799603347557282,
    ]  # fmt: skip
    assert set(text["row"]) == {3} and set(text["kind"]) == {3} and set(text["flags"]) == {2}
    first, mirrored = hashes.image_hashes(np.asarray(photo(3)))
    assert first[0] == 2282567235955857079 and mirrored[0] == 5402089448761017250
    made = hashes.image_entries("s", 4, [first, mirrored], 16, 0)
    assert [len(one) for one in made] == [16, 16]
    assert [(set(one["kind"]), set(one["flags"])) for one in made] == [({2}, {0}), ({2}, {1})]


def test_the_order_of_entries_does_not_count() -> None:
    made = [one for row, seed in enumerate([1, 2, 1, 3, 2, 1]) for one in hashed(row, photo(seed))]
    every = np.concatenate(made)
    expected = neighbors.edges(every, LIMITS, 0, 2)
    assert neighbors.settled(expected)["row"].tolist() == [2, 4, 5]
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
