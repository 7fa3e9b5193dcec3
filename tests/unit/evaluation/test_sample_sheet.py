"""Sheets of samples, letters of many scripts, and which samples are shown."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.config import ComponentConfig
from evaluation.sample_sheet import COLUMNS, MOST_LINES, Sample, draw, drawable_first
from evaluation.score import evaluation
from evaluation.text_drawing import TextDrawer
from train.config import RunConfig
from train.evaluate import nothing_evaluated, report, selection, varied, without_examples


def sample(objective: str = "vqa", language: str = "en", prediction: str = "red", **changes: object) -> Sample:
    image = np.full((28, 28, 3), 200, np.uint8)
    fields = {
        "source": "s",
        "key": "k",
        "prompt": "What?",
        "references": ["red"],
        "image": image,
        "has_image": changes.get("image", image) is not None,
        "blind_prediction": "blue",
    }
    return Sample(objective=objective, language=language, prediction=prediction, **(fields | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["plain", "Привет", "Γειά", "مرحبا بك", "שלום"])
def test_scripts_that_the_carried_font_has(text: str) -> None:
    assert TextDrawer(14).covers(text)


def test_arabic_is_joined_and_runs_from_the_right() -> None:
    from evaluation.text_drawing import _visual

    shown = _visual("مرحبا")
    assert shown != "مرحبا" and any("\ufe70" <= letter <= "\ufeff" for letter in shown)
    assert _visual("left to right") == "left to right"


def test_lines_fit_and_lose_nothing() -> None:
    drawer = TextDrawer(14)
    text = "a red circle above a blue square " + "x" * 80
    lines = drawer.wrapped(text, 100)
    assert all(drawer._length(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    assert drawer.wrapped("", 100) == [""]


def test_a_long_word_is_measured_a_few_times_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of letters without a space, as an untrained model babbles, would stop the run for minutes."""
    measured: list[int] = []
    length = TextDrawer._length
    monkeypatch.setattr(TextDrawer, "_length", lambda self, line: measured.append(len(line)) or length(self, line))
    lines = TextDrawer(14).wrapped("ab" * 1000, 100)
    assert "".join(lines) == "ab" * 1000 and len(measured) < 20 * len(lines)


def test_a_sheet_has_a_cell_for_every_sample(tmp_path: Path) -> None:
    samples = [sample(prediction="خطأ"), sample(prompt="long " * 200), sample(image=None), sample(prediction="")]
    samples += [sample("detection", prediction="900 900 100 100 cat", references=["0 0 500 500 cat"])]
    draw(samples, tmp_path / "samples" / "sheet.png")
    with Image.open(tmp_path / "samples" / "sheet.png") as sheet:
        assert sheet.width > 1000
        assert sheet.height < (len(samples) / COLUMNS) * (4 * MOST_LINES) * 20 + 100


def test_what_cannot_be_drawn_comes_last() -> None:
    unknown = sample(prediction="\U0001fae8")
    assert not TextDrawer(14).covers(unknown.prediction)
    assert [s.prediction for s in drawable_first([unknown, sample()])] == ["red", "\U0001fae8"]


def test_the_sheet_mixes_objectives_and_languages() -> None:
    samples = [
        sample("vqa", "en"),
        sample("vqa", "en"),
        sample("vqa", "de"),
        sample("ocr", "ru"),
        sample("span_corruption", image=None),
    ]
    assert [(s.objective, s.language) for s in selection(samples)] == [
        ("vqa", "en"),
        ("ocr", "ru"),
        ("vqa", "de"),
        ("vqa", "en"),
    ]
    assert [s.language for s in varied(samples[:3])] == ["en", "de", "en"]


def seen_and_blind(score: dict[str, float]) -> tuple[float, float]:
    assert score.keys() == {"score", "blind", "low", "high"}
    return score["score"], score["blind"]


def test_scores_lie_beside_their_blind_ones_per_objective_and_language() -> None:
    boxes = "100 100 500 500 cat 0 0 50 50 dog"
    scores = evaluation([
        sample("vqa", "en"), sample("vqa", "fr", prediction="blue"),
        sample("detection", prediction="100 100 500 500 cat", references=[boxes], blind_prediction=""),
        sample("ocr", "ru", prediction="МОТ", references=["КОТ"], blind_prediction="КОТ"),
        sample("captioning", "en", prediction="a red star", references=["a red circle"], blind_prediction="ein Kreis"),
        sample("captioning", "de", prediction="a star", references=["ein roter Kreis"], blind_prediction="ein Kreis"),
    ])  # fmt: skip
    assert seen_and_blind(scores["vqa"]["exact_match"]) == (0.5, 0.0)
    assert seen_and_blind(scores["vqa"]["languages"]["fr"]["exact_match"]) == (0.0, 0.0)
    assert seen_and_blind(scores["detection"]["box_f1"]) == (pytest.approx(2 / 3), 0.0)
    assert seen_and_blind(scores["ocr"]["character_error_rate"]) == (pytest.approx(1 / 3), 0.0)
    assert seen_and_blind(scores["captioning"]["asked_language"]) == (0.5, 0.5)
    assert scores["captioning"]["references_in_asked_language"] == 1.0


def test_the_report_writes_files_and_prints_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [sample(), sample("ocr", "ru", prediction="half a pair: \ud83d")]
    report(tmp_path, "test", 7, samples, selection(samples))
    assert (tmp_path / "evaluation.json").exists() and (tmp_path / "samples.png").exists()
    answers = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [answer["language"] for answer in answers] == ["en", "ru"] and "image" not in answers[0]
    assert answers[1]["prediction"] == "half a pair: \ud83d"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "predictions.jsonl", "samples.png"]
    printed = "".join(capsys.readouterr().out.split())
    assert "samples.png" in printed and "exactmatch" in printed


def test_two_components_of_one_objective_have_scores_of_their_own() -> None:
    samples = [sample(component="vqav2"), sample(component="okvqa", prediction="blue")]
    assert evaluation(samples)["vqa"]["exact_match"]["score"] == 0.5
    by_component = evaluation(samples, "component")
    assert [by_component[name]["exact_match"]["score"] for name in ("vqav2", "okvqa")] == [1, 0]


def test_a_page_weighs_more_than_a_word_in_the_error_rate() -> None:
    """One wrong letter of ten in all, however the texts are cut: the rate is of letters, not of samples."""
    scores = evaluation([
        sample("ocr", prediction="x", references=["a"], blind_prediction="a"),
        sample("ocr", prediction="123456789", references=["123456789"], blind_prediction=""),
    ])  # fmt: skip
    assert seen_and_blind(scores["ocr"]["character_error_rate"]) == (pytest.approx(0.1), pytest.approx(0.9))


def test_what_nothing_was_evaluated_of_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig()
    config.mixture = {"ocr": ComponentConfig("webli", "ocr", 1.0), "vqa": ComponentConfig("vq2a", "vqa", 1.0)}
    one = sample(component="vqa")
    assert without_examples(config, [one]) == ["ocr"]
    report(tmp_path, "test", 7, [one], [one], ["ocr"])
    assert json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["without_examples"] == ["ocr"]
    assert "no example of ocr: not evaluated" in capsys.readouterr().out
    config.evaluation.languages = ["xx"]
    assert "no example in xx (evaluation.languages) of ocr, vqa" in nothing_evaluated(config)


def test_a_score_with_nothing_to_earn_is_none_and_not_perfect(tmp_path: Path) -> None:
    samples = [sample("ocr", prediction="", references=[" "]), sample("detection", references=["no box"])]
    scores = evaluation(samples)
    assert scores["ocr"]["character_error_rate"]["score"] is None
    assert scores["detection"]["box_f1"]["score"] is None
    report(tmp_path, "test", 7, samples, [])
