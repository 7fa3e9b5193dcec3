"""The guard against leaks: planted images and texts are reported, and no others."""

import contextlib
import json
from pathlib import Path

import pytest
from PIL import ImageOps

from common.command_line import run_command
from data import overlap
from data.overlap import Match, OverlapConfig, Sample
from data.shards.writer import write_shard
from tests.unit.data.corpus.conftest import jpeg, photo

QUESTION = "which of the two men in the image wears a green hat"


def test_planted_samples_are_found_and_no_others() -> None:
    test = [Sample(f"test {n}", jpeg(photo(n)), (f"a short text {n}",)) for n in range(8)]
    test.append(Sample("question", None, (QUESTION, "yes")))
    train = [Sample(f"train {n}", jpeg(photo(100 + n)), ("yes", "a short text 1")) for n in range(20)]
    train.append(Sample("mirrored", jpeg(ImageOps.mirror(photo(3)), 60), ("anything",)))
    train.append(Sample("asked", None, ("other", QUESTION.upper())))
    train.append(Sample("broken", b"\xff\xd8", ()))
    found = overlap.overlap(iter(train), test, OverlapConfig(train="a", test="b"))
    assert [(one.kind, one.train, one.test) for one in found] == [
        ("image", "mirrored", "test 3"), ("text", "asked", "question"),
    ]  # fmt: skip
    assert found[0].distance <= 31 and found[1] == Match("text", "asked", "question", 0)


def test_the_command_reports_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "a.jpg").write_bytes(jpeg(photo(1)))
    clean = [(str(n), {"alt_text": "a dog"}, jpeg(photo(50 + n))) for n in range(3)]
    write_shard(tmp_path / "clean" / "train-0.tar", clean)
    write_shard(tmp_path / "leaking" / "train-0.tar", [*clean, ("leak", {"alt_text": "a leak"}, jpeg(photo(1), 50))])
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n", encoding="utf-8")
    for train, test, code in (
        ("clean", "val", 0),
        ("leaking", "val", 3),
        ("clean", "questions.jsonl", 0),
        ("clean", "no", 2),
    ):
        words = [
            "overlap",
            f"train={tmp_path / train}",
            f"test={tmp_path / test}",
            f"output={tmp_path / 'leaks.jsonl'}",
        ]
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit) if code else contextlib.nullcontext() as raised:
            run_command(overlap.main)
        if code:
            assert raised.value.code == code
    monkeypatch.setattr("sys.argv", [words[0], f"train={tmp_path / 'leaking'}", f"test={tmp_path / 'val'}", words[3]])
    with pytest.raises(SystemExit):
        run_command(overlap.main)
    assert "1 images and 0 texts of 4 records" in capsys.readouterr().out
    (line,) = (tmp_path / "leaks.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["train"] == "leak" and json.loads(line)["test"] == "a.jpg"
