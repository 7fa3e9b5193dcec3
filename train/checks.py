"""Check settings that depend on each other, before any process group starts."""

import difflib
import errno
import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from common.errors import ConfigurationError, Notice
from common.launcher import is_main_rank
from data.config import Mixture, check_images_alone, check_mixture, check_rows, check_text_alone, used
from data.labels import Labels, open_tokenizer
from data.shards.paths import parts
from data.tasks.source import part_items
from data.tokenizer import checksum
from evaluation.tasks import check_metrics
from model.config import ModelConfig
from model.pali import PaLI
from model.weights.source import TOWERS
from parallel import layout
from parallel.checkpoint.folder import CheckpointFolder
from parallel.plan.blueprint import Plan
from train.build import plan_phase
from train.config import RunConfig
from train.health.profiling import profiled_steps
from train.phases import Span, for_phase, spans
from train.run.resume import MODEL, check_allowed, check_resume, check_same_model
from train.settings.saved_run import convert, read_settings
from train.step.validation import SPLIT
from train.weights.first_weights import check_first_weights, first_files
from train.weights.saved_checkpoint import find_checkpoint, run_folder


def check(
    config: RunConfig,
    world_size: int,
    expected: Sequence[Path] = (),
    trains: bool = True,
    weights: bool = True,
    rank: int = 0,
) -> dict[str, Plan]:
    """Return the plan of each phase; raise ConfigurationError, one sentence, for settings that cannot work together.

    The plans are those of a `rank`, for its engines: the model is planned once.
    `trains`: whether the run in run.folder is to continue; false for commands that only read it.
    `weights`: whether first weights will be read, so that their files must be there.
    `expected`: folders that earlier jobs will make; a file that is missing in them is not a mistake yet. Raises
    OSError for a run.folder that cannot be made or written to.
    """
    _check_folder(config.run.folder)
    if config.pali.tower == "vit" and not trains:
        raise ConfigurationError(
            f"{config.run.folder} trained the ViT alone, which predicts no text; its validation losses are in its "
            "metrics.jsonl, and weights.vit of a run of both towers takes it."
        )
    _check_image_size(config)
    check_mixture(config.mixture, config.data.tasks)
    plans = {span.name: _check_phase(for_phase(config, span), span, world_size, rank) for span in spans(config)}
    _check_towers(config)
    if config.schedule.cooldown_steps > config.run.steps:
        raise ConfigurationError(
            f"schedule.cooldown_steps={config.schedule.cooldown_steps} is longer than the run; "
            f"set it to run.steps={config.run.steps} or less."
        )
    profiled_steps(config.profile)
    _check_tokenizer(config, expected)
    _check_same_run(config, trains)
    if weights:
        _check_initial(config, [model for model, _ in plans.values()], expected)
    _check_same_tokenizer(config, expected)
    return plans


def check_training_data(config: RunConfig, expected: Sequence[Path] = ()) -> None:
    """Raise ConfigurationError if a source lacks shards that training, or its validation, will read.

    Warn of a name in data.sources that no component reads and that is close to one that a component does.
    """
    _warn_of_unread_sources(config)
    for span in spans(config):
        mixture = for_phase(config, span).mixture
        check_sources(config, mixture, "train", expected)
        if config.evaluation.every_steps:
            check_sources(config, mixture, SPLIT, expected)


def _warn_of_unread_sources(config: RunConfig) -> None:
    """Warn of names in data.sources that are similar to a source of the mixture: a misspelled one changes the data."""
    read = {component.source for component in used(config.mixture).values()}
    for name in set(config.data.sources) - read if is_main_rank() else ():
        if near := difflib.get_close_matches(name, read - set(config.data.sources), 1):
            warnings.warn(
                f"data.sources names {name}, which no component of the mixture reads; did you mean {near[0]}, which is "
                f"read from {config.data.location(near[0])}?",
                Notice,
                stacklevel=2,
            )


def check_sources(config: RunConfig, mixture: Mixture, split: str, expected: Sequence[Path] = ()) -> None:
    """Raise ConfigurationError for an impossible mixture, or a source of it without shards of a split."""
    check_mixture(mixture, config.data.tasks)
    for source in dict.fromkeys(component.source for component in used(mixture).values()):
        if source in config.data.tasks:
            check_metrics(config.data.tasks[source])
            if not _lies_in(Path(config.data.tasks[source].root), expected):
                part_items(config.data.tasks[source], split)
            continue
        location = config.data.location(source)
        try:
            parts(location, split, config.data.holdout, config.data.retry_s)
        except ConfigurationError:
            if not _lies_in(Path(location), expected):
                raise


def _check_phase(config: RunConfig, span: Span, world_size: int, rank: int) -> Plan:
    """Plan the phase's model on `meta`."""
    image_size, patch = config.model.image_size, config.vit.patch_size
    if image_size % patch:
        raise ConfigurationError(
            f"phases.{span.name}: model.image_size={image_size} must be a multiple of vit.patch_size={patch}, "
            f"e.g. {max(1, round(image_size / patch)) * patch}."
        )
    config.data.check()
    config.data.check_images(config.vit.num_tokens(image_size))
    check_rows(config.mixture, config.data.encoder_length, config.data.longest_target)
    if config.pali.tower == "vit":
        check_images_alone(config.mixture, config.data.tasks)
        _check_augmentation(config)
    elif config.data.inception_crop or config.data.flip:
        key = "inception_crop" if config.data.inception_crop else "flip"
        raise ConfigurationError(
            f"data.{key}=true is for train.pretrain_vit, as texts name what is cut away or is on the left; set it to "
            "false."
        )
    if config.pali.tower != "vit" and "labels" in {component.objective for component in used(config.mixture).values()}:
        raise ConfigurationError("The objective labels is for train.pretrain_vit; choose another, such as object_vqa.")
    if config.pali.tower == "mt5":
        check_text_alone(config.mixture, config.data.tasks, span.name)
    layout.check(config.parallel, config.pali, world_size)
    data_parallel_size = config.parallel.data_parallel_size(world_size)
    plan = plan_phase(config, span.phase, world_size, rank)
    if config.data.num_streams % data_parallel_size:
        raise ConfigurationError(
            f"data.num_streams={config.data.num_streams} cannot be dealt evenly to {data_parallel_size} data-parallel "
            f"ranks; make it a multiple of {data_parallel_size}."
        )
    return plan


def _check_augmentation(config: RunConfig) -> None:
    """Raise ConfigurationError for crops of images whose labels have boxes, which would lie elsewhere."""
    if not (config.data.inception_crop or config.data.flip):
        return
    for name, component in used(config.mixture).items():
        if component.objective == "detection" or component.options.get("boxes"):
            raise ConfigurationError(
                f"mixture.{name} has boxes, which data.inception_crop and data.flip do not move; set both to false."
            )


def _check_towers(config: RunConfig) -> None:
    """Raise ConfigurationError for phases of other towers, and for weights of a tower that the run does not have."""
    towers = {span.name: for_phase(config, span).pali.tower for span in spans(config)}
    if len(set(towers.values())) > 1:
        without = ", ".join(name for name, tower in towers.items() if tower == "mt5")
        raise ConfigurationError(
            f"data.images_per_row=0 in phase {without} alone would leave its model without a ViT, and a run has one "
            "model; pretrain the mT5 in a run of its own, and give it to this one by weights.mt5."
        )
    other = {"vit": "mt5", "mt5": "vit"}.get(next(iter(towers.values())) or "")
    if other is not None and (value := getattr(config.weights, other)) is not None:
        raise ConfigurationError(
            f"weights.{other}={value} would not be read, as this run has no {TOWERS[other]}; set weights.{other}=null."
        )


def _check_image_size(config: RunConfig) -> None:
    """Raise ConfigurationError for a resolution of `model` that no phase uses, because each has its own."""
    size, own = config.model.image_size, {name: phase.image_size for name, phase in config.phases.items()}
    if None not in own.values() and size not in (ModelConfig().image_size, *own.values()):
        shown = ", ".join(f"phases.{name}.image_size={value}" for name, value in own.items())
        raise ConfigurationError(f"model.image_size={size} is used by no phase; set those of the phases ({shown}).")


def _check_folder(folder: str) -> None:
    """Raise ConfigurationError for an empty name, OSError if the folder cannot be written; it is made later."""
    if not folder.strip():
        raise ConfigurationError("run.folder is empty; name a folder for what the run leaves behind.")
    place = Path(folder).absolute()
    while not place.exists():
        place = place.parent
    code = errno.ENOTDIR if not place.is_dir() else 0 if os.access(place, os.W_OK | os.X_OK) else errno.EACCES
    if code:
        raise OSError(code, os.strerror(code), str(folder))


def _lies_in(path: Path, folders: Sequence[Path]) -> bool:
    return any(path.absolute().is_relative_to(folder.absolute()) for folder in folders)


def _is_expected(path: Path, expected: Sequence[Path]) -> bool:
    return not path.exists() and _lies_in(path, expected)


def _check_tokenizer(config: RunConfig, expected: Sequence[Path]) -> None:
    if _is_expected(Path(config.data.tokenizer), expected):
        return
    tokenizer, key = open_tokenizer(config.data.tokenizer), f"data.tokenizer={config.data.tokenizer}"
    if config.pali.tower == "vit":
        if not isinstance(tokenizer, Labels):
            raise ConfigurationError(
                f"{key} is no list of labels, which a ViT learns; give one (python -m data.labels)."
            )
        if (number := len(tokenizer.names)) > config.classifier.num_classes:
            raise ConfigurationError(
                f"{key} has {number} labels, more than classifier.num_classes={config.classifier.num_classes}; leave "
                "classifier.num_classes out, or choose another list."
            )
        return
    if isinstance(tokenizer, Labels):
        raise ConfigurationError(f"{key} is a list of labels, for train.pretrain_vit; give a tokenizer.")
    if tokenizer.vocab_size > config.mt5.vocab_size:
        raise ConfigurationError(
            f"data.tokenizer={config.data.tokenizer} has {tokenizer.vocab_size} pieces, more than mt5.vocab_size="
            f"{config.mt5.vocab_size}; enlarge the vocabulary or choose another tokenizer."
        )


def _check_initial(config: RunConfig, phases: Sequence[PaLI], expected: Sequence[Path]) -> None:
    if CheckpointFolder.from_run(config.run.folder).steps():
        return  # the run has weights of its own
    if config.run.initial is not None:
        folder = CheckpointFolder.from_run(run_folder(config.run.initial, "run.initial"))
        if not folder.steps() and not _lies_in(folder.folder, expected):
            raise ConfigurationError(
                f"run.initial={config.run.initial} holds no checkpoints; name the folder of a run that saved one."
            )
        if folder.steps():
            find_checkpoint(config.run.initial, "run.initial")
    check_first_weights(config, phases, [f for f in map(Path, first_files(config)) if _is_expected(f, expected)])


def _check_same_run(config: RunConfig, trains: bool) -> None:
    """Raise ConfigurationError if the folder holds a run with other settings of its steps."""
    check_allowed(config.run.allow_changes)
    if config.run.rehearse and not trains:
        raise ConfigurationError("run.rehearse=true is for train.pretrain alone; leave it out here.")
    checkpoints = CheckpointFolder.from_run(config.run.folder)
    if (lost := checkpoints.lost()) is not None:
        raise ConfigurationError(
            f"{checkpoints.folder} holds no checkpoint to continue from, though {lost} was one; bring it back from a "
            f"copy, or choose another run.name, or remove {checkpoints.folder} to start from step 1."
        )
    if (renamed := checkpoints.renamed()) is not None:
        raise ConfigurationError(f"{renamed}, and a checkpoint's name is its step; rename it back, or move it away.")
    saved = convert(checkpoints.latest_extra().get("config"))
    if trains and isinstance(saved, dict):
        check_resume(saved, config, checkpoints.latest_step() or 0)
        return
    if saved is None and (settings := read_settings(Path(config.run.folder))) is not None:
        saved = OmegaConf.to_container(settings)
    if isinstance(saved, dict):
        check_same_model(saved, config, (*MODEL, "optimizer.name") if trains else MODEL)


def _check_same_tokenizer(config: RunConfig, expected: Sequence[Path]) -> None:
    """Raise ConfigurationError for another tokenizer than that of the weights, because its ids differ."""
    path = Path(config.data.tokenizer)
    initial = config.run.initial and run_folder(config.run.initial, "run.initial")
    for folder in (config.run.folder, initial):
        if folder is None or _is_expected(path, expected):
            continue
        saved = CheckpointFolder.from_run(folder).latest_extra()
        if "tokenizer" in saved and saved["tokenizer"] != (now := checksum(path)):
            raise ConfigurationError(
                f"{folder} was trained with another tokenizer than data.tokenizer={path} (SHA-256 "
                f"{saved['tokenizer'][:12]}…, not {now[:12]}…); set data.tokenizer to that one, or choose another run."
            )
        if saved:
            return  # the run has weights of its own
