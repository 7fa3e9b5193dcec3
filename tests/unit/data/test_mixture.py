"""The mixtures of conf/ are the paper's; a mixture or data group that cannot work is one clear sentence."""

from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from common.errors import ConfigurationError
from common.values import typed
from data import digest
from data.config import ComponentConfig, Mixture, check_mixture, used
from data.error_budget import ErrorBudgetExceeded
from data.stream import Stream
from tests.unit.data.conftest import IMAGE_SIZE, mixture

CONF = Path(__file__).parents[3] / "conf"


def load(name: str) -> Mixture:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(f"mixture/{name}").mixture
    mixture = {key: typed(ComponentConfig, OmegaConf.to_container(one), key) for key, one in composed.items()}
    check_mixture(mixture)
    return used(mixture)


def weights(name: str) -> dict[str, float]:
    return {component.objective: component.weight for component in load(name).values()}


PAPER = {
    "span_corruption": 100,
    "split_captioning": 1000,
    "captioning": 100,
    "ocr": 100,
    "vqa": 100,
    "vqg": 100,
    "object_vqa": 50,
    "detection": 16,
}


def test_the_papers_mixture():
    assert weights("paper") == PAPER and sum(PAPER.values()) == 1566
    assert weights("stage2") == {"ocr": 1, "captioning": 1, "vqa": 1}
    assert weights("miniature").keys() == PAPER.keys()


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("split_captioning", {"split_captioning"}),
        ("captioning", {"captioning"}),
        ("ocr", {"ocr"}),
        ("vqa", {"vqa"}),
        ("vqg", {"vqg"}),
        ("objects", {"object_vqa", "detection"}),
    ],
)
def test_the_papers_ablations(name, absent):
    assert weights(f"without_{name}") == {key: value for key, value in PAPER.items() if key not in absent}


def test_boxes_and_labels_of_objects_are_two_sources():
    """Open Images' image-level labels have no boxes; Visual Genome and Objects365 are requested boxes alone."""
    for path in [path for path in CONF.glob("mixture/*.yaml") if not path.stem.endswith("task")]:  # which needs task=…
        sources = {each.objective: each.source for each in load(path.stem).values()}
        if {"detection", "object_vqa"} <= sources.keys() and path.stem not in ("demo", "miniature", "study"):
            assert sources["object_vqa"] == "open_images_labels"
            assert sources["detection"] == "open_images_vg_objects365"


def test_the_papers_ablations_of_languages():
    assert weights("only_webli") == weights("only_webli_en") == {"split_captioning": 1}
    assert weights("webli_en_and_rest") == PAPER
    for name, english in (("only_webli", False), ("only_webli_en", True), ("webli_en_and_rest", True)):
        webli = [each.options.get("languages") for each in load(name).values() if each.source == "webli"]
        assert all(languages == (["en"] if english else None) for languages in webli), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_batch_size": 63}, "global_batch_size=63 cannot be dealt evenly to data.num_streams=4"),
        ({"encoder_length": 0}, "data.encoder_length=0 must be at least 1."),
        ({"encoder_length": 5}, "no room for text beside the 4 visual tokens"),
        ({"error_budget": 2.0}, "error_budget=2.0"),
        ({"prefetch": -1}, "data.prefetch=-1"),
    ],
)
def test_impossible_data_settings(data, tokenizer, change, message):
    with pytest.raises(ConfigurationError, match=message):
        Stream(replace(data, **change), mixture(), tokenizer, IMAGE_SIZE, 4, "train", 0)


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ([("webli", "caption", 1)], "webli/caption.objective='caption' is unknown; did you mean captioning"),
        ([(" ", "ocr", 1)], "mixture. /ocr.source is blank"),
        ([("webli", "ocr", 0)], "mixture is empty"),
        ([("webli", "ocr", -1.0)], "webli/ocr.weight=-1.0 must"),
        ([("webli", "ocr", float("nan"))], "webli/ocr.weight=nan must"),
        ([("webli", "ocr", float("inf"))], "webli/ocr.weight=inf must"),
        ([("webli", "ocr", 1e-200), ("vq2a", "vqa", 1e200)], "1e-200 and 1e\\+200 are too far apart"),
    ],
)
def test_impossible_mixtures(components, message):
    with pytest.raises(ConfigurationError, match=message):
        check_mixture(mixture(*components))
    with pytest.raises(ConfigurationError, match="mixture is empty"):
        check_mixture({})


def test_a_wrong_option_names_its_component():
    config = {"norway": ComponentConfig("web", "captioning", 1.0, {"languages": [False]})}
    with pytest.raises(ConfigurationError, match=r"^mixture\.norway\.options\.languages\[0\]=False must be text"):
        check_mixture(config)
    config["norway"].options = {"langages": ["en"]}
    sentence = r"^mixture\.norway\.options\.langages is not an option of captioning; did you mean languages\?"
    with pytest.raises(ConfigurationError, match=sentence):
        check_mixture(config)
    config["norway"].options = {"languages": []}
    with pytest.raises(ConfigurationError, match=r"^mixture\.norway\.options\.languages=\[\] leaves none") as error:
        check_mixture(config)
    assert error.value.__cause__ is error.value.__context__ is None  # of a chain the innermost would be shown


def test_the_digest_command_is_independent_of_the_ranks(corpus, monkeypatch, capsys):
    monkeypatch.setenv("PALI_CORPUS", str(corpus))
    printed = []
    for arguments in (["steps=1:4", "data_parallel_size=4"], ["steps=1:4"], ["steps=3:4", "data_parallel_size=2"]):
        digest.main(["mixture=miniature", *arguments])
        printed.append(capsys.readouterr().out.splitlines())
    assert printed[0] == printed[1] and printed[1][2:] == printed[2]
    assert [line.split()[0] for line in printed[0]] == ["1", "2", "3"] and all(len(line) == 66 for line in printed[0])
    with pytest.raises(ConfigurationError, match="batch_size"):
        digest.main(["data.batch_size=2"])


def test_a_digest_of_nothing_is_none(corpus, monkeypatch):
    monkeypatch.setenv("PALI_CORPUS", str(corpus))
    nothing = ["~mixture", "mixture.none={source: text, objective: vqa, weight: 1.0, options: {languages: [xx]}}"]
    for split, message in (("validation", "steps=1:2 of the validation split hold no example .*no question"),
                           ("train", "mixture.none gives nothing: .* needs the field questions .* in xx")):  # fmt: skip
        with pytest.raises(ErrorBudgetExceeded, match=message):
            digest.main([*nothing, f"split={split}", "data.global_batch_size=8", "data.num_streams=4"])


def test_a_digest_is_of_rows_as_the_first_phase_has_them(corpus, monkeypatch, capsys):
    monkeypatch.setenv("PALI_CORPUS", str(corpus))
    lengths = {"global_batch_size": 8, "encoder_length": 192}
    of_data = [f"data.{name}={value}" for name, value in lengths.items()]
    of_phase = [f"phases.mini.{name}={value}" for name, value in lengths.items()]
    printed = []
    for arguments in (of_data, of_phase):
        digest.main(["mixture=miniature", "steps=1:2", "data.num_streams=4", *arguments])
        printed.append(capsys.readouterr().out)
    assert printed[0] and printed[0] == printed[1]
    large = ["mixture=miniature", *of_data, "data.num_streams=4", "phases.mini.image_size=42"]
    shape = digest.open_stream(large, "train").shape
    assert (shape.image_size, shape.tokens_per_image) == (42, 9)  # 3 x 3 patches of 14 pixels
