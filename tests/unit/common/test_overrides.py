"""Settings that map a user's names to values accept every form that Hydra has for a key."""

import re
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException

from common.command_line import CONF, compose_groups
from common.errors import ConfigurationError
from common.overrides import as_typed, check_duplicates, check_for_saved_run, open_names
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


@pytest.mark.parametrize("word", ["phases.minni.objectives.ocr=1", "mixture.ocrr.options.languages=[en]"])
def test_a_misspelled_entry_is_refused(word: str) -> None:
    with pytest.raises(ConfigCompositionException, match=f"Could not override '{'.'.join(word.split('.')[:2])}'"):
        composed(word)


def test_an_entry_of_the_command_line_takes_words_below_it() -> None:
    made = composed("phases.late={steps: 3}", "phases.late.objectives.ocr=1")
    assert (made.phases.late.steps, dict(made.phases.late.objectives)) == (3, {"ocr": 1.0})


@pytest.mark.parametrize("word", ["~mixture.ocr", "mixture=paper", "+phases=demo", "data=web", "experiment=demo"])
def test_words_that_cannot_change_a_saved_run(word: str) -> None:
    with pytest.raises(ConfigurationError, match=r"a saved run; .*\.$"):
        check_for_saved_run([word], CONF)


def test_words_that_change_a_saved_run() -> None:
    words = ["-m", "parallel=tp2", "mixture.ocr.weight=0", "mixture={mine: {weight: 1}}", "hydra/launcher=slurm"]
    check_for_saved_run(words, CONF)


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("data.sources={webli: a, webli: b}", "webli"),
        ("++mixture={x: {source: a, objective: ocr}, x: {source: b}}", "x"),
        ("mixture={x: {weight: 1, weight: 2}}", "weight"),
        ("data.sources={'a b': 1, c: [{d: 1}, 2], \"a b\": s3://u:1}", "a b"),
    ],
)
def test_a_key_that_a_mapping_has_twice_is_refused(word: str, key: str) -> None:
    name = word.partition("=")[0].lstrip("+")
    with pytest.raises(ConfigurationError, match=re.escape(f"{name} has {key} twice in {word}; leave one of them out")):
        check_duplicates(["data.root=x", word])
    with pytest.raises(ConfigurationError, match="twice"):
        compose_groups([word], {})


@pytest.mark.parametrize(
    "word",
    [
        "data.sources={a: s3://a:1/x, b: {a: 1}, c: [{a: 1}, {a: 2}]}",
        "data.sources={a: 1}",
        "x={broken: ",
        "data.sources.webli=train-{a,a}.tar",
        "~data.sources",
    ],
)
def test_other_words_have_no_key_twice(word: str) -> None:
    check_duplicates([word, word])
