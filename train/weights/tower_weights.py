"""Open what `weights.vit` and `weights.mt5` name: files, or a run (`RUN`, `RUN@STEP`, `RUN@best`)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from common.errors import ConfigurationError
from data.tokenizer_files import find_tokenizer
from model.weights.source import PROJECTION_PREFIX, SIZES, TOWERS, is_of_tower, open_source
from model.weights.stored import Stored, StoredTensor
from parallel.checkpoint.folder import CheckpointFolder
from parallel.checkpoint.initial_weights import CheckpointWeights, FileWeights, FirstWeights
from train.config import RunConfig, WeightsConfig
from train.weights.saved_checkpoint import STEP, find_checkpoint


@dataclass
class TowerWeights:
    """The first weights of one tower.

    `where`: the setting and its value, which begin a message. `names`: logical tensors that are taken. `sizes`: the
    fields of the tower's configuration that are known. `tokenizer`: the file of the tokenizer that the mT5 was trained
    with, `checksum` its SHA-256 and `vocabulary` that of its pieces, where they are known. `padded`: the vocabulary was
    rounded up to a multiple of 128.
    """

    where: str
    kind: str
    weights: FirstWeights
    names: set[str]
    sizes: Mapping[str, Any]
    projection: set[str] = field(default_factory=set)
    left_out: list[str] = field(default_factory=list)
    stored: Stored = field(default_factory=dict)
    tokenizer: Path | None = None
    checksum: str | None = None
    vocabulary: str | None = None
    padded: bool = False

    def shape(self, name: str) -> torch.Size:
        """Return the shape of a tensor."""
        return self.weights.shapes[name]


def open_tower(value: str, tower: str, num_heads: int | None = None) -> TowerWeights:
    """Open the weights of the ViT (`vit`) or the mT5 (`mt5`). Raises ConfigurationError."""
    if is_run(value):
        return _of_run(value, tower)
    source = open_source(value, tower, num_heads)
    tensors = dict(source.tensors) | source.projection
    return TowerWeights(
        source.where,
        source.kind,
        FileWeights(tensors),
        set(source.tensors),
        source.sizes,
        set(source.projection),
        source.left_out,
        tensors,
        find_tokenizer(Path(value)) if tower == "mt5" else None,
        vocabulary=source.vocabulary,
        padded=tower == "mt5" and source.vocabulary is None and "our names" not in source.kind,
    )


def is_run(value: str) -> bool:
    """Return whether a value names a run, or one of its checkpoints, and not files of weights."""
    _, at, step = value.rpartition("@")
    if at and STEP.fullmatch(step) and not Path(value).exists():
        return True
    return Path(value, "checkpoints").is_dir()


def open_towers(weights: WeightsConfig, num_heads: int | None = None) -> list[TowerWeights]:
    """Open all first weights. Where both settings name the same place, the projection between the towers is taken."""
    values = {tower: value for tower in SIZES if (value := getattr(weights, tower)) is not None}
    opened = [open_tower(value, tower, num_heads) for tower, value in values.items()]
    if len(values) == 2 and len(set(values.values())) == 1:
        opened[0].names |= opened[0].projection
        opened[1].projection = set()
    return opened


def sources(opened: list[TowerWeights]) -> list[FirstWeights]:
    """Return what fills the model, with only the tensors that are taken."""
    return [Taken(each.weights, each.names) for each in opened]


class Taken:
    """Some of the tensors of other first weights."""

    def __init__(self, weights: FirstWeights, names: set[str]) -> None:
        self.weights = weights
        self.shapes = {name: weights.shapes[name] for name in names}
        self.fill, self.check = weights.fill, weights.check


def describe(opened: TowerWeights, config: RunConfig) -> str:
    """Describe what was read and what was left out, in one line."""
    parts = [f"{opened.where}: {opened.kind}, {len(opened.names)} tensors"]
    if opened.left_out:
        parts.append(f"left out {_groups(opened.left_out)}")
    size = "patches.position"
    if size in opened.names and (then := opened.shape(size)[0]) != config.pali.tokens_per_image:
        old, new = math.isqrt(then), math.isqrt(config.pali.tokens_per_image)
        convention = config.model.position_resampling
        parts.append(f"positions of {old} x {old} patches resampled to {new} x {new} ({convention})")
    return "; ".join(parts)


def find_not_finite(opened: list[TowerWeights], name: str) -> str:
    """Describe the first weights that give a tensor whose numbers are not finite."""
    for each in opened:
        if name in each.names:
            stored: StoredTensor | None = each.stored.get(name)
            half = stored is not None and stored.dtype == torch.float16
            why = " (fp16, which holds no number above 65,504)" if half else ""
            return f"{name} is not finite in {each.where}{why}; give weights in {'fp32 or bf16' if half else 'fp32'}"
    return f"{name} is not finite in the first weights"


def _of_run(value: str, tower: str) -> TowerWeights:
    key = f"weights.{tower}"
    found = find_checkpoint(value, key)
    weights, extra = CheckpointWeights(found.path), CheckpointFolder.from_run(found.run).extra(found.step)
    settings: Any = extra.get("config") or {}
    names = {name for name in weights.shapes if is_of_tower(name, tower)}
    if not names:
        raise ConfigurationError(f"{key}={value} holds no {TOWERS[tower]}; name a run that trained PaLI.")
    sizes = {k: v for k, v in (settings.get(tower) or {}).items() if k in vars(SIZES[tower]())}
    tokenizer = (settings.get("data") or {}).get("tokenizer")
    return TowerWeights(
        f"{key}={value}",
        f"step {found.step} of a run",
        weights,
        names,
        sizes,
        {name for name in weights.shapes if name.startswith(PROJECTION_PREFIX)},
        tokenizer=Path(tokenizer) if tower == "mt5" and tokenizer else None,
        checksum=extra.get("tokenizer") if tower == "mt5" else None,
    )


def _groups(names: list[str]) -> str:
    """Group names by their beginnings: `head (11 tensors), text_model (197 tensors)`."""
    counts: dict[str, int] = {}
    for name in names:
        steps = name.replace("/", ".").removeprefix("params.").removeprefix("img.").removeprefix("vision_model.")
        counts[steps.split(".")[0]] = counts.get(steps.split(".")[0], 0) + 1
    return ", ".join(f"{group} ({count} tensor{'s' * (count > 1)})" for group, count in counts.items())
