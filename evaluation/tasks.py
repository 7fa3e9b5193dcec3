"""Score the predictions of a task by its metrics: over all items, and by language and group."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from common.errors import ConfigurationError
from common.values import one_of
from data.objectives import detection
from data.tasks.config import TaskConfig
from data.tasks.item import Item
from evaluation.metrics import answers, captions, multilingual, vision, vqa
from evaluation.metrics.items import Predictions, Score, match, mean_score
from evaluation.metrics.vision import LabeledBox

Metric = Callable[[Predictions, Sequence[Item]], dict[str, Score]]


def _references(items: Sequence[Item]) -> dict[str, Sequence[str]]:
    return {item.id: item.references for item in items}


def _one(
    name: str, function: Callable[..., Score], predictions: Predictions, items: Sequence[Item]
) -> dict[str, Score]:
    return {name: function(predictions, _references(items))}


def _many(
    function: Callable[..., dict[str, Score]], predictions: Predictions, items: Sequence[Item]
) -> dict[str, Score]:
    return function(predictions, _references(items))


def _vqa(rule: str) -> Metric:
    name = "vqa_accuracy" if rule == "official" else f"vqa_accuracy_{rule}"
    return partial(_one, name, partial(vqa.vqa_accuracy, rule=rule))


def _xm3600(predictions: Predictions, items: Sequence[Item]) -> dict[str, Score]:
    """Return CIDEr-D by three tokenizations; over several languages, the mean of the languages' scores."""
    of_languages = []
    for language in dict.fromkeys(item.language for item in items):
        references = _references([item for item in items if item.language == language])
        own = {id_: text for id_, text in predictions.items() if id_ in references}
        of_languages.append(multilingual.xm3600_cider(own, references, language))
    counts = match(predictions, _references(items)).counts
    names = set.intersection(*(set(scores) for scores in of_languages))
    result = {}
    for name in sorted(names):
        by_id = {id_: value for scores in of_languages for id_, value in scores[name].by_id.items()}
        mean = sum(scores[name].value for scores in of_languages) / len(of_languages)
        result[name] = Score(mean, counts, by_id)
    return result


def _boxes(prediction: str, item: Item) -> list[LabeledBox]:
    """Return the boxes of a text in pixels; their order is that of confidence, as the text has none."""
    height, width = float(item.extra["height"]), float(item.extra["width"])
    found = detection.read(prediction)
    return [
        LabeledBox(label, (ymin * height, xmin * width, ymax * height, xmax * width), 1 - n / (len(found) + 1))
        for n, (ymin, xmin, ymax, xmax, label) in enumerate(found)
    ]


def _truth(item: Item) -> list[LabeledBox]:
    boxes: Sequence[Sequence[Any]] = item.extra["boxes"]
    return [LabeledBox(label, (ymin, xmin, ymax, xmax)) for label, ymin, xmin, ymax, xmax in boxes]


def _average_precision(predictions: Predictions, items: Sequence[Item]) -> dict[str, Score]:
    found = {item.id: _boxes(predictions.get(item.id, ""), item) for item in items}
    scores = vision.average_precision(found, {item.id: _truth(item) for item in items})
    counts = match(predictions, {item.id: ["boxes"] for item in items}).counts
    return {name: Score(value, counts) for name, value in scores.items()}


def _box_accuracy(predictions: Predictions, items: Sequence[Item]) -> dict[str, Score]:
    """Return the share of items whose first predicted box overlaps with the first reference by half (RefCOCO)."""
    found = {item.id: boxes[0].box for item in items if (boxes := _boxes(predictions.get(item.id, ""), item))}
    return {"box_accuracy": vision.box_accuracy(found, {item.id: _truth(item)[0].box for item in items})}


def _top_k(predictions: Predictions, items: Sequence[Item]) -> dict[str, Score]:
    """Return {"top_1", "top_5"} of predictions whose lines are choices, the best first."""
    names = {f"top_{k}": partial(_among_first, k) for k in (1, 5)}
    return {name: mean_score(predictions, _references(items), hit) for name, hit in names.items()}


def _among_first(k: int, prediction: str, references: Sequence[str]) -> float:
    return float(not set(prediction.split("\n")[:k]).isdisjoint(references))


METRICS: Mapping[str, Metric] = {
    "cider": partial(_one, "cider", captions.cider),
    "bleu": partial(_many, captions.bleu),
    "vqa_accuracy": _vqa("official"),
    "vqa_accuracy_script_2017": _vqa("script_2017"),
    "vqa_accuracy_harness": _vqa("harness"),
    "vqa_accuracy_simple": _vqa("simple"),
    "anls": partial(_one, "anls", answers.anls),
    "squad": partial(_many, answers.squad),
    "accuracy": partial(_one, "accuracy", answers.accuracy),
    "xm3600": _xm3600,
    "ap": _average_precision,
    "box_accuracy": _box_accuracy,
    "top_k": _top_k,
}


def check_metrics(config: TaskConfig) -> None:
    """Raise ConfigurationError for a task without metrics, or with one that does not exist or lacks its package."""
    if not config.metrics:
        raise ConfigurationError(f"task.metrics names none; choose of {', '.join(METRICS)}.")
    for name in config.metrics:
        one_of("task.metrics", name, list(METRICS))
    if "ap" in config.metrics:
        vision.check_pycocotools()
    if "top_k" in config.metrics and not config.choose:
        raise ConfigurationError("task.metrics has top_k, which ranks choices; set task.choose=true.")


def left_out(config: TaskConfig, items: Sequence[Item]) -> list[str]:
    """Return a sentence for each score that a package which is not installed leaves out."""
    codes = sorted({item.language for item in items}) if "xm3600" in config.metrics else []
    return [sentence for language in codes if (sentence := multilingual.missing_segmenter(language))]


def task_scores(config: TaskConfig, items: Sequence[Item], predictions: Predictions) -> dict[str, dict[str, Any]]:
    """Return {score: {score, counts, languages, groups}}: scores of the parts are computed on the parts alone.

    Items without references are left out; a task that has no other, as a test server's, has no score.
    """
    items = [item for item in items if item.references]
    if not items:
        return {}
    result: dict[str, dict[str, Any]] = {}
    for name, score in _scores(config, items, predictions).items():
        result[name] = {"score": score.value, "counts": asdict(score.counts), "languages": {}, "groups": {}}
    for kind, attribute in (("languages", "language"), ("groups", "group")):
        parts = sorted({getattr(item, attribute) for item in items})
        for part in parts if len(parts) > 1 else ():
            own = [item for item in items if getattr(item, attribute) == part]
            of_part = {item.id: predictions[item.id] for item in own if item.id in predictions}
            for name, score in _scores(config, own, of_part).items():
                if name in result:
                    result[name][kind][part or "other"] = score.value
    return result


def item_scores(config: TaskConfig, items: Sequence[Item], predictions: Predictions) -> dict[str, float]:
    """Return each item's score of the first metric that has scores of items."""
    items = [item for item in items if item.references]
    scores = _scores(config, items, predictions).values() if items else ()
    return next((dict(score.by_id) for score in scores if score.by_id), {})


def _scores(config: TaskConfig, items: Sequence[Item], predictions: Predictions) -> dict[str, Score]:
    return {name: score for metric in config.metrics for name, score in METRICS[metric](predictions, items).items()}
