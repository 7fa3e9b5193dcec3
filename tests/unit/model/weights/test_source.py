"""Folders and files of others: the same outputs as their own software, and one sentence where they do not fit."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.ndimage import zoom
from torch import Tensor, nn
from transformers import (
    MT5Config,
    MT5ForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from common.errors import ConfigurationError
from model import config as ours
from model.batch import MicroBatch
from model.config import ViTConfig
from model.pali import PaLI
from model.vit import resample_position
from model.weights import load, logical_tensors
from model.weights import mt5 as mt5_table_file
from model.weights.big_vision import big_vision_table
from model.weights.files import write_tensors
from model.weights.source import Source, open_source
from model.weights.stored import open_tensors
from model.weights.table import export_tensors
from tests.unit.model.examples import MODEL, VIT, example, micro_batch, relative_error, small_model

TOLERANCE = 1e-5
TEXT = {"d_model": 32, "d_ff": 56, "d_kv": 12, "num_heads": 4, "num_layers": 3, "num_decoder_layers": 2}
TEXT |= {"vocab_size": 104, "dropout_rate": 0.0, "feed_forward_proj": "gated-gelu"}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 16, "patch_size": 4}
CLASSES: dict[str, tuple[Any, Any]] = {
    "mt5": (MT5Config, MT5ForConditionalGeneration),
    "umt5": (UMT5Config, UMT5ForConditionalGeneration),
    "t5": (T5Config, T5ForConditionalGeneration),
}


@pytest.mark.parametrize("kind", CLASSES)
def test_what_a_config_leaves_out_is_what_transformers_assumes(kind: str) -> None:
    assumed = CLASSES[kind][0]().to_dict()
    for name, value in (mt5_table_file.OF_ALL | mt5_table_file.DEFAULTS[kind]).items():
        assert assumed[name] == value, name


def text_model(kind: str, folder: Path, tied: bool = False, shards: str = "1GB", **sizes: Any) -> nn.Module:
    """Make a model of transformers and save it; its two matrices of vocabulary differ unless they are tied."""
    torch.manual_seed(0)
    config, model_class = CLASSES[kind]
    model = model_class(config(**(TEXT | sizes), tie_word_embeddings=tied)).eval()
    if not tied:
        model.lm_head.weight = nn.Parameter(torch.randn_like(model.shared.weight) * 0.3)
    for name, parameter in model.named_parameters():
        if "norm" in name or "relative" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size=shards)
    if not tied:  # as the published folders have it; transformers 5 writes true in any case
        change_config(folder, tie_word_embeddings=False)
    return model


def siglip_model(folder: Path, **changes: Any) -> SiglipModel:
    torch.manual_seed(1)
    text = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    text |= {"vocab_size": 64, "max_position_embeddings": 8, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION | changes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), "utf-8")


def filled(source: Source, **sizes: Any) -> PaLI:
    """Make a model of the sizes of a source, filled from it."""
    pali = small_model(**sizes)
    load(pali, {name: x.read() * x.scale for name, x in source.tensors.items()})
    return pali


def text_batch() -> MicroBatch:
    return micro_batch([[e] for e in (example(1, 0, 7, 5), example(2, 0, 3, 9), example(3, 0, 12, 2))])


def text_logits(pali: PaLI) -> tuple[Tensor, dict[str, Tensor]]:
    batch = text_batch()
    carry: tuple[Tensor, ...] = ()
    units = dict(pali.units())
    with torch.no_grad():
        for name, unit in units.items():
            if name != "head":
                carry = unit(carry, batch)
        (logits,) = units["head"].output(units["head"].norm(carry[1]))
    present = batch.decoder_segments > 0
    given = {"input_ids": batch.encoder_tokens, "attention_mask": (batch.encoder_segments > 0).long()}
    return logits.transpose(0, 1)[present], given | {"decoder_input_ids": batch.decoder_tokens, "present": present}


@pytest.mark.parametrize("kind", ["mt5", "umt5", "t5"])
def test_text_models_of_transformers(kind: str, tmp_path: Path) -> None:
    """A sharded folder; umT5's logits are scaled by transformers 5 alone, as `mt5.output_scale` explains."""
    text_model(kind, tmp_path, shards="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    source = open_source(tmp_path, "mt5")
    assert source.kind.lower() == kind and source.sizes["bias_per_layer"] == (kind == "umt5")
    found, given = text_logits(filled(source, mt5=ours.MT5Config(**source.sizes)))
    present = given.pop("present").bool()
    factor = TEXT["d_model"] ** 0.5 if kind == "umt5" else 1.0  # type: ignore[operator]
    for attention in ("eager", "sdpa"):
        theirs = CLASSES[kind][1].from_pretrained(tmp_path, attn_implementation=attention).eval()
        with torch.no_grad():
            logits = theirs(**given).logits[present]
        assert relative_error(found, logits * factor) < TOLERANCE, attention


@pytest.mark.parametrize("kind", ["mt5", "umt5", "t5"])
def test_tied_text_models(kind: str, tmp_path: Path) -> None:
    model = text_model(kind, tmp_path, tied=True)
    source = open_source(tmp_path, "mt5")
    found, given = text_logits(filled(source, mt5=ours.MT5Config(**source.sizes)))
    present = given.pop("present").bool()
    with torch.no_grad():
        assert relative_error(found, model(**given).logits[present]) < TOLERANCE


@pytest.mark.parametrize("form", ["whole", "vision", "prefixed", "file", "bin"])
def test_siglip(form: str, tmp_path: Path) -> None:
    """SigLIP's whole folder, its vision part alone with and without `vision_model.`, without a config, and as .bin."""
    model = siglip_model(tmp_path / "whole")
    path = tmp_path / ("whole" if form == "whole" else "part")
    if form != "whole":
        vision = SiglipVisionModel.from_pretrained(tmp_path / "whole").eval()
        vision.save_pretrained(path)
        state = load_file(path / "model.safetensors")
        bare = {name.removeprefix("vision_model."): x for name, x in state.items()}
        written = {f"vision_model.{n}": x for n, x in bare.items()} if form == "prefixed" else bare
        save_file(written, path / "model.safetensors")
        if form == "bin":
            (path / "model.safetensors").unlink()
            torch.save(written, path / "pytorch_model.bin")
        path = path / "model.safetensors" if form == "file" else path
    source = open_source(path, "vit", VIT.num_heads)
    assert any("head." in name for name in source.left_out)
    assert any("text_model" in name for name in source.left_out) == (form == "whole")
    assert ViTConfig(**{"num_heads": VIT.num_heads} | dict(source.sizes)) == VIT
    for attention in ("eager", "sdpa"):
        model.vision_model.set_attn_implementation(attention)
        found, pixels = features(filled(source))
        with torch.no_grad():
            theirs = model.vision_model(pixels).last_hidden_state
        assert relative_error(found, theirs) < TOLERANCE, attention


def features(pali: PaLI) -> tuple[Tensor, Tensor]:
    batch = micro_batch([[example(1)], [example(2)]])
    carry: tuple[Tensor, ...] = ()
    with torch.no_grad():
        for name, unit in pali.units():
            if name == "bridge":
                break
            carry = unit(carry, batch)
        found = pali.bridge.vit_norm(carry[0]).transpose(0, 1)
    return found, (batch.images.float() / 127.5 - 1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("how", ["plain", "img", "scan", "compressed", "bfloat16"])
def test_big_vision(how: str, tmp_path: Path) -> None:
    """Against big_vision's own equations, in numpy; heads and the text tower are left out."""
    arrays = {n: x.numpy() for n, x in export_tensors(logical_tensors(small_model(3)), big_vision_table(VIT)).items()}
    expected = flax_vit(arrays, features(small_model(3))[1].permute(0, 2, 3, 1).numpy())
    written: dict[str, Any] = {f"params/{'img/' * (how == 'img')}{name}": x for name, x in arrays.items()}
    written |= {"params/MAPHead_0/probe": np.zeros((1, 1, 24), np.float32), "params/head/bias": np.zeros(3, np.float32)}
    written |= {"params/txt/x": np.zeros(2, np.float32), "params/t": np.float32(1)} if how == "img" else {}
    if how == "img":
        written = {re.sub("params/(MAP|head)", r"params/img/\1", name): x for name, x in written.items()}
    if how == "scan":
        block = "params/Transformer/encoderblock"
        names = {n.replace("encoderblock_0", "encoderblock") for n in written if f"{block}_0/" in n}
        pairs = {n: [written[n.replace("encoderblock", f"encoderblock_{i}")] for i in (0, 1)] for n in names}
        stacked = {n: np.stack(pair) for n, pair in pairs.items()}
        written = {n: x for n, x in written.items() if "encoderblock_" not in n} | stacked
    if how == "bfloat16":
        written = {n: (np.asarray(x).view(np.uint32) >> 16).astype(np.uint16).view("V2") for n, x in written.items()}
    (np.savez_compressed if how == "compressed" else np.savez)(tmp_path / "vit.npz", **written)
    source = open_source(tmp_path / "vit.npz", "vit")
    assert ViTConfig(**source.sizes) == VIT
    left = {"MAPHead_0", "head"} | ({"txt", "t"} if how == "img" else set())
    assert {name.removeprefix("params/").removeprefix("img/").split("/")[0] for name in source.left_out} == left
    error = relative_error(features(filled(source))[0], torch.from_numpy(expected))
    assert error < (0.05 if how == "bfloat16" else TOLERANCE)


def flax_vit(p: dict[str, Any], images: Any) -> Any:
    """big_vision `models/vit.py` on images [I, S, S, 3] in [-1, 1]: pre-norm blocks, tanh-GELU, no pooling."""

    def norm(x: Any, name: str) -> Any:
        scale, shift = p[f"{name}/scale"], p[f"{name}/bias"]
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + shift

    def dense(x: Any, name: str, how: str) -> Any:
        return np.einsum(how, x, p[f"{name}/kernel"].astype(np.float64)) + p[f"{name}/bias"]

    size = p["embedding/kernel"].shape[0]
    side = images.shape[1] // size
    x = images.astype(np.float64).reshape(-1, side, size, side, size, 3)
    x = np.einsum("nhawbc,abcd->nhwd", x, p["embedding/kernel"]) + p["embedding/bias"]
    x = x.reshape(x.shape[0], side * side, -1) + p["pos_embedding"]
    for i in range(VIT.depth):
        block = f"Transformer/encoderblock_{i}"
        attention, y = f"{block}/MultiHeadDotProductAttention_0", norm(x, f"{block}/LayerNorm_0")
        query, key, value = (dense(y, f"{attention}/{name}", "nld,dhk->nlhk") for name in ("query", "key", "value"))
        scores = np.einsum("nqhk,nlhk->nhql", query, key) / np.sqrt(query.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + dense(np.einsum("nhql,nlhk->nqhk", weights, value), f"{attention}/out", "nlhk,hkd->nld")
        y = dense(norm(x, f"{block}/LayerNorm_1"), f"{block}/MlpBlock_0/Dense_0", "nld,df->nlf")
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + dense(y, f"{block}/MlpBlock_0/Dense_1", "nlf,fd->nld")
    return norm(x, "Transformer/encoder_norm")


def test_files_of_our_own_names(tmp_path: Path) -> None:
    pali = logical_tensors(small_model(2))
    write_tensors(pali, tmp_path / "both.safetensors")
    vit, mt5 = (open_source(tmp_path / "both.safetensors", tower) for tower in ("vit", "mt5"))
    assert vit.tensors.keys() | mt5.tensors.keys() | vit.projection.keys() == pali.keys()
    assert not vit.tensors.keys() & mt5.tensors.keys() and vit.left_out == sorted(mt5.tensors)
    assert ours.MT5Config(**{"relative_attention_max_distance": 128} | dict(mt5.sizes)).d_kv == 12
    assert dict(vit.sizes) == {k: v for k, v in vars(VIT).items() if k != "num_heads"}


def test_tensors_are_mapped_not_read(tmp_path: Path) -> None:
    """A slice of a large tensor takes its own memory alone."""
    path = tmp_path / "large.npz"
    with path.open("wb") as file:
        np.savez(file, x=np.lib.stride_tricks.as_strided(np.ones(1, np.float32), (1 << 14, 1 << 12), (0, 0)))
    own = Path("/proc/self/status")
    before = resident(own.read_text("utf-8"))
    piece = open_tensors(path)["x"].read()[:2, :2].clone()
    assert piece.sum() == 4 and resident(own.read_text("utf-8")) - before < 32 << 10, "KiB of 256 MiB"


def resident(status: str) -> int:
    return sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))


def test_both_conventions_of_resampling() -> None:
    position = torch.randn(16, 3)
    corners = torch.from_numpy(zoom(position.view(4, 4, 3).numpy(), (6 / 4, 6 / 4, 1), order=1)).reshape(36, 3)
    torch.testing.assert_close(resample_position(position, 36), corners)
    halves = resample_position(position, 4, "half_pixel").view(2, 2, 3)  # by hand: a triangle of 3 + 3 old points
    weights = torch.tensor([[3.0, 3, 1, 0], [0, 1, 3, 3]]) / torch.tensor([[7.0], [7.0]])
    torch.testing.assert_close(halves, torch.einsum("ai,bj,ijc->abc", weights, weights, position.view(4, 4, 3)))


def bad_text(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        text_model("mt5", folder, shards="20KB")
        change(folder)

    return make


def cut_short(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-10])


def without_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def as_pointer(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "utf-8"
    )


def pickled(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    torch.save({"shared.weight": MODEL}, folder / "pytorch_model.bin")


def nothing_in_it(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "flax_model.msgpack").touch()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (without_shard, r"lacks model-00002-of-\d+\.safetensors, which its model\.safetensors\.index\.json names"),
        (cut_short, r"is no whole safetensors file .*; copy it, or download it, again"),
        (as_pointer, r"is a pointer of Git LFS, not the file itself; run git lfs pull there"),
        (pickled, r"cannot be read without running code in it, or mapped .*; convert it to safetensors"),
        (nothing_in_it, r"holds neither model\.safetensors .* but .*flax_model\.msgpack.*; name a folder that"),
        (lambda f: change_config(f, model_type="llama"), r"is a folder of model_type=llama; give mT5, umT5, T5 1\.1"),
        (lambda f: change_config(f, model_type="t5", feed_forward_proj="relu"), r"is a T5 of version 1\.0"),
        (lambda f: change_config(f, layer_norm_epsilon=1e-5), r"has layer_norm_epsilon=1e-05, here it is 1e-6"),
        (lambda f: change_config(f, num_layers=4), r"lacks encoder\.block\.3\..* and 6 more; it is no whole mT5: down"),
        (lambda f: (f / "config.json").write_text("{", "utf-8"), r"config\.json names no model_type"),
        (lambda f: change_config(f, d_ff="many"), r"d_ff='many' of config\.json is no whole number above 0; download"),
        (lambda f: change_config(f, num_layers=0), r"num_layers=0 of config\.json is no whole number above 0"),
    ],
)  # fmt: skip
def test_folders_that_cannot_be_taken(change: Callable[[Path], None], sentence: str, tmp_path: Path) -> None:
    bad_text(change)(tmp_path)
    with pytest.raises(ConfigurationError, match=sentence) as refused:
        open_source(tmp_path, "mt5")
    assert str(refused.value).startswith("weights.mt5") and "\n" not in str(refused.value)


def test_the_other_towers_folder_is_refused(tmp_path: Path) -> None:
    siglip_model(tmp_path / "siglip")
    text_model("mt5", tmp_path / "mt5")
    with pytest.raises(ConfigurationError, match=r"^weights\.mt5=.* is a folder of model_type=siglip; give mT5"):
        open_source(tmp_path / "siglip", "mt5")
    with pytest.raises(ConfigurationError, match=r"^weights\.vit=.* holds no ViT .*; give SigLIP"):
        open_source(tmp_path / "mt5" / "model.safetensors", "vit")
    change_config(tmp_path / "siglip", model_type="siglip2")
    with pytest.raises(ConfigurationError, match=r"model_type=siglip2 \(NaFlex, whose images have other shapes\)"):
        open_source(tmp_path / "siglip", "vit")
    with pytest.raises(ConfigurationError, match=r"does not exist; name a folder or a file of weights\.$"):
        open_source(tmp_path / "none", "vit")
    with pytest.raises(ConfigurationError, match=r"\(hf download google/none --local-dir none fetches a public one\)"):
        open_source("google/none", "vit")
