"""The `data` and `mixture` groups of a run's configuration."""

import math
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from omegaconf import MISSING

from common.errors import ConfigurationError
from common.values import PATH, at_least, one_of
from data import objectives
from data.fields import check_field_map
from data.shards.source import ReadOptions
from data.tasks.config import TaskConfig

MOST_APART = 1e6  # ratio of two weights; a run of so many examples has one of the smaller


@dataclass
class DataConfig:
    """Describe where the shards are, and how the examples of one step become rows."""

    root: str = field(default=MISSING, metadata=PATH)
    """Folder of the sources. Required."""
    tokenizer: str = field(default=MISSING, metadata=PATH)
    """SentencePiece model, or the `tokenizer.json` of a T5 or mT5. Required; the groups of conf/data take
    `tokenizer.model` in `root`, and null takes that of `weights.mt5` (as `mt5=from_weights` does)."""
    sources: dict[str, str] = field(default_factory=dict, metadata=PATH)
    """Location by name of a source: a folder or a shard pattern, relative to `root` (docs/data.md). A source that is
    not named here is read from the folder of its name in `root`, hence empty by default."""
    fields: dict[str, dict[str, str]] = field(default_factory=dict)
    """Names of fields in the JSON of a source's records where they are not those of docs/data.md, by source:
    `{webli: {alt_text: TEXT, language: LANGUAGE}}`; `a.b` is b in an object a. Empty by default."""
    global_batch_size: int = MISSING
    """Examples of one step, over all ranks. Required; a multiple of `num_streams`. The paper's is 4096."""
    num_streams: int = MISSING
    """Streams that the examples of a step are divided among; each packs rows of its own. Required; a multiple of every
    data-parallel size that the run may have, as rows do not depend on the number of ranks then."""
    pool_examples: int = 128
    """Examples that are packed together, at least; whole streams, and all of a step at most. Rows are fuller the more
    there are. A rank reads the texts of its pools, and the images of its own rows only. 128 fill about 95 % of a row's
    encoder positions and read little more than a rank's own examples; conf/data/web has 1024 (97 %)."""
    encoder_length: int = MISSING
    """Positions of an encoder row, visual tokens included. Required."""
    decoder_length: int = MISSING
    """Positions of a decoder row. Required."""
    target_length: int | None = None
    """Most tokens of a target, with EOS; a longer one is cut by its objective's rule (whole boxes, whole pairs of
    sentinels). Null by default: a decoder row's. A target as long as a row leaves no room for other examples, so most
    of its encoder row stays empty: where many examples share a row, take less than it."""
    images_per_row: int = 1
    """Images that one row holds at most. 1 by default: an image of 224 px takes half a row of 512 positions. 0 is a run
    of text alone, whose model is the mT5 without a ViT; its result is for `weights.mt5`."""
    error_budget: float = 0.01
    """Fraction of a source's last `error_window` records that may be broken before the run stops. 1 % by default:
    crawled data always holds some, and more is a damaged source."""
    error_budget_minimum: int = 16
    """Broken records that are always forgiven, so that one bad file in the first step stops nothing."""
    error_window: int = 10_000
    """Records of a source, the last ones that a rank has read, that `error_budget` applies to. At the default budget of
    1 % a hundred may be broken; a count since the start would forgive a million in a row late in a run."""
    max_megapixels: float = 64.0
    """Millions of pixels of the largest image that is decoded, judged by its header; a larger one is a defect. The
    default takes 0.2 GB while it is decoded, and is above what photographs have; a decompression bomb has more."""
    exif_orientation: bool = True
    """Turn photographs upright, as their EXIF tags ask and every viewer does. Boxes are then fractions of the upright
    image; false is for a corpus whose boxes were drawn on the pixels as they are stored."""
    scaled_decoding: bool = False
    """Decode a JPEG of twice `model.image_size` or more at 1/2, 1/4 or 1/8 of its size (libjpeg's scaled inverse DCT),
    the smallest that is not below it. False by default, since pixels differ from those of the whole image; true feeds
    about 1.7 times as many examples per core from photographs of 0.3 megapixels (benchmarks/data.md).
    """
    inception_crop: bool = False
    """Train a ViT alone on a random crop of each image, 5 % to 100 % of its area (big_vision's `inception_crop`).
    False by default: images are resized whole; a caption names what a crop may lose."""
    flip: bool = False
    """Train a ViT alone on every other image with left and right changed (big_vision's `flip_lr`). False by default."""
    num_threads: int = 2
    """Threads that read and decode, per reading rank. 2 by default, for laptops."""
    num_workers: int = 0
    """Processes that read, per reading rank, each a whole step in `num_threads` threads of its own; as many steps are
    read ahead at least. 0 by default: threads of the training process read. conf/data/web has 4."""
    prefetch: int = 2
    """Steps that are read ahead, so that training does not wait for a slow read. 2 by default: one more than is in use.
    """
    trim_multiple: int = 0
    """Positions: a micro-batch is cut behind the last position that any of its rows uses, to a multiple of this, and
    unused image slots are left out; on a CPU, without dropout, its rows are joined into one without padding. 0, the
    default, keeps all shapes equal, as compiled kernels and pipeline stages need them."""
    epoch: str = "records"
    """Pass of a component through its source: `records` visits each usable record once, and draws one of its items (of
    its questions, its languages); `items` visits each item once. Records by default, as in the paper.
    """
    holdout: float = 0.0
    """Fraction of the training records that a source without validation shards validates on and does not train on; a
    hash of a record's key decides, whatever the order and the ranks. 0 by default: all are trained on."""
    index_folder: str | None = field(default=None, metadata=PATH)
    """Folder for the indices of shards that lie where nothing can be written, shared by all nodes or one on each. Null
    by default: every index lies beside its tar."""
    cache_folder: str | None = field(default=None, metadata=PATH)
    """Folder that keeps what was read of sources at a URL (s3://…, gs://…, https://…), for later epochs. Null by
    default: nothing is kept, as a run over a large corpus reads a record once."""
    cache_gib: float = 10.0
    """Most that `cache_folder` holds (GiB); the oldest is removed first. The default fits any disk of a node."""
    max_member_mib: int = 64
    """Largest file of a sample (MiB) that is read; a larger one is a defect. The default is far above any photograph,
    and small enough that one damaged size fills no memory."""
    retry_s: float = 60.0
    """Seconds for which a read is tried again while its disk or file server fails; then the run ends with exit code 75.
    A quarter of parallel.timeout_s at most, as the other ranks wait meanwhile. File servers fail over in a minute,
    hence the default."""
    tasks: dict[str, TaskConfig] = field(default_factory=dict)
    """Tasks of official files, by name (conf/task): a component with such a source and the objective `task` trains on
    the task's training items. Empty by default; `train.finetune` adds `task`."""

    def check(self) -> None:
        """Raise ConfigurationError, with the numbers, for values that no step can be made of."""
        counts = (
            "global_batch_size",
            "num_streams",
            "encoder_length",
            "decoder_length",
            "pool_examples",
            "num_threads",
        )
        for source, own in self.fields.items():
            check_field_map(f"data.fields.{source}", own)
        at_least("data.", 1, **{name: getattr(self, name) for name in (*counts, "max_member_mib")})
        none = ("error_budget_minimum", "prefetch", "num_workers", "trim_multiple", "images_per_row")
        at_least("data.", 0, **{name: getattr(self, name) for name in none})
        if self.target_length is not None:
            at_least("data.", 2, target_length=self.target_length)
        one_of("data.epoch", self.epoch, ("records", "items"))
        if self.global_batch_size % self.num_streams:
            raise ConfigurationError(
                f"data.global_batch_size={self.global_batch_size} cannot be dealt evenly to "
                f"data.num_streams={self.num_streams}; make it a multiple of that number, or lower data.num_streams."
            )
        if not 0 <= self.error_budget <= 1:
            raise ConfigurationError(f"data.error_budget={self.error_budget} is a fraction; set it between 0 and 1.")
        if self.error_window <= self.error_budget_minimum:
            raise ConfigurationError(
                f"data.error_window={self.error_window} records could never hold more broken ones than "
                f"data.error_budget_minimum={self.error_budget_minimum} forgives; make it larger."
            )
        if not self.max_megapixels > 0 or math.isinf(self.max_megapixels):
            raise ConfigurationError(
                f"data.max_megapixels={self.max_megapixels} must be a number of millions of pixels above 0, such as 64."
            )
        if not 0 < self.cache_gib < math.inf:
            raise ConfigurationError(f"data.cache_gib={self.cache_gib} is a size in GiB; set it above 0.")
        if not 0 <= self.holdout < 1:
            raise ConfigurationError(f"data.holdout={self.holdout} is a fraction; set it to 0 or more, and below 1.")
        if not 0 <= self.retry_s < float("inf"):
            raise ConfigurationError(f"data.retry_s={self.retry_s} is a time in seconds; set it to 0 or more.")

    @property
    def longest_target(self) -> int:
        """Return the most tokens of a target, with EOS."""
        return min(self.decoder_length, self.target_length or self.decoder_length)

    @property
    def pool_streams(self) -> int:
        """Return the streams of a pool: the fewest that divide all of them and hold `pool_examples`, or all."""
        examples = self.global_batch_size // self.num_streams
        divisors = (number for number in range(1, self.num_streams) if self.num_streams % number == 0)
        return next((number for number in divisors if number * examples >= self.pool_examples), self.num_streams)

    def check_images(self, tokens_per_image: int) -> None:
        """Raise ConfigurationError if an image and the shortest text (one token and EOS) do not fit a row."""
        if self.images_per_row and self.encoder_length < tokens_per_image + 2:
            raise ConfigurationError(
                f"data.encoder_length={self.encoder_length} has no room for text beside the {tokens_per_image} visual "
                f"tokens of one image; set it to {tokens_per_image + 2} or more."
            )

    def location(self, source: str) -> str:
        """Return the folder or shard pattern of a source."""
        place = self.sources.get(source, source)
        return place if "://" in place else os.path.join(self.root, place)

    def read_options(self, source: str) -> ReadOptions:
        """Return the options for reading a source."""
        return ReadOptions(
            self.retry_s,
            self.index_folder,
            self.max_member_mib,
            self.holdout,
            self.fields.get(source, {}),
            self.cache_folder,
            self.cache_gib,
        )


@dataclass
class ComponentConfig:
    """One component of a mixture: an objective applied to the records of a source."""

    source: str = MISSING
    """Name of the source: a folder of `data.root`, or a name in `data.sources`. Required."""
    objective: str = MISSING
    """Name of a module of `data/objectives`. Required."""
    weight: float = MISSING
    """Share of the examples, relative to the other components; the paper's are millions of examples. 0 leaves the
    component out. Required."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the objective: the fields of the `Options` dataclass of its module. Empty: its defaults."""


Mixture = dict[str, ComponentConfig]


def used(mixture: Mixture) -> Mixture:
    """Return the components with a weight other than 0."""
    return {name: component for name, component in mixture.items() if component.weight}


def order_keys(mixture: Mixture) -> list[str]:
    """Return the key that each component's order and random numbers derive from.

    The key is "source/objective", and "source/objective#2" where it comes again. So a component reads the same
    examples whatever its name.
    """
    counts: Counter[str] = Counter()
    keys = []
    for component in mixture.values():
        key = f"{component.source}/{component.objective}"
        counts[key] += 1
        keys.append(key if counts[key] == 1 else f"{key}#{counts[key]}")
    return keys


def shares(mixture: Mixture) -> dict[str, float]:
    """Return the share of all examples that each component should have; together 1."""
    heaviest = max((component.weight for component in mixture.values()), default=1.0)
    scaled = {name: component.weight / heaviest for name, component in mixture.items()}
    total = sum(scaled.values())
    return {name: weight / total for name, weight in scaled.items()}


def check_mixture(mixture: Mixture, tasks: Collection[str] | None = None) -> None:
    """Raise ConfigurationError for an empty mixture, an unknown objective or option, or a negative weight.

    `tasks`: names of the tasks that there are, if sources of the objective `task` are to be compared with them.
    """
    for name, component in mixture.items():
        if not component.source.strip():
            raise ConfigurationError(f"mixture.{name}.source is blank; name a folder of data.root.")
        one_of(f"mixture.{name}.objective", component.objective, objectives.NAMES)
        if not 0 <= component.weight < math.inf:
            raise ConfigurationError(f"mixture.{name}.weight={component.weight} must be at least 0 and finite.")
        objectives.options(component.objective, component.options, f"mixture.{name}.options")
        if tasks is not None and (component.objective == "task") != (component.source in tasks):
            have = f"data.tasks has {', '.join(tasks) or 'none'}"
            raise ConfigurationError(
                f"mixture.{name}: the objective task is for the items of a task, and source {component.source} with "
                f"objective {component.objective} is not ({have}); choose a task (task=coco), or another objective."
            )
    weights = [component.weight for component in used(mixture).values()]
    if not weights:
        raise ConfigurationError(
            "mixture is empty; add a component: mixture.<name>={source: …, objective: …, weight: 1}."
        )
    if not max(weights) / min(weights) < MOST_APART:
        raise ConfigurationError(
            f"mixture weights {min(weights):g} and {max(weights):g} are too far apart to be mixed; raise the smaller "
            "one, or set it to 0."
        )


def check_rows(mixture: Mixture, encoder_length: int, decoder_length: int) -> None:
    """Raise ConfigurationError for an option that needs more than rows of these lengths hold."""
    for component in used(mixture).values():
        objectives.options(component.objective, component.options).for_rows(encoder_length, decoder_length)


def check_text_alone(mixture: Mixture, tasks: Mapping[str, TaskConfig], phase: str) -> None:
    """Raise ConfigurationError for a component that is used in a phase and asks about images."""
    for name, component in used(mixture).items():
        if _has_images(component, tasks):
            raise ConfigurationError(
                f"phases.{phase}: data.images_per_row=0 leaves no place for the images of mixture.{name} "
                f"({component.objective}); leave it out (mixture.{name}.weight=0), or set data.images_per_row above 0."
            )


def check_images_alone(mixture: Mixture, tasks: Mapping[str, TaskConfig]) -> None:
    """Raise ConfigurationError for a component that is used and has no image: a ViT alone learns nothing from it."""
    for name, component in used(mixture).items():
        if not _has_images(component, tasks):
            raise ConfigurationError(
                f"mixture.{name} ({component.objective}) has no images, and the model is a ViT alone; leave it out "
                f"(mixture.{name}.weight=0)."
            )


def _has_images(component: ComponentConfig, tasks: Mapping[str, TaskConfig]) -> bool:
    """Return whether examples of a component may have images."""
    task = tasks.get(component.source)
    return bool(task.images) if task else component.objective not in objectives.OF_TEXT


def for_objectives(mixture: Mixture, weights: Mapping[str, float], phase: str) -> Mixture:
    """Return the used components of the objectives that `weights` names; without any, all used components.

    The weight of an objective is divided among its components as in the mixture.
    """
    components = used(mixture)
    if not weights:
        return components
    totals: defaultdict[str, float] = defaultdict(float)
    for component in components.values():
        totals[component.objective] += component.weight
    if missing := sorted(set(weights) - set(totals)):
        raise ConfigurationError(
            f"phases.{phase}.objectives names {', '.join(missing)}; the mixture has only {', '.join(sorted(totals))}."
        )
    return {
        name: replace(component, weight=weights[component.objective] * component.weight / totals[component.objective])
        for name, component in components.items()
        if component.objective in weights
    }
