"""A validation without examples is reported; components with different options are all evaluated."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from data.config import ComponentConfig
from evaluation.config import Component, EvaluationConfig
from train.config import RunConfig
from train.step.validation import Validation, chosen

LAYOUT = SimpleNamespace(device=torch.device("cpu"), data_parallel_size=1)


def validation(*weights: float) -> Validation:
    """Return a validation of two batches of eight examples, of components with these weights."""
    config = RunConfig(evaluation=EvaluationConfig(every_steps=0, steps=2))
    config.data.global_batch_size = 8
    config.mixture = {f"s{i}/ocr": ComponentConfig(f"s{i}", "ocr", weight) for i, weight in enumerate(weights)}
    return Validation(config, LAYOUT, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weights", "examples", "warning"),
    [
        ((1, 1), [8, 8], None),
        ((1, 1), [16, 0], "no example of s1/ocr in 2 batches of the validation split"),
        ((1, 1), [16, 0], "(7 x s1/ocr: no OCR text)"),
        ((1, 1), [0, 0], "no example (of s0/ocr, s1/ocr) in 2 batches"),
        ((1, 15), [0, 16], None),  # only one example is due, so a batch may lack it by chance
    ],
)
def test_components_without_examples_are_named(
    weights: tuple[float, ...], examples: list[int], warning: str | None
) -> None:
    found = validation(*weights).without_examples(
        dict(zip(("s0/ocr", "s1/ocr"), examples, strict=True)), Counter({"s1/ocr: no OCR text": 7})
    )
    assert not found if warning is None else warning in found[0]


def test_components_to_evaluate() -> None:
    english, french = ({"languages": [code]} for code in ("en", "fr"))
    mixture = {
        "english": ComponentConfig("webli", "ocr", 1.0, english), "vqa": ComponentConfig("vq2a", "vqa", 1.0),
        "french": ComponentConfig("webli", "ocr", 2.0, french), "again": ComponentConfig("webli", "ocr", 3.0, english),
    }  # fmt: skip
    every = chosen(mixture, EvaluationConfig())
    assert list(every) == ["english", "french", "vqa"]
    assert [each.options for each in every.values()] == [english, french, {}]  # the same options once
    named = EvaluationConfig(components=[Component("webli", "ocr"), Component("text", "span_corruption")])
    assert list(chosen(mixture, named)) == ["english", "french", "text/span_corruption"]
