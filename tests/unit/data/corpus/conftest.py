"""Downloads made by hand: photographs-like images, and inputs of every kind with a fault of every kind."""

import csv
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.corpus import jpeg, photo
from data.shards.writer import write_shard
from tests.unit.data.corpus.plugins import CRASHES, HANGS

TEXTS = (
    "a brown dog runs across the wet grass of the park",
    "ein alter Mann liest auf der Bank die Zeitung von gestern",
    "старый дом у реки стоит в тени высоких деревьев",
    "two children play with a red ball on the beach",
)


def png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def marked(seed: int, color: tuple[int, int, int]) -> bytes:
    """Draw an image whose first pixel has a color."""
    image = photo(seed)
    image.putpixel((0, 0), color)
    return png(image)


def write_tars(folder: Path) -> None:
    """Write what img2dataset writes: two tars, the second cut short, with a duplicate and broken samples."""
    samples = []
    for number in range(12):
        samples.append(
            (f"{number:09d}", {"caption": f"{TEXTS[number % 4]} {number}", "url": f"u{number}"}, jpeg(photo(number)))
        )
    samples.append(("a_copy", {"caption": "the same photograph again with other words"}, jpeg(photo(3), 60)))
    samples.append(("small", {"caption": "an icon of a house"}, jpeg(photo(90, 32, 32))))
    samples.append(("long", {"caption": "a banner of a shop"}, jpeg(photo(91, 400, 80))))
    samples.append(("broken", {"caption": "a cut image of a tree"}, jpeg(photo(92))[:900]))
    samples.append(("enormous", {"caption": "a plan of a whole city"}, png(Image.new("1", (9000, 9000)))))
    samples.append(("named", {"caption": "IMG_2034.JPG"}, jpeg(photo(93))))
    samples.append(("blank", {"caption": "  "}, jpeg(photo(94))))
    samples.append(("endless", {"caption": "word " * 200_000}, jpeg(photo(95))))
    samples.append(("text_alone", {"caption": "no image beside it"}, None))
    samples.append(("evaluated", {"caption": "a photograph of an evaluation set"}, jpeg(photo(500), 70)))
    write_shard(folder / "00000.tar", samples)
    more = [
        (f"more{number}", {"caption": f"{TEXTS[number % 4]} {number}"}, jpeg(photo(100 + number)))
        for number in range(6)
    ]
    write_shard(folder / "00001.tar", more)
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: len(whole) * 3 // 4])


def write_tables(folder: Path) -> None:
    """Write a parquet file with images, a CSV and a JSON Lines file with image files, each with faults."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    ids = [*range(200, 210), 200]
    content = {"id": [str(n) for n in ids], "image": [{"bytes": jpeg(photo(n)), "path": None} for n in ids]}
    content |= {"caption": [f"{TEXTS[n % 4]} {n}" for n in ids]}
    pq.write_table(pa.table(content), folder / "a.parquet", row_group_size=4)
    (folder / "cut.parquet").write_bytes((folder / "a.parquet").read_bytes()[:-100])
    for number in range(300, 306):
        (folder / f"{number}.jpg").write_bytes(jpeg(photo(number)))
    with open(folder / "b.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [("image", "caption"), *((f"{n}.jpg", f"{TEXTS[n % 4]} {n}") for n in range(300, 304))]
        )
        csv.writer(file).writerows([("missing.jpg", "a row without its image"), ("304.jpg", "one", "too many")])
    lines = [json.dumps({"image": "305.jpg", "caption": "a woman rides a horse in the snow"}).encode(), b"{broken"]
    (folder / "c.jsonl").write_bytes(b"\n".join([*lines, b'{"image": "304.jpg", "caption": "caf\xe9 in Paris"}']))


def write_documents(folder: Path) -> None:
    """Write a file of mC4's form, with a near-duplicate and an empty text."""
    folder.mkdir()
    long = " ".join(f"word{n * n % 97} and then{n % 31}" for n in range(300))
    texts = [
        long,
        long.replace("word4 ", "other "),
        "Die Katze sitzt am Fenster und sieht hinaus.",
        "",
        "Wort " * 200_000,
    ]
    rows = [{"text": text, "timestamp": "2019", "url": f"https://{n}"} for n, text in enumerate(texts)]
    (folder / "c4-de.tfrecord-00000.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )


@pytest.fixture(scope="session")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("downloads")
    write_tars(folder / "laion")
    write_tables(folder / "tables")
    write_documents(folder / "text")
    (folder / "evaluation").mkdir()
    for number in (500, 501):
        (folder / "evaluation" / f"{number}.jpg").write_bytes(jpeg(photo(number)))
    return folder


@pytest.fixture(scope="session")
def words(downloads: Path) -> list[str]:
    """Settings of a build of all downloads."""
    inputs = {
        "web": {"path": str(downloads / "laion")},
        "tables": {"path": str(downloads / "tables"), "format": "table"},
        "text": {"path": str(downloads / "text"), "format": "mc4"},
    }
    return [
        f"inputs={json.dumps(inputs)}",
        f"duplicates.evaluation.coco={downloads / 'evaluation'}",
        "duplicates.partitions=3",
        "language.engines=[fasttext]",
        "questions=rules",
        "rules=[pii,adult_words]",
        "shard_records=5",
        "part_rows=4",
    ]


@pytest.fixture(scope="session")
def annotated_words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a build with every step that adds or selects: similarity, OCR, questions, translations, negatives."""
    folder = tmp_path_factory.mktemp("annotated")
    images = [jpeg(photo(n)) for n in range(600, 608)]
    images[1], images[5] = marked(601, HANGS), marked(605, CRASHES)  # their texts are long, so that they are kept
    texts = ("two children play with a red ball on the beach of the lake", *TEXTS[1::-1], TEXTS[2])  # the last is short
    rows = [(f"{n}", {"caption": texts[n % 4]}, image) for n, image in enumerate(images)]
    write_shard(folder / "web" / "0.tar", rows[:3])
    write_shard(folder / "web" / "1.tar", rows[3:])
    (folder / "objects" / "images").mkdir(parents=True)
    names = "".join(f"/m/{n},label {n}\n" for n in range(6))
    (folder / "objects" / "classes.csv").write_text(names, encoding="utf-8")
    boxes = "".join(f"i{n},xclick,/m/{n},1,0.1,0.5,0.2,0.6,0\n" for n in range(4))
    header = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsGroupOf\n"
    (folder / "objects" / "boxes.csv").write_text(header + boxes, encoding="utf-8")
    for n in range(4):
        (folder / "objects" / "images" / f"i{n}.jpg").write_bytes(jpeg(photo(610 + n)))
    tables = {code: f"{folder}/{code}.tsv" for code in ("de", "fr")}
    for code, path in tables.items():
        Path(path).write_text("".join(f"{text}\t{code}: {text}\n" for text in texts), encoding="utf-8")
    inputs = {"web": {"path": f"{folder}/web"}}
    inputs["objects"] = {"path": f"{folder}/objects", "format": "open_images", "negatives": 2}
    return [
        f"inputs={json.dumps(inputs)}", f"translations={json.dumps(tables)}", "questions=rules", "part_rows=2",
        "language.engines=[fasttext]", "duplicates.partitions=2", "shard_records=3", "ocr.timeout_s=4",
        "ocr.engine=tests.unit.data.corpus.plugins:Engine", "similarity.keep=0.75",
        "similarity.scorer=tests.unit.data.corpus.plugins:Scorer",
    ]  # fmt: skip
