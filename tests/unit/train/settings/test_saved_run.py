"""All commands read the settings of a saved run in the same way."""

from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from common.errors import ConfigurationError
from data.config import ComponentConfig, DataConfig
from train.config import Phase, RunConfig, to_dict, to_yaml
from train.settings.saved_run import NAME, convert, overridden, read_settings, saved_config

DATA = DataConfig("shards", "tokenizer.model", global_batch_size=8, num_streams=4, encoder_length=32, decoder_length=16)


def test_a_saved_run_with_what_the_command_line_names(tmp_path: Path) -> None:
    config = RunConfig(data=DATA, phases={"low": Phase()})
    (tmp_path / NAME).write_text(to_yaml(config), encoding="utf-8")
    composed = OmegaConf.create({"run": {"folder": str(tmp_path), "seed": 7, "steps": 9}})
    assert isinstance(composed, DictConfig)
    found = saved_config(composed, ["run.seed=7"])
    assert (found.run.seed, found.run.steps) == (7, RunConfig().run.steps)
    settings = read_settings(tmp_path)
    assert settings is not None and overridden(settings, composed, ["++run.steps=9"]).run.steps == 9


def test_phases_and_components_of_a_saved_run_are_changed_by_name(tmp_path: Path) -> None:
    mixture = {"ocr": ComponentConfig("webli", "ocr", 1.0), "vqa": ComponentConfig("vq2a", "vqa", 1.0)}
    config = RunConfig(data=DATA, mixture=mixture, phases={"low": Phase(freeze=["head"])})
    settings = OmegaConf.create(to_dict(config))
    words = ["++mixture={ocr: {weight: 0}}", "++mixture={mine: {source: s, objective: vqg, weight: 2}}"]
    found = overridden(settings, OmegaConf.create(), [*words, "++phases={low: {micro_batch_size: 2}}"])
    assert (found.mixture["ocr"].weight, found.mixture["ocr"].source, found.mixture["mine"].weight) == (0, "webli", 2)
    assert (found.phases["low"].micro_batch_size, found.phases["low"].freeze) == (2, ["head"])
    with pytest.raises(ConfigurationError, match=r"mixture\.orc\.source is not given; did you mean mixture\.ocr\?"):
        overridden(OmegaConf.create(to_dict(config)), OmegaConf.create(), ["++mixture={orc: {weight: 0}}"])
    with pytest.raises(ConfigurationError, match=r"phases\.lo is not a phase of this run; it has low"):
        overridden(OmegaConf.create(to_dict(config)), OmegaConf.create(), ["++phases={lo: {steps: 2}}"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("run: [", "cannot be read (ParserError)"), ("a: 1", "does not hold the settings of a run"), ("[1]", "not hold")],
)
def test_a_file_that_is_not_that_of_a_run(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / NAME).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigurationError) as refused:
        read_settings(tmp_path)
    assert sentence in str(refused.value) and str(refused.value).endswith("; bring it back from a copy.")


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    assert read_settings(tmp_path) is None
    with pytest.raises(ConfigurationError, match=r"holds no run \(no config.yaml\); train one first"):
        saved_config(OmegaConf.create({"run": {"folder": str(tmp_path)}}), [])  # type: ignore


def test_settings_of_an_earlier_version_are_converted() -> None:
    ocr, vqa = ({"source": "webli", "objective": name, "weight": 1.0, "options": {}} for name in ("ocr", "vqa"))
    old = {
        "parallel": {"micro_batch": 4, "persistent_elements": 5}, "data": {"batch_examples": 8},
        "stage": {"phases": [{"name": "low", "steps": 3, "batch_examples": 2}, {"name": "high", "micro_batch": 1}]},
        "mixture": {"components": [ocr, vqa, ocr]},
    }  # fmt: skip
    new = {
        "parallel": {"micro_batch_size": 4, "param_persistence_threshold": 5}, "data": {"global_batch_size": 8},
        "phases": {"low": {"steps": 3, "global_batch_size": 2}, "high": {"micro_batch_size": 1}},
        "mixture": {"ocr": ocr, "vqa": vqa, "ocr_2": ocr},
    }  # fmt: skip
    assert convert(old) == new and convert(new) == new and convert(None) is None
