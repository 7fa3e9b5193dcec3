"""Settings that map a user's names to values accept every form that Hydra has for a key."""

from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from common.command_line import CONF
from common.overrides import as_typed, open_names
from train.entry import TEXT, register


def composed(*words: str) -> Any:
    register()
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("pretrain", open_names(as_typed(words, TEXT), TEXT))


@pytest.mark.parametrize("words", [
    ["data.sources={webli: a/b}", "data.sources.text=c"],
    ["+data.sources.webli=a/b", "+data.sources={text: c}"],
])  # fmt: skip
def test_names_of_sources_objectives_and_options(words: list[str]) -> None:
    made = composed(
        *words, "phases.mini.objectives={vqa: 2}", "phases.mini.objectives.ocr=1",
        "mixture.ocr.options.languages=[en]", "mixture.span_corruption.options={input_length: 99}",
    )  # fmt: skip
    assert dict(made.data.sources) == {"webli": "a/b", "text": "c"}
    assert dict(made.phases.mini.objectives) == {"vqa": 2.0, "ocr": 1.0}
    assert list(made.mixture.ocr.options.languages) == ["en"]
    assert made.mixture.span_corruption.options.input_length == 99


def test_other_words_stay_as_they_are() -> None:
    words = ["-m", "~data.sources", "run.steps=3", "hydra/launcher=slurm", "data.source.x=1"]
    assert open_names(words, TEXT) == words
