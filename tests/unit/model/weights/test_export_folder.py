"""An umT5 that goes out: what transformers computes of its parts, and what a damaged folder gets."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, UMT5ForConditionalGeneration

from common.errors import ConfigurationError
from model.generation import generate
from model.pali import PaLI
from model.weights import logical_tensors
from model.weights.export_folder import fitting_families, open_export, write_weights
from model.weights.stored import StoredTensor
from tests.unit.model.examples import MT5, PALI, relative_error, small_model
from tests.unit.model.weights.test_source import text_batch, text_logits

UMT5 = replace(PALI, mt5=replace(MT5, bias_per_layer=True))


@pytest.fixture(scope="module")
def pali() -> PaLI:
    model = small_model(mt5=UMT5.mt5)
    model.head.output.weight.data *= 20  # answers that differ
    return model


@pytest.fixture(scope="module")
def exported(pali: PaLI, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("umt5")
    stored = {name: StoredTensor(x.shape, x.dtype, x.clone) for name, x in logical_tensors(pali).items()}
    assert fitting_families(UMT5) == ("umt5",)
    write_weights(folder, UMT5, "umt5", stored, 30_000)
    return folder


def test_an_umt5_comes_back_to_the_last_bit(pali: PaLI, exported: Path) -> None:
    config, tensors = open_export(exported)
    assert (config.vit, config.mt5, config.model.image_size) == (UMT5.vit, UMT5.mt5, UMT5.model.image_size)
    ours = logical_tensors(pali)
    assert tensors.keys() == ours.keys()
    assert all(torch.equal(tensors[name].read(), ours[name]) for name in ours)


def test_transformers_scales_the_logits_of_its_own_class_alone(pali: PaLI, exported: Path) -> None:
    """Its most probable tokens are ours; the whole model has our logits, and our tokens in a search with beams too."""
    text, found = UMT5ForConditionalGeneration.from_pretrained(exported / "text", output_loading_info=True)
    assert not any(found.values()), found
    ours, given = text_logits(pali)
    present = given.pop("present").bool()
    whole = AutoModelForImageTextToText.from_pretrained(exported, trust_remote_code=True).eval()
    with torch.no_grad():
        logits = text.eval()(**given).logits[present]
        assert relative_error(logits * MT5.d_model**0.5, ours) < 1e-5
        assert torch.equal(logits.argmax(-1), ours.argmax(-1))
        assert relative_error(whole(**given).logits[present], ours) < 1e-5
    del given["decoder_input_ids"]
    for search in ({}, {"num_beams": 3, "length_penalty": 1.0}):
        theirs = whole.generate(**given, max_new_tokens=8, **search)[:, 1:]
        mine = generate(pali, text_batch(), 8, **search, **({"length_norm": "hugging_face"} if search else {}))
        assert torch.equal(mine, theirs.masked_fill((theirs == 1).cumsum(1) - (theirs == 1).long() > 0, 0)), search


def change(file: str, **values: object) -> Callable[[Path], None]:
    def do(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")

    return do


def cut(folder: Path) -> None:
    file = next(folder.glob("text/model-00001-*.safetensors"))
    assert load_file(file)
    file.write_bytes(file.read_bytes()[:-3])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (cut, r"^folder: \S+/model-00001-of-\d+\.safetensors is no whole safetensors file"),
        (lambda f: (f / "projection.safetensors").unlink(), r"^folder: \S+ lacks projection\.safetensors, which its"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), r"^folder=\S+ lacks .*; it is no whole SigLIP"),
        (change("model.safetensors.index.json", weight_map=3), r"^folder: \S+ is no index of weights \(AttributeErr"),
        (change("config.json", text_config=[1]), r"^folder=\S+: text_config of config\.json is no mapping; download"),
        (change("config.json", vision_config={"hidden_size": "x"}), r"^folder=\S+: hidden_size='x' of config\.json is"),
        (change("config.json", vision_config={"hidden_size": True}), r"^folder=\S+: hidden_size=True of config\.json"),
        (lambda f: (f / "config.json").write_text("[]", "utf-8"), r"^folder=\S+: config\.json names no model_type"),
        (change("config.json", model_type=3), r"^folder=\S+: config\.json names no model_type \(AttributeError\)"),
    ],
)  # fmt: skip
def test_damaged_exports(damage: Callable[[Path], None], sentence: str, exported: Path, tmp_path: Path) -> None:
    for file in exported.rglob("*"):
        if file.is_file():
            to = tmp_path / file.relative_to(exported)
            to.parent.mkdir(exist_ok=True)
            to.write_bytes(file.read_bytes())
    damage(tmp_path)
    with pytest.raises(ConfigurationError, match=sentence) as refused:
        open_export(tmp_path)
    assert "\n" not in str(refused.value)
