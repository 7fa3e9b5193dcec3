"""Scores of a task by item, language and group, and the files for test servers."""

import json
import sys
from pathlib import Path

import pytest

from common.errors import ConfigurationError
from data.tasks.config import TaskConfig
from data.tasks.item import Item
from evaluation.metrics import multilingual
from evaluation.submission import write_submission
from evaluation.tasks import METRICS, check_metrics, item_scores, left_out, task_scores

ITEMS = [
    Item("1", ("2", "two"), "How many?", "a.jpg", "10", "en", "number"),
    Item("2", ("red",), "Color?", "", "10", "de", "other"),
    Item("3", (), "Open?", "", "11", "de", "other"),
]
PREDICTIONS = {"1": "2", "3": "x"}


def test_scores_by_part_and_counts() -> None:
    scores = task_scores(TaskConfig(metrics=["accuracy", "squad"]), ITEMS, PREDICTIONS)
    assert scores["accuracy"]["score"] == 0.5 and scores["exact_match"]["score"] == 0.5
    assert scores["accuracy"]["languages"] == {"de": 0, "en": 1}
    assert scores["accuracy"]["groups"] == {"number": 1, "other": 0}
    assert scores["accuracy"]["counts"]["without_prediction"] == 1
    assert item_scores(TaskConfig(metrics=["accuracy"]), ITEMS, PREDICTIONS) == {"1": 1, "2": 0}
    assert task_scores(TaskConfig(metrics=["cider"]), ITEMS[2:], PREDICTIONS) == {}


@pytest.mark.parametrize("metric", [name for name in METRICS if name not in ("ap", "box_accuracy")])
def test_every_metric_of_texts_prefers_the_reference(metric: str) -> None:
    items = [Item(f"{n}", (f"big red dog {n}",)) for n in range(4)]
    right = {item.id: item.references[0] for item in items}
    config = TaskConfig(metrics=[metric])
    best, worst = task_scores(config, items, right), task_scores(config, items, dict.fromkeys(right, "none"))
    assert best.keys() == worst.keys() and all(best[name]["score"] > worst[name]["score"] for name in best)


@pytest.mark.parametrize("metric", ["ap", "box_accuracy"])
def test_boxes_are_read_from_texts(metric: str) -> None:
    pytest.importorskip("pycocotools")
    extra = {"height": 1000, "width": 500, "boxes": [["dog", 100, 50, 500, 250]]}
    item = Item("1", ("dog",), extra=extra)
    for prediction, expected in (("100 100 499 499 dog", 1), ("0 0 9 9 dog", 0), ("no box", 0)):
        scores = task_scores(TaskConfig(metrics=[metric]), [item], {"1": prediction})
        assert scores["ap_50" if metric == "ap" else metric]["score"] == pytest.approx(expected)


def test_packages_of_metrics_are_looked_for_before_a_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(ConfigurationError, match=r"^task\.metrics has ap, which needs the package pycocotools;"):
        check_metrics(TaskConfig(metrics=["ap"]))
    monkeypatch.setitem(multilingual.SEGMENTERS, "de", ("nowhere", "cut"))
    (sentence,) = left_out(TaskConfig(metrics=["xm3600"]), ITEMS)
    assert sentence.startswith("cider_words is left out, because the package nowhere is not installed")


def test_metrics_of_a_task_must_exist() -> None:
    for metrics, message in (([], "names none"), (["cidr"], "did you mean cider")):
        with pytest.raises(ConfigurationError, match=message):
            check_metrics(TaskConfig(metrics=metrics))


def test_submissions_have_every_item(tmp_path: Path) -> None:
    path = tmp_path / "submission.json"
    expected = {
        "vqa": [{"question_id": 1, "answer": "2"}, {"question_id": 2, "answer": ""}, {"question_id": 3, "answer": "x"}],
        "coco": [{"image_id": 10, "caption": "2"}, {"image_id": 10, "caption": ""}, {"image_id": 11, "caption": "x"}],
        "vizwiz": [{"image": "a.jpg", "answer": "2"}, {"image": "", "answer": ""}, {"image": "", "answer": "x"}],
        "squad": {"1": "2", "2": "", "3": "x"},
    }
    for name, content in expected.items():
        write_submission(name, PREDICTIONS, ITEMS, path)
        assert json.loads(path.read_text(encoding="utf-8")) == content
