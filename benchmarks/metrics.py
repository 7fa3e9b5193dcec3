"""Compare the metrics of evaluation/metrics with their official implementations, on the same predictions.

    python -m benchmarks.metrics                   # docs/evaluate.md has the table
    python -m benchmarks.metrics cases=200 metrics=[squad]

pycocoevalcap tokenizes with Java (Debian's default-jre-headless); the other packages are those of `.[test]`.
"""

import contextlib
import io
import json
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.command_line import parse, run_command
from evaluation.metrics import answers, captions, ptb, vision
from evaluation.metrics.vision import LabeledBox


def _words(text: str) -> list[str]:
    return text.split()


WORDS = _words(
    "a an the man woman's dog dogs riding horse beach two-story bus red T-shirt near don't it's St. Mr. Smith "
    "U.S. 5 12 1,000 3.5 12:30 p.m. No. and/or rock-n-roll well-known (left) \"stop\" 'hot' sign street, grass. "
    "sits on with of in people. leaning; o'clock C. The 1st 50% $5 #1 black & white AT&T e.g. Inc. one's they're "
    "cannot gonna O'Neil's café x-ray 1/2 5' 6\" wow!! what? ... -- - naïve ½ jack-o'-lantern bird's-eye A&W 90's "
    "'60s :) www.shop.com"
)
ANSWERS = _words("yes no 2 two a|dog the|dog left-hand red|and|white 1,000 coca|cola Coca-Cola stop! the '' 10:30")


@dataclass
class Options:
    """Compare our metrics with their official implementations."""

    cases: int = 2000
    """Items of each metric; detection has a tenth as many images."""
    seed: int = 0
    """Of the random predictions and references."""
    metrics: list[str] = field(default_factory=lambda: list(COMPARISONS))
    """Rows of the table."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    metric: str
    official: str
    cases: int
    difference: float
    """The largest absolute difference, over all cases and the total."""


def random_captions(rng: random.Random, number: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return predictions and one to five references of each item; half of a prediction's words are a reference's."""
    predictions, references = {}, {}
    for item in range(number):
        own = [" ".join(rng.choices(WORDS, k=rng.randint(3, 14))) for _ in range(rng.randint(1, 5))]
        words = [word if rng.random() < 0.5 else rng.choice(WORDS) for word in rng.choice(own).split()]
        predictions[f"{item}"], references[f"{item}"] = " ".join(words), own
    predictions["0"] = ""
    return predictions, references


def random_answers(rng: random.Random, number: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Return predictions and one to four answers of each item."""
    words = [answer.replace("|", " ") for answer in ANSWERS]
    make = lambda: " ".join(rng.choices(words, k=rng.randint(1, 3)))  # noqa: E731
    references = {f"{item}": [make() for _ in range(rng.randint(1, 4))] for item in range(number)}
    predictions = {id_: rng.choice(own) if rng.random() < 0.5 else make() for id_, own in references.items()}
    return predictions, references


def java_tokens(texts: Sequence[str]) -> list[list[str]]:
    """Return the tokens of pycocoevalcap's PTBTokenizer, which starts Java."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokens = PTBTokenizer().tokenize({number: [{"caption": text}] for number, text in enumerate(texts)})
    return [tokens[number][0].split() for number in range(len(texts))]


def compare_captions(rng: random.Random, cases: int) -> list[Row]:
    """Compare tokens, CIDEr-D and BLEU."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    predictions, references = random_captions(rng, cases)
    texts = [text for own in references.values() for text in own]
    theirs, hypotheses = java_tokens(texts), java_tokens(list(predictions.values()))
    ours = ptb.tokenize(texts)
    differing = sum(one != other for one, other in zip(ours, theirs, strict=True)) / len(texts)
    left = iter(theirs)
    official_references = {id_: [" ".join(next(left)) for _ in own] for id_, own in references.items()}
    official_predictions = {id_: [" ".join(tokens)] for id_, tokens in zip(predictions, hypotheses, strict=True)}
    cider, each = Cider().compute_score(official_references, official_predictions)
    own = captions.cider(predictions, references)
    rows = [
        Row("tokens: share of captions that differ", "pycocoevalcap PTBTokenizer (Java)", len(texts), differing),
        Row("CIDEr-D", "pycocoevalcap", cases, _largest([own.value, *own.by_id.values()], [cider, *each])),
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, parts = Bleu(4).compute_score(official_references, official_predictions)
    scores = captions.bleu(predictions, references)
    for n, (total, items) in enumerate(zip(bleu, parts, strict=True), 1):
        one = scores[f"bleu_{n}"]
        rows.append(
            Row(f"BLEU-{n}", "pycocoevalcap", cases, _largest([one.value, *one.by_id.values()], [total, *items]))
        )
    return rows


def compare_squad(rng: random.Random, cases: int) -> list[Row]:
    """Compare F1 and exact match, item by item."""
    from torchmetrics.functional.text import squad

    predictions, references = random_answers(rng, cases)
    ours = answers.squad(predictions, references)
    theirs = [
        squad(
            [{"prediction_text": predictions[id_], "id": id_}],
            [{"answers": {"answer_start": [0], "text": own}, "id": id_}],
        )
        for id_, own in references.items()
    ]
    return [
        Row(
            f"SQuAD {name}",
            "torchmetrics",
            cases,
            _largest(list(ours[name].by_id.values()), [float(one[name]) / 100 for one in theirs]),
        )
        for name in ("f1", "exact_match")
    ]


def compare_anls(rng: random.Random, cases: int) -> list[Row]:
    """Compare ANLS, item by item; anls-star takes a tuple for answers to choose from."""
    from anls_star import anls_score

    predictions, references = random_answers(rng, cases)
    theirs = [anls_score(tuple(own), predictions[id_]) for id_, own in references.items()]
    return [
        Row("ANLS", "anls-star", cases, _largest(list(answers.anls(predictions, references).by_id.values()), theirs))
    ]


def compare_detection(rng: random.Random, cases: int) -> list[Row]:
    """Compare AP with pycocotools reading COCO's files, and RefCOCO's accuracy with pycocotools' overlaps."""
    from pycocotools import mask

    references = {f"{n}": [_random_box(rng) for _ in range(rng.randint(0, 6))] for n in range(max(2, cases // 10))}
    predictions = {id_: [_moved(rng, one) for one in own for _ in range(2)] for id_, own in references.items()}
    ours = vision.average_precision(predictions, references)
    rows = [
        Row(
            "AP (six of them)",
            "pycocotools",
            len(references),
            _largest(list(ours.values()), _coco_ap(predictions, references)),
        )
    ]
    truth = {f"{n}": _random_box(rng) for n in range(cases)}
    found = {id_: _moved(rng, one) for id_, one in truth.items()}
    overlaps = [float(mask.iou([_xywh(found[i])], [_xywh(truth[i])], [0])[0, 0]) for i in truth]
    score = vision.box_accuracy({i: b.box for i, b in found.items()}, {i: b.box for i, b in truth.items()})
    theirs = [float(overlap >= vision.IOU_MATCH) for overlap in overlaps]
    return [*rows, Row("RefCOCO accuracy", "pycocotools' IoU", cases, _largest(list(score.by_id.values()), theirs))]


def compare_top_k(rng: random.Random, cases: int) -> list[Row]:
    """Compare top-1 and top-5 accuracy."""
    import torch
    from torchmetrics.functional.classification import multiclass_accuracy

    numbers = np.random.default_rng(rng.randint(0, 1 << 30))
    scores, targets = numbers.standard_normal((cases, 100)), numbers.integers(100, size=cases)
    ids = [f"{n}" for n in range(cases)]
    rows = []
    for k in (1, 5):
        ours = vision.top_k(dict(zip(ids, scores, strict=True)), dict(zip(ids, targets.tolist(), strict=True)), k)
        theirs = multiclass_accuracy(torch.from_numpy(scores), torch.from_numpy(targets), 100, average="micro", top_k=k)
        rows.append(Row(f"top-{k}", "torchmetrics", cases, abs(ours.value - float(theirs))))
    return rows


COMPARISONS: Mapping[str, Callable[[random.Random, int], list[Row]]] = {
    "captions": compare_captions,
    "squad": compare_squad,
    "anls": compare_anls,
    "detection": compare_detection,
    "top_k": compare_top_k,
}


def _largest(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(ours, theirs, strict=True))


def _random_box(rng: random.Random) -> LabeledBox:
    top, left = rng.uniform(0, 300), rng.uniform(0, 300)
    size = rng.choice((20, 60, 150))
    return LabeledBox(rng.choice("abc"), (top, left, top + rng.uniform(9, size), left + rng.uniform(9, size)))


def _moved(rng: random.Random, one: LabeledBox) -> LabeledBox:
    moved = tuple(edge + rng.uniform(-8, 8) for edge in one.box[:2])
    box = (*moved, max(moved[0], one.box[2] + rng.uniform(-8, 8)), max(moved[1], one.box[3] + rng.uniform(-8, 8)))
    return LabeledBox(one.label if rng.random() < 0.8 else "c", box, rng.random())


def _xywh(one: LabeledBox) -> list[float]:
    ymin, xmin, ymax, xmax = one.box
    return [xmin, ymin, xmax - xmin, ymax - ymin]


def _coco_ap(
    predictions: Mapping[str, Sequence[LabeledBox]], references: Mapping[str, Sequence[LabeledBox]]
) -> list[float]:
    """Return the six APs of the official route: a file of annotations, a file of results, `loadRes`."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations = [(int(id_), one) for id_, own in references.items() for one in own]
    truth = {
        "info": {},
        "images": [{"id": int(id_)} for id_ in references],
        "categories": [{"id": ord(label), "name": label} for label in "abc"],
        "annotations": [
            {"id": n, "image_id": i, "category_id": ord(one.label), "bbox": _xywh(one), "iscrowd": 0,
             "area": _xywh(one)[2] * _xywh(one)[3]}
            for n, (i, one) in enumerate(annotations, 1)
        ],
    }  # fmt: skip
    results = [
        {"image_id": int(id_), "category_id": ord(one.label), "bbox": _xywh(one), "score": one.confidence}
        for id_, own in predictions.items()
        for one in own
    ]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for name, content in (("truth", truth), ("results", results)):
            Path(folder, name).write_text(json.dumps(content), encoding="utf-8")
        coco = COCO(str(Path(folder, "truth")))
        judge = COCOeval(coco, coco.loadRes(str(Path(folder, "results"))), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return [float(value) for value in judge.stats[:6]]


def main(options: Options) -> None:
    """Print the table in Markdown."""
    print("| metric | official implementation | cases | largest difference |\n|---|---|---:|---:|")
    for name in options.metrics:
        for row in COMPARISONS[name](random.Random(options.seed), options.cases):
            print(f"| {row.metric} | {row.official} | {row.cases:,} | {row.difference:.1e} |")


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
