"""Nothing random is frozen; the tensors of files fit the model, and none is given twice."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import ConfigurationError
from model.config import MT5Config, PaLIConfig, ViTConfig
from model.layers import parameter_parts
from model.pali import PaLI, plan_on_meta
from model.weights.source import VIT_PREFIXES
from train.config import Phase, RunConfig, RunSettings, WeightsConfig
from train.phases import spans
from train.weights.first_weights import check_first_weights, first_files

VIT = ViTConfig(width=8, depth=5, mlp_dim=16, num_heads=1)
MT5 = MT5Config(d_model=8, d_ff=8, d_kv=4, num_heads=2, num_encoder_layers=1, num_decoder_layers=1, vocab_size=512)
FROZEN_VIT = ["patches.*", "vit_block_*", "bridge.vit_norm.*"]


def a_run(folder: Path, *phases: list[str], **settings: object) -> RunConfig:
    laid_out = {f"phase{i}": Phase(1, freeze, image_size=112) for i, freeze in enumerate(phases)}
    run = RunSettings(folder=str(folder / "run"), steps=len(phases), **settings)  # type: ignore[arg-type]
    return RunConfig(run=run, vit=VIT, mt5=MT5, phases=laid_out)


def models(config: RunConfig) -> list[PaLI]:
    size = replace(config.model, image_size=112)
    return [plan_on_meta(PaLIConfig(config.vit, config.mt5, size), span.phase.freeze) for span in spans(config)]


def check(config: RunConfig, *expected: Path) -> None:
    check_first_weights(config, models(config), expected)


def write(path: Path, *prefixes: str, without: str = "-") -> str:
    (model,) = models(a_run(path.parent, []))
    found = {p.name: torch.zeros(p.shape) for _, p in parameter_parts(model) if p.name.startswith(prefixes)}
    save_file({name: tensor for name, tensor in found.items() if not name.startswith(without)}, path)
    return str(path)


def test_a_frozen_tower_of_nowhere_is_refused(tmp_path: Path) -> None:
    sentence = (
        "^phase 'phase0' freezes bridge, patches, vit_block_0 and 4 more units .* random; give them by weights.vit="
    )
    with pytest.raises(ConfigurationError, match=sentence):
        check(a_run(tmp_path, FROZEN_VIT))
    with pytest.raises(ConfigurationError, match=r"freezes encoder_norm .1 tensors., .* weights.mt5="):
        check(a_run(tmp_path, ["encoder_norm.*"]))
    check(a_run(tmp_path, FROZEN_VIT, from_scratch=True))
    check(a_run(tmp_path, []))


def test_what_an_earlier_phase_has_trained_may_be_frozen(tmp_path: Path) -> None:
    check(a_run(tmp_path, [], FROZEN_VIT))
    with pytest.raises(ConfigurationError, match=r"^phase 'phase0' freezes encoder_norm .1 tensors."):
        check(a_run(tmp_path, ["encoder_norm.*"], []))  # a later one comes too late


def test_files_and_checkpoints_are_somewhere(tmp_path: Path) -> None:
    config = a_run(tmp_path, FROZEN_VIT)
    vit = write(tmp_path / "vit.safetensors", *VIT_PREFIXES)
    check(replace(config, weights=WeightsConfig(vit=vit)))
    check(replace(config, run=replace(config.run, initial=str(tmp_path))))
    later = tmp_path / "later.safetensors"
    check(replace(config, weights=WeightsConfig(vit=str(later))), later)
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    check(config)  # goes on from its own


def test_files_of_towers(tmp_path: Path) -> None:
    config = a_run(tmp_path, [])
    vit, whole = write(tmp_path / "v.safetensors", *VIT_PREFIXES), write(tmp_path / "w.safetensors", "")
    of_text = ("bridge.embedding", "bridge.encoder_bias", "bridge.decoder_bias", "encoder", "decoder", "head")
    text = write(tmp_path / "t.safetensors", *of_text)
    part = write(tmp_path / "p.safetensors", *VIT_PREFIXES, without="vit_block_3")
    for weights in (WeightsConfig(vit, text), WeightsConfig(whole, whole), WeightsConfig(mt5=whole)):
        check(replace(config, weights=weights))
    assert first_files(replace(config, weights=WeightsConfig(vit, text))) == [vit, text]
    missing = str(tmp_path / "none")
    for weights, printed in (
        (WeightsConfig(vit=text), r"^weights\.vit=.* holds no ViT \(but bridge\.decoder_bias\.weight, .*; give a file"),
        (
            WeightsConfig(vit=part),
            r"^weights\.vit=.* of another size than the run: vit\.depth=5 \(there 4\); set",
        ),
        (WeightsConfig(vit=missing), r"^weights\.vit=.*/none does not exist; name a folder or a file of weights"),
    ):
        with pytest.raises(ConfigurationError, match=printed):
            check(replace(config, weights=weights))
    with pytest.raises(
        ConfigurationError, match=r"^run.initial=.* gives the weights of both towers; set weights.vit=null"
    ):
        check(replace(config, weights=WeightsConfig(vit=vit), run=replace(config.run, initial=str(tmp_path))))


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    config, vit = a_run(tmp_path, []), write(tmp_path / "v.safetensors", *VIT_PREFIXES)
    sizes = r": vit\.width=16 \(there 8\), vit\.depth=2 \(there 5\); set vit=from_weights, or give"
    with pytest.raises(ConfigurationError, match=sizes):
        check(replace(config, weights=WeightsConfig(vit), vit=ViTConfig(16, 2, 16, 1)))
    stored = load_file(vit)
    for change, printed in (
        ({"bridge.vit_norm.weight": torch.ones(7)}, r"has bridge\.vit_norm\.weight as \(7,\), here it is \(8,\)"),
        ({"patches.position": torch.ones(5, 8)}, r"has patches\.position as \(5, 8\), here it is \(64, 8\); give"),
        (
            {"bridge.vit_norm.weight": torch.ones(8).to(torch.int8)},
            "holds tensors of type I8, which is no type of weig",
        ),
        ({"bridge.vit_norm.weight": torch.ones(8).to(torch.float8_e4m3fn)}, "holds tensors of type F8_E4M3"),
        ({"vit_blok_0.norm": torch.ones(3)}, r"also holds vit_blok_0\.norm, which no unit has; leave them out"),
    ):
        save_file(stored | change, vit)
        with pytest.raises(ConfigurationError, match=printed) as refused:
            check(replace(config, weights=WeightsConfig(vit)))
        assert str(refused.value).startswith("weights.vit=") and "\n" not in str(refused.value)
    save_file(stored | {"patches.position": torch.ones(4, 8)}, vit)  # of 2 x 2 patches, which are resampled
    check(replace(config, weights=WeightsConfig(vit)))
