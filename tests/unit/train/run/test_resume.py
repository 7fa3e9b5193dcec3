"""A change of settings under a run's checkpoints is silent, noted, or refused unless it is allowed by name."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from common.errors import ConfigurationError
from data.config import ComponentConfig, DataConfig
from train.checks import check
from train.config import Phase, RunConfig, RunSettings, ScheduleConfig, to_dict
from train.rehearsal import rehearsal_config
from train.run.kept_files import replace_text
from train.run.resume import check_allowed, check_resume, check_sources, note, note_sources, saved_phase

CAPTIONS, QUESTIONS = ComponentConfig("webli", "captioning", 1.0), ComponentConfig("webli", "vqa", 1.0)


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(
        run=RunSettings(folder=str(tmp_path), steps=4, seed=7),
        data=DataConfig(root="corpus", tokenizer="t.model", global_batch_size=16, num_streams=2, encoder_length=128,
                        decoder_length=32),
        mixture={"captioning": CAPTIONS, "vqa": QUESTIONS},
        phases={"low": Phase(image_size=56, freeze=["vit_block_*"]), "high": Phase(2, image_size=112)},
    )  # fmt: skip


def changed(config: RunConfig, *dotlist: str, **parts: Any) -> RunConfig:
    """Return another configuration, with some keys set."""
    merged = OmegaConf.merge(OmegaConf.structured(replace(config, **parts)), OmegaConf.from_dotlist(list(dotlist)))
    found = OmegaConf.to_object(merged)
    assert isinstance(found, RunConfig)
    return found


def saved(config: RunConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(to_dict(config)))
    return found


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda c: changed(c, "run.seed=8"), "run.seed=7, now it is 8"),
        (lambda c: changed(c, "data.global_batch_size=32"), "data.global_batch_size=16, now it is 32"),
        (lambda c: changed(c, "data.num_streams=4"), "data.num_streams=2, now it is 4"),
        (lambda c: changed(c, "data.encoder_length=256"), "data.encoder_length=128, now it is 256"),
        (lambda c: changed(c, "data.decoder_length=64"), "data.decoder_length=32, now it is 64"),
        (lambda c: changed(c, "data.images_per_row=2"), "data.images_per_row=1, now it is 2"),
        (lambda c: changed(c, "data.holdout=0.5"), "data.holdout=0.0, now it is 0.5"),
        (lambda c: changed(c, "data.exif_orientation=false"), "data.exif_orientation=true, now it is false"),
        (lambda c: changed(c, "data.max_megapixels=1"), "data.max_megapixels=64.0, now it is 1.0"),
        (lambda c: changed(c, "data.max_member_mib=1"), "data.max_member_mib=64, now it is 1"),
        (lambda c: changed(c, "optimizer.name=adamw"), "optimizer.name=adafactor, now it is adamw"),
        (lambda c: changed(c, mixture={"captioning": CAPTIONS}), "objective: vqa"),
        (lambda c: changed(c, mixture={"captioning": CAPTIONS, "vqa": replace(QUESTIONS, weight=2.0)}), "weight: 2.0"),
        (
            lambda c: changed(c, mixture={"captioning": CAPTIONS, "vqa": QUESTIONS, "again": QUESTIONS}),
            "=nothing, now it is {source",
        ),
        (
            lambda c: changed(
                c, mixture={"captioning": CAPTIONS, "vqa": replace(QUESTIONS, options={"languages": ["de"]})}
            ),
            "languages: [de]",
        ),
    ],
)
def test_a_change_that_alters_steps_is_refused_unless_it_is_allowed(
    config: RunConfig, change: Callable[[RunConfig], RunConfig], key: str
) -> None:
    before, now = saved(config), change(config)
    check_resume(before, config, 3)
    with pytest.raises(ConfigurationError, match=re.escape(key)) as refused:
        check_resume(before, now, 3)
    (allow,) = re.findall(r"run\.allow_changes=\[(.*)\]", str(refused.value))
    now.run.allow_changes = [allow]
    check_allowed(now.run.allow_changes)
    check_resume(before, now, 3)
    assert key.split("=")[0] in str(note(before, now, 3)), "an allowed change is noted all the same"


def test_all_refused_changes_are_in_one_sentence(config: RunConfig) -> None:
    now = changed(
        config, "run.seed=8", "data.global_batch_size=32", "run.allow_changes=[run.seed]", "schedule.peak=1e-3"
    )
    with pytest.raises(
        ConfigurationError, match=r"with data\.global_batch_size=16, now it is 32; the steps to come"
    ) as one:
        check_resume(saved(config), now, 3)
    assert "seed" not in str(one.value) and "peak" not in str(one.value)


def test_another_model_cannot_be_allowed(config: RunConfig) -> None:
    now = changed(config, "mt5.d_ff=640")
    with pytest.raises(
        ConfigurationError, match=r"holds a run with mt5\.d_ff=320, now it is 640; choose another run\.name"
    ):
        check_resume(saved(config), now, 3)
    with pytest.raises(
        ConfigurationError, match=r"run\.allow_changes=mt5\.d_ff names no setting whose change is refused"
    ):
        check_allowed(["mt5.d_ff"])
    with pytest.raises(ConfigurationError, match=r"did you mean data\.global_batch_size\?"):
        check_allowed(["data.global_batchsize"])


def test_changes_that_alter_no_step_are_silent_or_noted(config: RunConfig) -> None:
    before = saved(config)
    silent = changed(
        config, "run.name=x", "run.folder=y", "tracker.name=none", "profile.memory_history=true", "run.rehearse=true"
    )
    check_resume(before, silent, 3)
    assert note(before, silent, 3) is None and note(before, config, 3) is None
    noted = changed(
        config, "schedule.peak=1e-3", "run.precision=fp32", "parallel.tensor=2", "evaluation.every_steps=7",
        "data.root=elsewhere", "checkpoint.keep_last=5", "run.guard.roll_back=1",
    )  # fmt: skip
    noted.phases["high"].freeze = ["head.*"]
    check_resume(before, noted, 3)
    assert note(before, noted, 3) == (
        "Changed since step 3: run.precision: bf16 -> fp32; run.guard.roll_back: 0 -> 1; data.root: corpus -> "
        'elsewhere; phases.high.freeze: [] -> ["head.*"]; schedule.peak: 0.01 -> 0.001; parallel.tensor: 1 -> 2; '
        "checkpoint.keep_last: 2 -> 5; evaluation.every_steps: 1000 -> 7; so the learning rate "
        "of step 4 is 4e-06 instead of 4e-05."
    ).replace('"head.*"', "head.*")


def test_a_schedule_that_follows_the_number_of_steps_is_noted(config: RunConfig) -> None:
    before = changed(config, schedule=ScheduleConfig("linear_decay", 1.0, 0), phases={"one": Phase()})
    longer = changed(before, "run.steps=8")
    check_resume(saved(before), longer, 4)
    assert note(saved(before), longer, 4) == (
        "Changed since step 4: run.steps: 4 -> 8; so the learning rate of step 5 is 0.375 instead of 0."
    )


def test_a_schedule_that_cannot_be_read_gives_no_learning_rate(config: RunConfig) -> None:
    before = saved(config)
    before["schedule"] = {"name": "of another version"}
    found = str(note(before, changed(config, "run.steps=8"), 1))
    assert "run.steps: 4 -> 8" in found and "learning rate" not in found


def test_phases_that_cannot_be_read_are_not_compared(config: RunConfig) -> None:
    before = saved(config)
    before["phases"] = {"of another version": {}}
    assert saved_phase(before, 1) is None
    check_resume(before, config, 3)


def test_new_steps_belong_to_the_last_phase(config: RunConfig) -> None:
    """The first phase is open, so that more steps would move the second one: steps that are done keep their phase."""
    sentence = r"a run whose step 3 was of phase 'high'; with run\.steps=8 .* it would be of 'low'; give all phases but"
    for done in (3, 4):
        with pytest.raises(ConfigurationError, match=sentence):
            check_resume(saved(config), changed(config, "run.steps=8"), done)
    check_resume(saved(config), changed(config, "run.steps=8"), 2)  # still in the first one
    check_resume(saved(config), changed(config, "run.steps=8", "run.allow_changes=[phases]"), 4)
    longer = changed(config, "run.steps=8")
    longer.phases = {"low": replace(config.phases["low"], steps=2), "high": replace(config.phases["high"], steps=None)}
    check_resume(saved(config), longer, 4)
    named = changed(config)
    named.phases = {"other": config.phases["low"], "high": config.phases["high"]}
    with pytest.raises(ConfigurationError, match="step 1 was of phase 'low'"):
        check_resume(saved(config), named, 3)


def test_rows_of_a_phase_may_change_before_it_begins_only(config: RunConfig) -> None:
    now = changed(config)
    now.phases["high"] = replace(config.phases["high"], global_batch_size=8)
    check_resume(saved(config), now, 2)
    with pytest.raises(ConfigurationError, match=r"phases\.high\.global_batch_size=null, now it is 8"):
        check_resume(saved(config), now, 3)
    now.phases["high"] = replace(config.phases["high"], learning_rate_factor=0.5)
    check_resume(saved(config), now, 3)


def test_settings_that_another_version_lacks_have_their_defaults(config: RunConfig) -> None:
    before = saved(config)
    del before["data"]["images_per_row"], before["run"]["precision"], before["mixture"]["captioning"]["options"]
    before["data"]["no_longer"] = 3
    check_resume(before, config, 3)
    assert note(before, config, 3) is None
    with pytest.raises(ConfigurationError, match=r"images_per_row=1, now it is 2"):
        check_resume(before, changed(config, "data.images_per_row=2"), 3)
    assert note({}, config, 3) == "The checkpoint of step 3 holds no settings, so changes since then are not reported."


def test_the_settings_of_the_checkpoint_count_not_those_of_a_start_that_failed(
    config: RunConfig, tokenizer_path: Path, tmp_path: Path
) -> None:
    config = changed(config, f"data.tokenizer={tokenizer_path}", "mt5.vocab_size=4096")
    folder = tmp_path / "checkpoints" / "step_00000003"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": 3, "extra": {"config": saved(config)}}), encoding="utf-8")
    other = changed(config, "run.seed=8")
    replace_text(tmp_path / "config.yaml", OmegaConf.to_yaml(OmegaConf.structured(other)))
    check(config, 1)
    with pytest.raises(ConfigurationError, match=r"run\.seed=7, now it is 8"):
        check(other, 1)
    check(other, 1, trains=False)  # an evaluation may use another seed


@pytest.mark.parametrize("left", ["latest", "step_00000006.damaged"])
def test_checkpoints_that_are_gone_are_no_new_run(
    config: RunConfig, tokenizer_path: Path, tmp_path: Path, left: str
) -> None:
    config = changed(config, f"data.tokenizer={tokenizer_path}", "mt5.vocab_size=4096")
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    if left == "latest":
        (checkpoints / left).write_text("step_00000006", encoding="utf-8")
    else:
        (checkpoints / left).mkdir()
    with pytest.raises(
        ConfigurationError, match=r"holds no checkpoint to continue from, though step_00000006.* bring it back"
    ):
        check(config, 1)


def test_a_renamed_checkpoint_is_no_other_step(config: RunConfig, tokenizer_path: Path, tmp_path: Path) -> None:
    config = changed(config, f"data.tokenizer={tokenizer_path}", "mt5.vocab_size=4096")
    folder = tmp_path / "checkpoints" / "step_00000099"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": 4}), encoding="utf-8")
    for trains in (True, False):
        with pytest.raises(ConfigurationError, match=r"step_00000099 holds the state of step 4, .* rename it back"):
            check(config, 1, trains=trains)


def test_texts_that_are_replaced_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    assert replace_text(path, "a: 1\n") is None and replace_text(path, "a: 1\n") is None
    assert replace_text(path, "a: 2\n") == tmp_path / "config.yaml.1"
    assert replace_text(path, "a: é\n") == tmp_path / "config.yaml.2"
    texts = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()}
    assert texts == {"config.yaml": "a: é\n", "config.yaml.1": "a: 1\n", "config.yaml.2": "a: 2\n"}


def test_sources_that_hold_other_records_are_refused_unless_it_is_allowed(config: RunConfig) -> None:
    before = {"gaps": {"records": 3000, "shards": 2, "fingerprint": "a" * 64}}
    now = {"gaps": {"records": 4000, "shards": 3, "fingerprint": "b" * 64}, "new": before["gaps"]}
    check_sources(before, before, config)
    check_sources({}, now, config)
    with pytest.raises(
        ConfigurationError,
        match=r"was trained on 3,000 records in 2 shards \(fingerprint a{12}\) of gaps, now there are 4,000 records "
        r"in 3 .* run\.allow_changes=\[data\.sources\]",
    ):
        check_sources(before, now, config)
    config.run.allow_changes = ["data.sources"]
    check_sources(before, now, config)
    assert note_sources(before, before, 3) is None
    assert str(note_sources(before, now, 3)).startswith("Changed since step 3: gaps: 3,000 records in 2 shards")
    assert (
        note_sources(None, now, 3)
        == "The checkpoint of step 3 holds no facts of its sources, so they are not compared."
    )


def test_a_rehearsal_of_a_run_that_has_begun_needs_no_first_weights(config: RunConfig, tmp_path: Path) -> None:
    config.weights.vit, config.weights.mt5 = "gone.safetensors", "gone too.safetensors"
    new = rehearsal_config(config, tmp_path / "rehearsal")
    assert new.weights.vit == "gone.safetensors" and new.run.initial is None
    (tmp_path / "checkpoints" / "step_00000003").mkdir(parents=True)
    begun = rehearsal_config(config, tmp_path / "rehearsal")
    assert begun.run.initial == str(tmp_path) and begun.run.folder == str(tmp_path / "rehearsal")
    assert begun.weights.vit is None and begun.weights.mt5 is None and begun.tracker.name == "none"


def phased(config: RunConfig, **own: Any) -> RunConfig:
    """Return a configuration with these settings in the phase that is under way."""
    return replace(config, phases=config.phases | {"low": replace(config.phases["low"], **own)})


@pytest.mark.parametrize(
    ("before", "now"),
    [({}, {"vqa": 1.0}), ({"vqa": 1.0}, {"vqa": 1.0, "captioning": 1.0}), ({"vqa": 1.0}, {}), ({"vqa": 1}, {"vqa": 2})],
)
def test_a_phase_under_way_keeps_its_objectives(
    config: RunConfig, before: dict[str, float], now: dict[str, float]
) -> None:
    began = saved(phased(config, objectives=before))
    check_resume(began, phased(config, objectives=before), 1)
    with pytest.raises(ConfigurationError, match=r"phases\.low\.objectives=\{"):
        check_resume(began, phased(config, objectives=now), 1)


def test_a_phase_under_way_keeps_its_resolution(config: RunConfig) -> None:
    with pytest.raises(ConfigurationError, match=r"phases\.low\.image_size=56, now it is 112"):
        check_resume(saved(config), phased(config, image_size=112), 1)


def test_a_setting_may_move_between_phase_and_run(config: RunConfig) -> None:
    own = phased(config, global_batch_size=16)
    check_resume(saved(config), own, 1)
    check_resume(saved(own), replace(own, data=replace(own.data, global_batch_size=32)), 1)
    with pytest.raises(ConfigurationError, match=r"data\.global_batch_size=16, now it is 32"):
        check_resume(saved(own), replace(config, data=replace(config.data, global_batch_size=32)), 1)
