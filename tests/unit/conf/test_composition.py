"""Every option of every group, and every experiment, composes into settings that can work."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file

from common.errors import ConfigurationError
from common.overrides import as_typed, open_names
from common.values import typed
from data.config import DataConfig
from data.tasks.config import TaskConfig
from evaluation.tasks import check_metrics
from model.config import ModelConfig
from model.layers import parameter_parts
from model.pali import plan_on_meta
from model.weights.source import is_of_tower
from parallel.config import ParallelConfig
from train.checks import check
from train.config import RunConfig, WeightsConfig
from train.entry import CONF, TEXT, register
from train.phases import for_phase, spans
from train.settings.compose import to_run_config

OTHERS = (
    "experiment",
    "cluster",
    "hardware",
    "hydra",
    "study",
    "task",
)  # overlays, and groups of other commands and of Hydra itself
GROUPS = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name not in OTHERS)
OPTIONS = [
    (group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))
    if file.stem != "from_weights"  # needs weights: tests/unit/train/settings/test_from_weights.py
]  # fmt: skip
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))


def composed(*overrides: str, command: str = "pretrain") -> RunConfig:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        words = ["data.root=corpus", "run.from_scratch=true", *overrides]
        return to_run_config(compose(command, open_names(as_typed(words, TEXT), TEXT)))


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{group}/{option}" for group, option in OPTIONS])
def test_every_option_composes(group: str, option: str) -> None:
    if option.endswith("task"):
        composed("task=coco", "vit=mini", "mt5=mini", f"{group}={option}", command="finetune")
    else:
        composed(f"{group}={option}")


@pytest.mark.parametrize("name", sorted(file.stem for file in (CONF / "task").glob("*.yaml")))
def test_every_task_composes(name: str) -> None:
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        plain = OmegaConf.to_container(compose("evaluate", [f"task={name}", "run.folder=x"]).task)
    task = typed(TaskConfig, plain)
    check_metrics(task)
    assert task.name == name and task.files and (task.choose or task.prompt.count("{"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_fits_together(experiment: str, tokenizer_path: Path, tmp_path: Path) -> None:
    initial = tmp_path / "earlier"
    (initial / "checkpoints" / "step_00000001").mkdir(parents=True)
    stage2 = [f"run.initial={initial}"] if experiment.endswith("stage2") else []
    if experiment.endswith("_vit"):
        (tmp_path / "labels.txt").write_text("dog\ncat\n", encoding="utf-8")
        settings = (f"experiment={experiment}", f"data.tokenizer={tmp_path}/labels.txt", f"run.folder={tmp_path}/run")
        config = composed(*settings, command="pretrain_vit")
        check(config, world_size=2)
        assert config.classifier.num_classes == 2
        return
    config = composed(f"experiment={experiment}", f"data.tokenizer={tokenizer_path}", *stage2)
    towers = [tower for tower in ("vit", "mt5") if getattr(config.weights, tower)]
    for tower in towers if experiment != "study_web" else ():  # an earlier command makes the real ones
        parts = [part for _, part in parameter_parts(plan_on_meta(config.pali)) if is_of_tower(part.name, tower)]
        save_file({part.name: torch.empty(part.shape) for part in parts}, tmp_path / f"{tower}.safetensors")
        setattr(config.weights, tower, str(tmp_path / f"{tower}.safetensors"))
    assert config.run.folder == f"runs/{config.run.name}"
    config.run.folder = str(tmp_path / "run")  # the demo may have been run in this checkout
    small = experiment == "demo" or experiment.startswith("study")
    check(config, world_size=2 if small else 8, weights=experiment != "study_web")


@pytest.mark.parametrize(
    ("model", "vit_width", "vit_depth", "d_model", "d_ff"),
    [
        ("pali_700m", 768, 12, 768, 2048),
        ("pali_1_5b", 1024, 24, 1024, 2816),
        ("pali_3b", 1664, 48, 1024, 2816),
        ("pali_5b", 1792, 56, 1024, 2816),
        ("pali_15b", 1664, 48, 4096, 10240),
        ("pali_17b", 1792, 56, 4096, 10240),
    ],
)
def test_presets_join_the_towers_of_the_paper(
    model: str, vit_width: int, vit_depth: int, d_model: int, d_ff: int
) -> None:
    config = composed(f"model={model}")
    assert (config.vit.width, config.vit.depth, config.mt5.d_model, config.mt5.d_ff) == (
        vit_width,
        vit_depth,
        d_model,
        d_ff,
    )
    assert config.mt5.vocab_size == 250112


def test_towers_on_the_command_line_win_over_the_preset() -> None:
    config = composed("model=pali_17b", "vit=large", "mt5=base")
    assert (config.vit.width, config.mt5.d_model) == (1024, 768)
    assert composed("experiment=paper_3b", "vit=base").vit.width == 768


def test_chained_phases_share_the_steps_and_have_their_own_batch_and_mixture() -> None:
    config = composed("experiment=paper_17b")
    frozen, full = spans(config)
    assert (frozen.first, frozen.last, full.first, full.last) == (1, 382325, 382326, 392325)
    second = for_phase(config, full)
    assert (second.model.image_size, second.data.global_batch_size, second.parallel.micro_batch_size) == (588, 1024, 1)
    weights = {(c.source, c.objective): c.weight for c in second.mixture.values()}
    assert weights == {("webli", "ocr"): 1.0, ("cc3m_35l", "captioning"): 1.0, ("vq2a", "vqa"): 1.0}
    assert for_phase(config, frozen).data.global_batch_size == 4096


def test_entries_of_mappings_can_be_changed_added_and_removed() -> None:
    config = composed(
        "phases.mini.image_size=224", "phases.more={steps: 3, micro_batch_size: 2}", "~mixture.ocr",
        "mixture.mine={source: s, objective: vqa, weight: 1}", "mixture.vqa.weight=0",
    )  # fmt: skip
    assert (config.phases["mini"].image_size, config.phases["more"].steps) == (224, 3)
    assert "ocr" not in config.mixture and config.mixture["vqa"].weight == 0 and config.mixture["mine"].source == "s"


@pytest.mark.parametrize(
    "experiment", [name for name in EXPERIMENTS if name.startswith("paper") and not name.endswith(("stage2", "_vit"))]
)
def test_the_papers_experiments_ask_for_both_towers(experiment: str) -> None:
    with pytest.raises(ConfigurationError, match=r"^weights\.vit is not given; name a folder or a file"):
        composed(f"experiment={experiment}", "run.from_scratch=false")
    with pytest.raises(ConfigurationError, match=r"^weights\.mt5 is not given; .* run.from_scratch=true"):
        composed(f"experiment={experiment}", "run.from_scratch=false", "weights.vit=vit.safetensors")
    assert composed(f"experiment={experiment}").weights == WeightsConfig()


def test_a_phase_takes_any_key_of_data_parallel_and_model() -> None:
    words = [
        f"phases.mini.{word}" for word in ("images_per_row=2", "trim_multiple=8", "dropout_rate=0.5", "recompute=block")
    ]
    config = composed(*words)
    (span,) = spans(config)
    phase = for_phase(config, span)
    assert (phase.data.images_per_row, phase.data.trim_multiple, phase.model.dropout_rate) == (2, 8, 0.5)
    assert phase.parallel.recompute == "block" and config.parallel.recompute == "none"
    with pytest.raises(ConfigurationError, match=r"^phases\.mini: model\.dropout_rate=2\.0 must lie in"):
        for_phase(config := composed("phases.mini.dropout_rate=2"), spans(config)[0])
    with pytest.raises(ConfigurationError, match=r"^phases\.mini\.zero_stage cannot differ between phases, as pro"):
        composed("phases.mini.zero_stage=1")


def test_no_key_is_in_two_of_the_groups_that_a_phase_takes_keys_of() -> None:
    names = [one.name for kind in (DataConfig, ParallelConfig, ModelConfig) for one in fields(kind)]
    assert len(set(names)) == len(names)
