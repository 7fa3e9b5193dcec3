"""A length in examples is a number of steps, also over phases with different batch sizes."""

import pytest

from common.errors import ConfigurationError
from tests.unit.conf.test_composition import composed
from train.phases import spans


def test_the_papers_examples_are_the_papers_steps() -> None:
    config = composed("experiment=paper_3b", "run.steps=null", "run.examples=1.566e9")
    assert (config.run.steps, config.run.examples) == (382325, None)


def test_phases_with_different_batch_sizes() -> None:
    words = ["experiment=paper_17b", "run.steps=null", "run.examples=1.57624e9"]
    assert [(span.first, span.last) for span in spans(composed(*words))] == [(1, 382325), (382326, 392325)]
    assert composed(*words, "schedule.warmup_steps=null", "schedule.warmup_examples=4e6").schedule.warmup_steps == 977
    late = composed(*words, "schedule.warmup_steps=null", "schedule.warmup_examples=1.567e9").schedule.warmup_steps
    assert late == 382325 + 974  # what 382325 steps of 4096 leave, in steps of 1024


def test_steps_stay_the_default() -> None:
    assert composed().run.steps == 1000
    assert composed("run.steps=7").run.steps == 7


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["run.steps=3", "run.examples=1e3"],
            r"run.steps=3 and run.examples=1000.0 give the same length twice",
        ),
        (["schedule.warmup_examples=5"], r"schedule.warmup_steps=1000 and schedule.warmup_examples=5"),
        (["phases.mini.steps=9", "run.examples=10"], r"run.examples=10 is not what the phases take \(576\)"),
        (["run.examples=0"], r"run.examples=0 must be at least 1"),
        (["phases.mini.steps=9", "phases.b={}", "run.examples=10"], r"leaves none for phase b, as the others take 576"),
    ],
)
def test_lengths_that_cannot_be(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        composed(*words)
