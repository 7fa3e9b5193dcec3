"""`mt5=from_weights` and `vit=from_weights` take sizes and tokenizer; other tokenizers and numbers are refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ConfigurationError
from data.tokenizer import Tokenizer, train_tokenizer
from model.config import MT5Config, ViTConfig
from model.pali import plan_on_meta
from tests.unit.conf.test_composition import composed
from tests.unit.model.weights.test_source import siglip_model, text_model
from train.config import RunConfig
from train.phases import for_phase, spans
from train.weights.first_weights import check_first_weights
from train.weights.tower_weights import describe, find_not_finite, open_tower, open_towers


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SigLIP and an umT5 of transformers; the umT5 has a T5 tokenizer of 400 pieces, 100 of them added sentinels."""
    home = tmp_path_factory.mktemp("public")
    siglip_model(home / "siglip")
    text_model("umt5", home / "umt5", vocab_size=448)
    train_tokenizer(["a red circle and a blue square"] * 10, home / "tokenizer.model", 400)
    tokenizer = Tokenizer(home / "tokenizer.model")
    assert tokenizer.vocab_size < 448
    (home / "umt5" / "tokenizer.model").write_bytes((home / "tokenizer.model").read_bytes())
    return home


def a_run(folders: Path, *words: str) -> RunConfig:
    given = (f"weights.vit={folders / 'siglip'}", f"weights.mt5={folders / 'umt5'}", "phases.mini.image_size=20")
    return composed("vit=from_weights", "mt5=from_weights", *given, *words)


def test_sizes_and_tokenizer_come_from_the_folders(folders: Path) -> None:
    config = a_run(folders)
    assert config.vit == ViTConfig(24, 2, 40, 4, 4)
    assert config.mt5 == MT5Config(32, 56, 12, 4, 3, 2, 448, 32, 128, bias_per_layer=True)
    assert config.data.tokenizer == str(folders / "umt5" / "tokenizer.model")
    assert a_run(folders, "mt5.d_ff=64", "data.tokenizer=x.model").data.tokenizer == "x.model"
    assert a_run(folders, "mt5.d_ff=64").mt5.d_ff == 64
    check(config)
    vit, mt5 = open_towers(config.weights, config.vit.num_heads)
    line = describe(vit, for_phase(config, spans(config)[0]))
    assert "SigLIP, 37 tensors; left out " in line and "head (" in line and "text_model (" in line
    assert line.endswith("positions of 4 x 4 patches resampled to 5 x 5 (aligned_corners)")
    assert "umT5" in describe(mt5, config)


def check(config: RunConfig) -> None:
    model = for_phase(config, spans(config)[0]).model
    check_first_weights(config, [plan_on_meta(replace(config.pali, model=model))])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["weights.mt5=null"], r"^mt5\.d_model is null, so weights\.mt5 must give it; name a folder of weights, or"),
        (["weights.vit=null"], r"^vit\.width is null, so weights\.vit must give it"),
        (["mt5=mini", "data.tokenizer=null", "weights.mt5=null"], r"^data\.tokenizer is null, so weights\.mt5 must"),
        (["weights.vit={folder}/siglip/model.safetensors"], r"^vit\.num_heads is null, and .* does not show it; set"),
        (["mt5=mini", "data.tokenizer=null", "weights.mt5={folder}/umt5/model.safetensors"], "holds no tokenizer"),
    ],
)
def test_nothing_to_take_them_from(folders: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=sentence):
        a_run(folders, *(word.format(folder=folders) for word in words))


def test_a_run_that_goes_on_needs_the_folders_no_more(folders: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    saved = {"vit": vars(ViTConfig(24, 2, 40, 4, 4)), "mt5": vars(MT5Config(d_model=48)), "data": {"tokenizer": "t"}}
    (checkpoint / "state.json").write_text(json.dumps({"extra": {"config": saved}}), "utf-8")
    config = a_run(folders, "weights.vit=gone", "weights.mt5=gone", f"run.folder={tmp_path}")
    assert (config.vit.width, config.mt5.d_model, config.data.tokenizer) == (24, 48, "t")


def test_another_tokenizer_is_refused(folders: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.model"
    train_tokenizer(["one green star or two gray hats"] * 10, other, 400)
    config = a_run(folders, f"data.tokenizer={other}")
    with pytest.raises(ConfigurationError, match=r"has another vocabulary than weights\.mt5=.* pieces, not .*; set"):
        check(config)
    with pytest.raises(ConfigurationError, match=r"leaves \d+ of the 250112 ids of weights\.mt5=\S+ unused, so it is"):
        wide = a_run(folders, f"data.tokenizer={tokenizer_path}", f"weights.mt5={wide_model(tmp_path)}")
        check(wide)
    shutil.copy(tokenizer_path, tmp_path / "wide" / "spiece.model")
    with pytest.raises(ConfigurationError, match=r"leaves \d+ of the 250112 ids of weights\.mt5=\S+ unused, so it is"):
        check(a_run(folders, f"weights.mt5={tmp_path / 'wide'}"))


def wide_model(folder: Path) -> Path:
    """A folder without a tokenizer, whose config and tensors have mT5's vocabulary."""
    text_model("mt5", folder / "wide", vocab_size=250112, d_model=4, num_layers=1, num_decoder_layers=1)
    return folder / "wide"


def test_fp16_weights_with_infinities(folders: Path, tmp_path: Path) -> None:
    name = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
    (tmp_path / "config.json").write_text((folders / "umt5" / "config.json").read_text("utf-8"), "utf-8")
    state = {key: tensor.half() for key, tensor in load_file(folders / "umt5" / "model.safetensors").items()}
    state[name][0, 0] = torch.inf
    save_file(state, tmp_path / "model.safetensors")
    opened = open_tower(str(tmp_path), "mt5")
    sentence = find_not_finite([opened], "encoder_block_0.mlp_out.out.weight")
    assert sentence.startswith("encoder_block_0.mlp_out.out.weight is not finite in weights.mt5=")
    assert sentence.endswith("(fp16, which holds no number above 65,504); give weights in fp32 or bf16")


def test_another_size_names_every_difference(folders: Path) -> None:
    config = a_run(folders, "mt5.num_heads=2", "mt5.d_kv=24", "mt5.bias_per_layer=false")
    with pytest.raises(ConfigurationError, match=r"mt5\.d_kv=24 \(there 12\), mt5\.num_heads=2 \(there 4\), mt5"):
        check(config)
