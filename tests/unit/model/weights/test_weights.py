"""Initial values, and weights that come from and go to files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from common.errors import ConfigurationError
from model.config import ModelConfig, MT5Config, PaLIConfig, ViTConfig
from model.layers import parameter_parts
from model.pali import PaLI, build, initial_block, initialize, units
from model.vit import resample_position
from model.weights import load, logical_tensors
from model.weights.big_vision import big_vision_table, unstack_blocks
from model.weights.files import write_tensors
from model.weights.mt5 import mt5_table
from model.weights.siglip import siglip_table
from model.weights.stored import open_tensors
from model.weights.table import Table, export_tensors, import_tensors
from tests.unit.model.examples import MODEL, MT5, PALI, VIT, small_model


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    """Neither on which other units exist (a pipeline stage), nor on the random state, nor on the order."""
    whole = logical_tensors(build(PALI, seed=3))
    torch.manual_seed(99)
    stage = {name: unit for name, unit in units(PALI).items() if name in ("head", "encoder_block_1")}
    part = PaLI(dict(reversed(stage.items())))
    initialize(part, 3)
    for name, tensor in logical_tensors(part).items():
        assert torch.equal(tensor, whole[name]), name
    other = logical_tensors(build(PALI, seed=4))
    assert not torch.equal(other["bridge.embedding.weight"], whole["bridge.embedding.weight"])
    first, second = (whole[f"encoder_block_{i}.mlp_in.gate.weight"] for i in (0, 1))
    assert not torch.equal(first, second)


# Of big_vision's ViT (width 64, MLP 512, patches of 14) and T5X's mT5 (d 128, 4 heads of 32, d_ff 320): the standard
# deviation of every kind of tensor, or the number that fills it.
SPREADS = {
    "patches.embedding.weight": (14 * 14 * 3) ** -0.5,
    "patches.position": 64**-0.5,
    "vit_block_0.attention_in.query.weight": (2 / 128) ** 0.5,
    "vit_block_0.attention_in.key.weight": (2 / 128) ** 0.5,
    "vit_block_0.attention_in.value.weight": (2 / 128) ** 0.5,
    "vit_block_0.attention_out.out.weight": (2 / 128) ** 0.5,
    "vit_block_0.mlp_in.hidden.weight": (2 / (64 + 512)) ** 0.5,
    "vit_block_0.mlp_in.hidden.bias": 1e-6,
    "vit_block_0.mlp_out.out.weight": (2 / (64 + 512)) ** 0.5,
    "vit_block_0.mlp_out.out.bias": 1e-6,
    "bridge.projection.weight": 64**-0.5,
    "bridge.embedding.weight": 1.0,
    "bridge.encoder_bias.weight": (2 / (32 + 4)) ** 0.5,
    "bridge.decoder_bias.weight": (2 / (32 + 4)) ** 0.5,
    "encoder_block_0.attention_in.query.weight": (128 * 32) ** -0.5,
    "encoder_block_0.attention_in.key.weight": 128**-0.5,
    "encoder_block_0.attention_in.value.weight": 128**-0.5,
    "encoder_block_0.attention_out.out.weight": 128**-0.5,
    "encoder_block_0.mlp_in.gate.weight": 128**-0.5,
    "encoder_block_0.mlp_in.up.weight": 128**-0.5,
    "encoder_block_0.mlp_out.out.weight": 320**-0.5,
    "decoder_block_0.attention_in.query.weight": (128 * 32) ** -0.5,
    "decoder_block_0.attention_in.key.weight": 128**-0.5,
    "decoder_block_0.attention_in.value.weight": 128**-0.5,
    "decoder_block_0.attention_out.out.weight": 128**-0.5,
    "decoder_block_0.cross_query.query.weight": (128 * 32) ** -0.5,
    "decoder_block_0.cross_memory.key.weight": 128**-0.5,
    "decoder_block_0.cross_memory.value.weight": 128**-0.5,
    "decoder_block_0.cross_out.out.weight": 128**-0.5,
    "decoder_block_0.mlp_in.gate.weight": 128**-0.5,
    "decoder_block_0.mlp_in.up.weight": 128**-0.5,
    "decoder_block_0.mlp_out.out.weight": 320**-0.5,
    "head.output.weight": 128**-0.5,
}
TRUNCATED = ("patches.embedding", "bridge.projection", "encoder_block_0.mlp", "decoder_block_0.mlp", "head.output")


def test_initial_values_have_the_spread_that_t5x_and_big_vision_give() -> None:
    mt5 = MT5Config(vocab_size=512, num_encoder_layers=1, num_decoder_layers=1)
    whole = logical_tensors(build(PaLIConfig(ViTConfig(width=64, depth=1), mt5, ModelConfig(image_size=224))))
    norms = {name: float(name.endswith("weight")) for name in whole if "norm." in name}
    biases = {name: 0.0 for name in whole.keys() - SPREADS.keys() if name.endswith("bias") and name not in norms}
    assert SPREADS.keys() | norms.keys() | biases.keys() == whole.keys(), "every tensor has its line"
    for name, value in (norms | biases).items():
        assert torch.equal(whole[name], torch.full_like(whole[name], value)), name
    for name, std in SPREADS.items():
        found, count = whole[name], whole[name].numel()
        assert found.std().item() == pytest.approx(std, rel=min(4 / (2 * count) ** 0.5, 0.2)), name
        assert abs(found.mean().item()) < 4 * std / count**0.5, name
        if found.dim() == 2:  # the largest value separates normal, truncated and uniform distributions
            most = found.abs().amax().item() / std
            uniform = name.startswith("vit_block") or "_bias" in name
            bound = 3**0.5 if uniform else 2 / 0.87962566 if name.startswith(TRUNCATED) else 6
            assert 0.9 * min(bound, 3) < most <= 1.0001 * bound, name


def test_every_parameter_is_covered_by_its_parts_exactly_once() -> None:
    pali = small_model()
    covered: dict[int, int] = {}
    for parameter, part in parameter_parts(pali):
        covered[id(parameter)] = covered.get(id(parameter), 0) + part.block.numel()
        assert initial_block(part, 0).shape == part.block
    assert covered == {id(p): p.numel() for p in pali.parameters()}


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("mt5.safetensors", mt5_table(MT5)),
        ("siglip.safetensors", siglip_table(VIT)),
        ("vit.npz", big_vision_table(VIT)),
    ],
)
def test_a_file_round_trip_is_exact(tmp_path: Path, name: str, table: Table) -> None:
    one, other = small_model(1), small_model(2)
    write_tensors(export_tensors(logical_tensors(one), table), tmp_path / name)
    load(other, import_tensors(read(tmp_path / name), table))
    ours, theirs = logical_tensors(other), logical_tensors(one)
    assert all(torch.equal(ours[logical], theirs[logical]) for logical in table.tensors)


def test_the_layout_of_big_vision() -> None:
    exported = export_tensors(logical_tensors(small_model()), big_vision_table(VIT))
    head = VIT.width // VIT.num_heads
    attention = "Transformer/encoderblock_0/MultiHeadDotProductAttention_0"
    assert exported["embedding/kernel"].shape == (VIT.patch_size, VIT.patch_size, 3, VIT.width)
    assert exported["pos_embedding"].shape == (1, VIT.num_tokens(MODEL.image_size), VIT.width)
    assert exported[f"{attention}/query/kernel"].shape == (VIT.width, VIT.num_heads, head)
    assert exported[f"{attention}/out/kernel"].shape == (VIT.num_heads, head, VIT.width)
    weight = logical_tensors(small_model())["vit_block_0.attention_in.query.weight"]
    assert torch.equal(exported[f"{attention}/query/kernel"][:, 1, 2], weight[head + 2])


def test_scanned_and_prefixed_big_vision_files_are_read(tmp_path: Path) -> None:
    table, pali = big_vision_table(VIT), small_model()
    plain = export_tensors(logical_tensors(pali), table)
    scanned: dict[str, np.ndarray] = {"params/t": np.zeros(1), "params/img/head/kernel": np.zeros(2)}
    for name, tensor in plain.items():
        if "encoderblock_0" in name:
            layers = [plain[name.replace("encoderblock_0", f"encoderblock_{i}")] for i in range(VIT.depth)]
            scanned["params/img/" + name.replace("encoderblock_0", "encoderblock")] = torch.stack(layers).numpy()
        elif "encoderblock_" not in name:
            scanned["params/img/" + name] = tensor.numpy()
    np.savez(tmp_path / "vit.npz", **scanned)
    found = import_tensors(read(tmp_path / "vit.npz"), table)
    assert all(torch.equal(tensor, logical_tensors(pali)[name]) for name, tensor in found.items())


def test_a_checkpoint_of_another_resolution_is_resampled() -> None:
    small, large = small_model(), small_model(model=ModelConfig(image_size=20))
    load(large, import_tensors(export_tensors(logical_tensors(small), siglip_table(VIT)), siglip_table(VIT)))
    expected = resample_position(small.patches.position.detach(), VIT.num_tokens(20))
    assert torch.equal(large.patches.position, expected)


def test_a_tied_checkpoint_gives_its_embedding_to_the_head() -> None:
    state = export_tensors(logical_tensors(small_model()), mt5_table(MT5))
    del state["lm_head.weight"]
    logical = import_tensors(state, mt5_table(MT5))
    assert torch.equal(logical["head.output.weight"], logical["bridge.embedding.weight"])


def read(path: Path) -> dict[str, Tensor]:
    return {name: stored.read() for name, stored in unstack_blocks(open_tensors(path)).items()}


def _without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


def test_missing_unknown_and_ill_fitting_tensors_are_one_clear_error(tmp_path: Path) -> None:
    state = export_tensors(logical_tensors(small_model()), mt5_table(MT5))
    missing = "encoder.block.0.layer.1.layer_norm.weight"
    with pytest.raises(ConfigurationError, match=missing):
        import_tensors(_without(state, missing), mt5_table(MT5))
    with pytest.raises(ConfigurationError, match="also holds surprise"):
        import_tensors(state | {"surprise": torch.ones(1)}, mt5_table(MT5))
    with pytest.raises(ConfigurationError, match=r"lacks .* and 12 more and also holds"):
        import_tensors(
            _without(state, "shared.weight") | {"x": torch.ones(1)},
            mt5_table(MT5Config(**{**vars(MT5), "num_decoder_layers": 3})),
        )
    ill_fitting = import_tensors(state, mt5_table(MT5))
    ill_fitting["head.norm.weight"] = torch.ones(7)
    with pytest.raises(ConfigurationError, match=r"head.norm.weight is \[7\] .* but \[32\]"):
        load(small_model(), ill_fitting)
    (tmp_path / "weights.pkl").touch()
    with pytest.raises(ConfigurationError, match="neither"):
        open_tensors(tmp_path / "weights.pkl")


def test_a_full_disk_is_an_error_of_the_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("model.weights.files.save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: .*vit\.safetensors") as error:
        write_tensors({"a": torch.zeros(1)}, tmp_path / "vit.safetensors")
    assert error.value.errno == 28 and not list(tmp_path.iterdir())
