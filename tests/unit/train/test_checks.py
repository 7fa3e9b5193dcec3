"""Settings that cannot work together are found before anything starts, each with a sentence that names the change."""

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import ConfigurationError, Notice
from data.config import ComponentConfig, DataConfig
from data.tokenizer import checksum, train_tokenizer
from model.config import ModelConfig, MT5Config, ViTConfig
from parallel.config import ParallelConfig
from train.checks import check, check_training_data
from train.config import Phase, RunConfig, RunSettings, ScheduleConfig, WeightsConfig, to_dict, to_yaml
from train.phases import find_span, spans
from train.settings.compose import to_run_config


@pytest.fixture
def config(tokenizer_path: Path, tmp_path: Path) -> RunConfig:
    return RunConfig(
        run=RunSettings(folder=str(tmp_path / "run"), steps=10),
        mt5=MT5Config(vocab_size=4096),
        data=DataConfig(
            root="corpus",
            tokenizer=str(tokenizer_path),
            global_batch_size=8,
            num_streams=4,
            encoder_length=128,
            decoder_length=32,
        ),
        mixture={"vqa": ComponentConfig("vq2a", "vqa", 1.0), "ocr": ComponentConfig("webli", "ocr", 3.0)},
        phases={"small": Phase(image_size=112)},
    )


def test_a_good_configuration_passes_and_survives_its_file(config: RunConfig) -> None:
    from omegaconf import OmegaConf

    check(config, world_size=4)
    again = to_run_config(OmegaConf.create(to_yaml(config)))
    assert to_dict(again) == to_dict(config)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"phases": {"odd": Phase(image_size=100)}}, "must be a multiple of vit.patch_size=14, e.g. 98."),
        ({"phases": {"big": Phase(image_size=224)}}, "256 visual"),
        (
            {"phases": {"a": Phase(3, image_size=112), "b": Phase(3, image_size=112)}},
            "The phases take 6 steps; set run.steps=6",
        ),
        ({"phases": {"a": Phase(image_size=112), "b": Phase(image_size=112)}}, "only one phase may"),
        ({"phases": {"a": Phase(image_size=112), "b": Phase(10, image_size=112)}}, "leaves no step for phase 'a'"),
        (
            {"phases": {"a": Phase(image_size=112, objectives={"vqg": 1.0})}},
            "phases.a.objectives names vqg; the mixture has only ocr, vqa.",
        ),
        ({"mt5": MT5Config(vocab_size=300)}, "more than mt5.vocab_size=300"),
        (
            {"phases": {"text": Phase(image_size=112, images_per_row=0)}},
            "phases.text: data.images_per_row=0 leaves no place for the images of mixture.vqa (vqa); leave it out",
        ),
        (
            {
                "mixture": {"text": ComponentConfig("text", "span_corruption", 1.0)},
                "phases": {"text": Phase(5, image_size=112, images_per_row=0), "all": Phase(5, image_size=112)},
            },
            "data.images_per_row=0 in phase text alone would leave its model without a ViT",
        ),
        (
            {
                "mixture": {"text": ComponentConfig("text", "span_corruption", 1.0)},
                "weights": WeightsConfig(vit="x"),
                "phases": {"text": Phase(image_size=112, images_per_row=0)},
            },
            "weights.vit=x would not be read, as this run has no ViT; set weights.vit=null.",
        ),
        ({"parallel": ParallelConfig(tensor=3)}, "parallel.tensor=3"),
        ({"parallel": ParallelConfig(sequence=True)}, "sequence=true splits sequences over tensor-parallel ranks"),
        ({"parallel": ParallelConfig(replicate_frozen_vit=True)}, "tensor-parallel ranks, but there is one; set it to"),
        (
            {
                "parallel": ParallelConfig(tensor=2, replicate_frozen_vit=True),
                "phases": {"a": Phase(image_size=112, freeze=["patches.*"])},
            },
            "keeps a frozen ViT whole on each rank, but vit_block_0 is trained; set it to false where",
        ),
        (
            {"parallel": ParallelConfig(pipeline=2, cut=["vit_blok_1"])},
            "'vit_blok_1', which is no unit; units are patches,",
        ),
        (
            {"parallel": ParallelConfig(pipeline=2, virtual_stages=99)},
            "virtual_stages=99 are more stages than the model's",
        ),
        (
            {"phases": {"a": Phase(image_size=112, freeze=["vit_blok_*"])}},
            "'vit_blok_*' matches no parameter",
        ),
        ({"schedule": ScheduleConfig(cooldown_steps=11)}, "longer than the run"),
        (
            {"model": ModelConfig(image_size=98)},
            "model.image_size=98 is used by no phase; set those of the phases (phases.small",
        ),
        ({"run": RunSettings(folder=" ", steps=10)}, "run.folder is empty; name a folder"),
    ],
)
def test_what_cannot_work_together(config: RunConfig, changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        check(replace(config, **changes), world_size=4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"encoder_length": 96},
            "span_corruption: input_length=128 is more than a row of data.encoder_length=96 holds",
        ),
        ({"decoder_length": 2}, "span_corruption needs rows of 3 or more positions"),
    ],
)
def test_a_phase_s_own_rows_hold_what_its_mixture_asks_for(
    config: RunConfig, changes: dict[str, int], sentence: str
) -> None:
    text = ComponentConfig("text", "span_corruption", 1.0, {"input_length": 128})
    config = replace(config, mixture={"text": text})
    check(config, world_size=4)
    phases = {"first": Phase(5, image_size=112), "second": Phase(5, image_size=112, **changes)}
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        check(replace(config, phases=phases), world_size=4)


@pytest.mark.parametrize(
    ("changes", "undivided"),
    [
        ({"vit": ViTConfig(num_heads=2)}, "vit.num_heads=2"),
        ({"vit": ViTConfig(mlp_dim=258)}, "vit.mlp_dim=258"),
        ({"mt5": MT5Config(vocab_size=4096, num_heads=6)}, "mt5.num_heads=6"),
        ({"mt5": MT5Config(vocab_size=4096, d_ff=322)}, "mt5.d_ff=322"),
        ({"mt5": MT5Config(vocab_size=4098)}, "mt5.vocab_size=4098"),
    ],
)
def test_what_tensor_parallelism_cannot_divide(config: RunConfig, changes: dict[str, object], undivided: str) -> None:
    config.parallel.tensor = 4
    sentence = f"{undivided} is not a multiple of parallel.tensor=4; choose a tensor"
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        check(replace(config, **changes), world_size=4)  # type: ignore[arg-type]


def test_streams_must_be_dealt_evenly(config: RunConfig) -> None:
    with pytest.raises(ConfigurationError, match=r"num_streams=4 cannot be dealt evenly to 3"):
        check(config, world_size=3)


def test_first_weights_must_exist(config: RunConfig, tmp_path: Path) -> None:
    config.run.initial = str(tmp_path / "nothing")
    with pytest.raises(ConfigurationError, match="holds no checkpoints"):
        check(config, world_size=1)


def test_first_weights_of_a_job_before_are_not_there_yet(config: RunConfig, tmp_path: Path) -> None:
    config.run.initial = str(tmp_path / "before")
    check(config, world_size=1, expected=[tmp_path / "before"])
    (tmp_path / "before" / "checkpoints").mkdir(parents=True)  # it has begun
    check(config, world_size=1, expected=[tmp_path / "before"])
    with pytest.raises(ConfigurationError, match="holds no checkpoints"):
        check(config, world_size=1)


def test_what_does_not_train_rehearses_nothing(config: RunConfig) -> None:
    config.run.rehearse = True
    check(config, world_size=1)
    with pytest.raises(ConfigurationError, match=r"run\.rehearse=true is for train\.pretrain alone"):
        check(config, world_size=1, trains=False)


def test_a_folder_keeps_its_model(config: RunConfig) -> None:
    folder = Path(config.run.folder)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    config.run.steps = 20
    check(config, world_size=1)
    with pytest.raises(
        ConfigurationError, match=r"holds a run with mt5\.d_ff=320, now it is 640; choose another run\.name"
    ):
        check(replace(config, mt5=MT5Config(vocab_size=4096, d_ff=640)), world_size=1)
    config.optimizer.name = "adamw"
    with pytest.raises(ConfigurationError, match=r"holds a run with optimizer\.name=adafactor, now it is adamw"):
        check(config, world_size=1)


def test_phases_lie_one_after_another(config: RunConfig) -> None:
    config.phases = {"a": Phase(4, image_size=112), "b": Phase(image_size=112), "c": Phase(1, image_size=112)}
    laid_out = spans(config)
    assert [(s.name, s.first, s.last) for s in laid_out] == [("a", 1, 4), ("b", 5, 9), ("c", 10, 10)]
    assert [find_span(laid_out, step).name for step in (1, 4, 5, 10, 11)] == ["a", "a", "b", "c", "c"]


def write_sources(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


def test_shards_must_exist_of_every_split_that_is_read(config: RunConfig, tmp_path: Path) -> None:
    config.data.root = str(tmp_path)
    write_sources(tmp_path, "vq2a/train-00000.tar", "webli/00000.tar")
    config.evaluation.every_steps = 0
    check_training_data(config)
    config.evaluation.every_steps = 5
    with pytest.raises(ConfigurationError, match=f"no validation shards at {tmp_path}/vq2a: point data.root and data"):
        check_training_data(config)
    config.data.holdout = 0.01
    check_training_data(config)
    config.data.sources = {"webli": "elsewhere/{split}-*.tar"}
    pattern = re.escape(f"no train shards at {tmp_path}/elsewhere/{{split}}-*.tar")
    with pytest.raises(ConfigurationError, match=pattern):
        check_training_data(config)
    check_training_data(config, expected=[tmp_path])  # another job will make them
    with pytest.raises(ConfigurationError, match=pattern):
        check_training_data(config, expected=[tmp_path / "vq2a"])


def test_only_the_sources_of_a_phase_are_needed(config: RunConfig, tmp_path: Path) -> None:
    config.data.root = str(tmp_path)
    config.evaluation.every_steps = 0
    config.phases = {"questions": Phase(image_size=112, objectives={"vqa": 1.0})}
    write_sources(tmp_path, "vq2a/train-00000.tar")
    check_training_data(config)


def trained_with(folder: str, tokenizer: str) -> None:
    """A checkpoint of step 3, as far as checks look into it."""
    saved = Path(folder, "checkpoints", "step_00000003")
    saved.mkdir(parents=True)
    (saved / "state.json").write_text(json.dumps({"step": 3, "extra": {"tokenizer": tokenizer}}), encoding="utf-8")
    (saved.parent / "latest").write_text(saved.name, encoding="utf-8")


@pytest.mark.parametrize("first_weights_of_another_run", [False, True])
def test_the_tokenizer_stays_the_same(config: RunConfig, tmp_path: Path, first_weights_of_another_run: bool) -> None:
    folder = str(tmp_path / "before") if first_weights_of_another_run else config.run.folder
    if first_weights_of_another_run:
        config.run.initial = folder
    trained_with(folder, checksum(config.data.tokenizer))
    check(config, world_size=1)
    other = tmp_path / "other.model"
    train_tokenizer(["another text with other words"] * 10, other, 400)
    config.data.tokenizer = str(other)
    sentence = f"{folder} was trained with another tokenizer than data.tokenizer={other}"
    with pytest.raises(ConfigurationError, match=re.escape(sentence)):
        check(config, world_size=1)


def test_a_checkpoint_from_before_tokenizers_were_kept_is_taken(config: RunConfig) -> None:
    trained_with(config.run.folder, "")
    state = Path(config.run.folder, "checkpoints", "step_00000003", "state.json")
    state.write_text(json.dumps({"step": 3, "extra": {"phase": "small"}}), encoding="utf-8")
    check(config, world_size=1)
    state.write_text("cut sho", encoding="utf-8")
    check(config, world_size=1)


def test_a_holdout_is_a_share_that_leaves_something_to_train_on(config: RunConfig) -> None:
    for holdout in (-0.1, 1.0, float("nan")):
        config.data.holdout = holdout
        with pytest.raises(ConfigurationError, match=r"data\.holdout=.* is a fraction"):
            check(config, 1)


@pytest.mark.parametrize(("name", "warns"), [("weblii", True), ("vq2", True), ("openimages", False), ("webli", False)])
def test_a_misspelled_source_is_pointed_out(name: str, warns: bool, config: RunConfig) -> None:
    config.data.sources = {name: "elsewhere"}
    with warnings.catch_warnings(record=True) as found, pytest.raises(ConfigurationError, match="no train shards"):
        warnings.simplefilter("always")
        check_training_data(config)
    printed = [str(each.message) for each in found if isinstance(each.message, Notice)]
    assert [f"data.sources names {name}" in text for text in printed] == [True] * warns
