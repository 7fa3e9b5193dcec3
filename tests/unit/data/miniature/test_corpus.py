"""The miniature corpus on disk: bytes, schema, held-out rule, boxes, command line."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.errors import ConfigurationError
from data.miniature.__main__ import main
from data.miniature.config import SOURCES, SPLITS, MiniatureConfig
from data.miniature.corpus import make_corpus
from data.miniature.language import CODES, language
from data.miniature.records import names_held_out
from data.miniature.render import RGB

Sample = tuple[dict[str, Any], Image.Image | None]
SCALE = 0.02
MPIRUN = Path(sys.executable).parent / "mpirun"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("miniature") / "corpus"
    assert make_corpus(MiniatureConfig(str(folder), scale=SCALE, workers=1, shard_records=100))
    return folder


def read(folder: Path, source: str, split: str) -> list[Sample]:
    samples: dict[str, list[Any]] = {}
    for path in sorted((folder / source).glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, kind = member.name.split(".")
                content = tar.extractfile(member).read()  # type: ignore[union-attr]
                sample = samples.setdefault(key, [None, None])
                sample[kind != "json"] = json.loads(content) if kind == "json" else Image.open(io.BytesIO(content))
    return [(record, image) for record, image in samples.values()]


def digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_bytes_do_not_depend_on_the_number_of_workers(corpus: Path, tmp_path: Path) -> None:
    make_corpus(MiniatureConfig(str(tmp_path / "other"), scale=SCALE, workers=2, shard_records=100))
    assert digest(tmp_path / "other") == digest(corpus)


@pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this python: pip install mpich")
@pytest.mark.parametrize("size", [2, 3])
def test_bytes_do_not_depend_on_the_number_of_ranks(size: int, corpus: Path, tmp_path: Path) -> None:
    """The folder is cleaned first of what a killed job has left."""
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "left").write_text("over", encoding="utf-8")
    arguments = [f"folder={tmp_path / 'other'}", f"scale={SCALE}", "shard_records=100"]
    printed = under_mpirun(size, *arguments)
    assert printed.returncode == 0 and f"by {size} ranks" in printed.stdout, printed.stderr
    assert digest(tmp_path / "other") == digest(corpus)
    assert "is there already" in under_mpirun(size, *arguments).stdout


@pytest.mark.skipif(not MPIRUN.exists(), reason="no mpirun beside this python: pip install mpich")
def test_what_is_wrong_is_printed_once_by_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    printed = under_mpirun(2, f"folder={tmp_path}", "scale=0.0005")
    assert printed.returncode == 2 and printed.stderr.count("no miniature corpus") == 1, printed.stderr


def under_mpirun(size: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [MPIRUN, "-np", str(size), sys.executable, "-m", "data.miniature", *arguments],
        capture_output=True, encoding="utf-8", timeout=120,
    )  # fmt: skip


def test_a_tokenizer_is_never_lost(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    assert make_corpus(MiniatureConfig(str(folder), scale=0.0005, workers=1))
    (folder / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(ConfigurationError, match=r"other settings and tokenizer\.model, which would be lost; remove"):
        make_corpus(MiniatureConfig(str(folder), scale=0.0005, workers=1, seed=1))
    assert (folder / "tokenizer.model").exists()


def test_the_seed_changes_the_corpus_and_replaces_it(tmp_path: Path) -> None:
    config = MiniatureConfig(str(tmp_path / "corpus"), scale=0.0005, workers=1)
    assert make_corpus(config)
    first = digest(tmp_path / "corpus")
    assert not make_corpus(config)
    config.seed = 1
    assert make_corpus(config)
    second = digest(tmp_path / "corpus")
    assert first.keys() == second.keys() and all(first[name] != second[name] for name in first)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigurationError, match="no miniature corpus"):
        make_corpus(MiniatureConfig(str(tmp_path), scale=0.0005))
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("split", SPLITS)
def test_schema(corpus: Path, source: str, split: str) -> None:
    samples = read(corpus, source, split)
    assert len(samples) == MiniatureConfig(scale=SCALE).num_records(source, split)
    for record, image in samples:
        assert (image is None) == (source == "text")
        if image is not None:
            assert image.size == (112, 112) and image.mode == "RGB"
        if source == "webli":
            assert record["language"] in CODES and record["alt_text"]
            for entry in record.get("ocr", []):
                assert entry["text"] in language(entry["language"]).table["words"]
                check_box(entry["box"])
        elif source == "cc3m_35l":
            assert set(record["captions"]) == set(CODES)
        elif source == "vq2a":
            assert 3 <= len(record["questions"]) <= 6
            assert all(set(entry) == {"language", "question", "answer"} for entry in record["questions"])
            asked = [(entry["language"], entry["question"]) for entry in record["questions"]]
            assert len(set(asked)) == len(asked)
            assert all(1 <= len(entry["answer"].split()) <= 2 for entry in record["questions"])
        elif source == "objects":
            labels = {entry["label"] for entry in record["objects"]}
            assert labels and record["absent_labels"] and not labels & set(record["absent_labels"])
            for entry in record["objects"]:
                check_box(entry["box"])
        else:
            assert record["language"] in CODES and len(record["text"]) > 60


def check_box(box: list[float]) -> None:
    ymin, xmin, ymax, xmax = box
    assert 0 <= ymin < ymax <= 1 and 0 <= xmin < xmax <= 1


def test_held_out_twosomes_are_in_every_test_scene_and_nowhere_else(corpus: Path) -> None:
    for split in ("train", "validation"):
        assert not any(names_held_out(record) for record, _ in read(corpus, "cc3m_35l", split))
    assert all(names_held_out(record) for record, _ in read(corpus, "cc3m_35l", "test"))


def test_words_are_on_other_boards_in_test(corpus: Path) -> None:
    def boards(split: str) -> set[tuple[str, tuple[int, ...]]]:
        found = set()
        for record, image in read(corpus, "webli", split):
            for entry in record.get("ocr", []):
                assert image is not None
                ymin, xmin, *_ = entry["box"]
                corner = image.getpixel((round(xmin * 112) + 3, round(ymin * 112) + 3))
                found.add((entry["text"], tuple(round(int(value) / 25) for value in corner)))  # type: ignore[union-attr]
        return found

    shown, held_out = boards("train"), boards("test")
    assert held_out and not shown & held_out


def test_boxes_match_pixels(corpus: Path) -> None:
    for record, image in read(corpus, "objects", "train"):
        assert image is not None
        pixels = np.asarray(image, dtype=np.int32)
        colors = [entry["label"].split()[0] for entry in record["objects"]]
        for entry, color in zip(record["objects"], colors, strict=True):
            near = (np.abs(pixels - RGB[color]).max(-1) < 40).astype(int)
            ymin, xmin, ymax, xmax = (round(value * 112) for value in entry["box"])
            inside = near[ymin:ymax, xmin:xmax]
            assert inside.mean() > 0.25, (record, color)
            # Each side of the box touches the shape: one pixel further in, there is color.
            assert inside[:3].any() and inside[-3:].any() and inside[:, :3].any() and inside[:, -3:].any(), record


def test_every_language_is_there_and_unspaced_ones_have_no_spaces(corpus: Path) -> None:
    texts: dict[str, list[str]] = {code: [] for code in CODES}
    sources = {"webli": set(), "vq2a": set(), "text": set()}  # type: dict[str, set[str]]
    for record, _ in read(corpus, "webli", "train"):
        texts[record["language"]].append(record["alt_text"])
        sources["webli"].add(record["language"])
    for record, _ in read(corpus, "cc3m_35l", "train"):
        for code, caption in record["captions"].items():
            texts[code].append(caption)
            assert len(caption.split()) <= 18, caption
    for record, _ in read(corpus, "vq2a", "train"):
        for entry in record["questions"]:
            texts[entry["language"]].append(entry["question"])
            sources["vq2a"].add(entry["language"])
    for record, _ in read(corpus, "text", "train"):
        texts[record["language"]].append(record["text"])
        sources["text"].add(record["language"])
    assert all(found == set(CODES) for found in sources.values())
    for code, lines in texts.items():
        assert all("{" not in line and "  " not in line and line == line.strip() for line in lines)
        assert any(" " in line for line in lines) == language(code).spaced, code


@pytest.mark.parametrize(
    "argument, states", [("sed=1", "sed"), ("seed=x", "seed"), ("languages=[xx]", "languages"), ("corpus", "key=value")]
)
def test_mistakes_are_one_sentence_and_exit_code_2(
    argument: str, states: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([f"folder={tmp_path / 'corpus'}", argument]) == 2
    message = capsys.readouterr().err.strip()
    assert states in message and "\n" not in message


def test_command_line_makes_the_corpus_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [f"folder={tmp_path / 'corpus'}", "scale=0.0005", "workers=1", "languages=[en,ja]"]
    assert main(arguments) == 0 and "made in" in capsys.readouterr().out
    assert main(arguments) == 0 and "already" in capsys.readouterr().out
    captions = [record["captions"] for record, _ in read(tmp_path / "corpus", "cc3m_35l", "train")]
    assert captions and all(set(caption) == {"en", "ja"} for caption in captions)


def test_a_disk_that_is_full_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device", str(tmp_path / "corpus.partial" / "webli" / "train-00000.tar"))

    monkeypatch.setattr("data.miniature.corpus.make_shard", full)
    assert main([f"folder={tmp_path / 'corpus'}", "scale=0.001", "workers=1"]) == 3
    printed = capsys.readouterr().err
    assert "train-00000.tar: No space left on device; make room" in printed and printed.count("\n") == 1
    assert not (tmp_path / "corpus").exists()


def test_a_manifest_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "corpus.json").write_text("<html>", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"corpus\.json is no JSON"):
        make_corpus(MiniatureConfig(str(tmp_path)))


def test_aligned_signs_lie_on_cells_and_are_labeled(tmp_path: Path) -> None:
    """Words in the middle of a row of the 6 x 6 grid, boards at a column; half of the scenes of objects have one."""
    config = MiniatureConfig(str(tmp_path / "corpus"), scale=0.01, workers=1, aligned=True)
    make_corpus(config)
    for source, share in (("webli", 0.8), ("objects", 0.5)):
        records = [record for record, _ in read(tmp_path / "corpus", source, "train")]
        signs = [record["ocr"][0] for record in records if "ocr" in record]
        assert len(signs) / len(records) == pytest.approx(share, abs=0.15)
        for sign in signs:
            ymin, xmin, ymax, _ = sign["box"]
            assert (ymin + ymax) / 2 * 6 % 1 == pytest.approx(0.5, abs=0.07)
            assert ((xmin - 0.015) * 6 + 0.5) % 1 == pytest.approx(0.5, abs=0.07)
        boxes = [sign["box"] for sign in signs] + [each["box"] for r in records for each in r.get("objects", ())]
        assert all(round(value, 2) == value for box in boxes for value in box)
