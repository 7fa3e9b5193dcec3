"""Nothing random is frozen; the tensors of files fit the model, and none is given twice."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import ConfigurationError
from model.config import MT5Config, PaLIConfig, ViTConfig
from model.layers import parameter_parts
from model.pali import PaLI, plan_on_meta
from train.config import Phase, RunConfig, RunSettings, WeightsConfig
from train.first_weights import VIT_PREFIXES, check_first_weights, first_files
from train.phases import spans

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
    check(replace(config, run=replace(config.run, initial_weights=[vit])))
    check(replace(config, run=replace(config.run, initial=str(tmp_path))))
    later = tmp_path / "later.safetensors"
    check(replace(config, weights=WeightsConfig(vit=str(later))), later)
    check(replace(config, run=replace(config.run, initial_weights=[str(later)])), later)
    both = replace(config.run, initial_weights=[str(later)])
    check(replace(config, weights=WeightsConfig(vit=vit), run=both), later)
    (tmp_path / "run" / "checkpoints" / "step_00000001").mkdir(parents=True)
    check(config)  # goes on from its own


def test_files_of_towers(tmp_path: Path) -> None:
    config = a_run(tmp_path, [])
    vit, mt5 = write(tmp_path / "v", *VIT_PREFIXES), write(tmp_path / "m", "", without="bridge.projection")
    of_text = ("bridge.embedding", "bridge.encoder_bias", "bridge.decoder_bias", "encoder", "decoder", "head")
    text = write(tmp_path / "t", *of_text)
    part, norm = write(tmp_path / "p", *VIT_PREFIXES, without="vit_block_3"), write(tmp_path / "n", "bridge.vit_norm")
    check(replace(config, weights=WeightsConfig(vit, text)))
    assert first_files(replace(config, weights=WeightsConfig(vit, text))) == [vit, text]
    for weights, printed in (
        (
            WeightsConfig(vit=mt5),
            r"^weights\.vit=.* holds other tensors than those of that tower: bridge, decoder_block_0, enc",
        ),
        (
            WeightsConfig(mt5=vit),
            r"^weights\.mt5=.* holds other tensors than those of that tower: bridge, patches, vit_block_0 and",
        ),
        (WeightsConfig(vit=part), r"^weights\.vit=.* lacks: vit_block_3 \(\d+ tensors\)"),
        (WeightsConfig(vit=str(tmp_path / "none")), r"^weights\.vit names .*/none, which is no file"),
    ):
        with pytest.raises(ConfigurationError, match=printed):
            check(replace(config, weights=weights))
    twice = replace(config, weights=WeightsConfig(vit=vit), run=replace(config.run, initial_weights=[norm]))
    with pytest.raises(
        ConfigurationError, match=r"^run.initial_weights=.* and weights.vit=.* both give bridge.vit_norm"
    ):
        check(twice)
    with pytest.raises(
        ConfigurationError, match=r"^run.initial=.* gives the weights of both towers; set weights.vit=null"
    ):
        check(replace(config, weights=WeightsConfig(vit=vit), run=replace(config.run, initial=str(tmp_path))))
