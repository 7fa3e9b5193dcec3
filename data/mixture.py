"""Make the mixture a pure function of a number: example i is made without making examples 0 … i-1.

Components are interleaved by weight. Each draws from the records that its objective can use, each of them once an
epoch, in an order of its own for every epoch, and with a random generator of its own for every example.
"""

import os
import threading
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from common.progress import beat
from data import images, objectives
from data.config import ComponentConfig, DataConfig, Mixture, check_mixture, order_keys
from data.crops import augmented
from data.error_budget import Ledger, NothingUsable
from data.examples import EncodedExample, ExampleInfo, TextExample
from data.interleave import interleave
from data.label_pool import distinct_labels, names_nothing_absent
from data.objectives.base import SENTINEL, LabelOptions, LanguageOptions
from data.permutation import permuted
from data.shards.field_map import check_places, check_sources, listed
from data.shards.remote import is_url
from data.shards.source import Record, ShardSource
from data.skip import Skip, one_record
from data.tasks.source import ItemSource
from data.tokenizer import EOS, Tokenizer

Source = ShardSource | ItemSource

# After so many records without an example, up to so many more are looked at before the component is refused.
FIRST_TRIES = 1_000
LOOKED_AT = 10_000


class Component:
    """One objective asked of the records of one source.

    `name` is its name in the mixture, `order_key` the key that its order derives from (`data.config.order_keys`).
    `required`: reading ends with NothingUsable where the source has nothing for the objective.
    """

    def __init__(
        self,
        name: str,
        order_key: str,
        config: ComponentConfig,
        source: Source,
        tokenizer: Tokenizer,
        data: DataConfig,
        image_size: int,
        ledger: Ledger,
        required: bool = True,
    ):
        self.name = name
        self.order_key = order_key
        self.objective = config.objective
        self.source = source
        self.weight = config.weight
        self._module = objectives.load(config.objective)
        options = objectives.options(config.objective, config.options)
        self._options = options.for_rows(data.encoder_length, data.longest_target)
        self._data = data
        self._closed = any(prompt.endswith(SENTINEL) for prompt in self._module.PROMPTS)
        self._tokenizer = tokenizer
        self._image_size = image_size
        self._ledger = ledger
        self._augments = required and (data.inception_crop or data.flip)
        self._given = not required  # whether an example was made of any record, or none is required
        self._tries = 0
        chosen = isinstance(self._options, LanguageOptions) and self._options.languages is not None
        uses = self._options.uses if chosen else None  # type: ignore[attr-defined]
        self._usable = source.usable(self.objective, uses, items=data.epoch == "items")
        self._items = source.usable(self.objective, uses, items=True)
        self._learns_labels = isinstance(self._options, LabelOptions) and not self._options.labels
        self._lock = threading.RLock()

    def example(self, number: int, rng: np.random.Generator, item: int | None = None) -> EncodedExample | None:
        """Make the example of record `number` of the index, as `text` and `with_image` do."""
        text = self.text(number, rng, item)
        return None if text is None else self.with_image(text)

    def text(self, number: int, rng: np.random.Generator, item: int | None = None) -> TextExample | None:
        """Make the example of record `number` of the index up to its image; None, counted, if there is none to make.

        `item`: its number in the record, None to draw one.
        """
        try:
            with one_record(self.objective):
                example = self._make(self.source.read(number, image=False), number, rng, item)
        except Skip as skip:
            self._count(number, skip)
            return None
        self._given = True
        return example

    def with_image(self, text: TextExample) -> EncodedExample | None:
        """Read the image of an example; None, counted, if it cannot be used. Only here a record is counted as used."""
        pixels = np.zeros((0, self._image_size, self._image_size, 3), np.uint8)
        if text.record is not None:
            try:
                with one_record(self.objective):
                    pixels = self._pixels(text.record, text.image_at, text.augmentation)[None]
            except Skip as skip:
                self._count(text.record, skip)
                return None
        self._ledger.count_used(self.source.name)
        return EncodedExample(text.encoder_ids, text.decoder_ids, text.info, pixels, closing=text.closing)

    def _count(self, number: int, skip: Skip) -> None:
        if skip.defect:
            shard, key = self.source.shard(number), self.source.key(number)
            self._ledger.count_defect(self.source.name, shard, skip.cause, f"record {key!r:.100}: {skip.detail}")
        else:
            self._ledger.count_skip(self.source.name, f"{self.objective}: {skip.cause}")

    def _pixels(self, number: int, at: tuple[int, int] | None, seed: int | None) -> NDArray[np.uint8]:
        content, data = self.source.image(number, at), self._data
        if content is None:  # the shard was replaced
            raise Skip("missing image", defect=True, detail="no image file has its key")
        augment = None
        if seed is not None:
            rng = np.random.default_rng(seed)
            augment = partial(augmented, rng=rng, crop=data.inception_crop, flip=data.flip)
        return images.decode(
            content, self._image_size, data.max_megapixels, data.exif_orientation, data.scaled_decoding, augment
        )

    def drawn(self, number: int, seed: int) -> TextExample | None:
        """Make the component's example of this number up to its image, a pure function of (seed, order_key, number).

        None, counted, where its record cannot be used. Raises NothingUsable where no record can.
        """
        rng = np.random.default_rng(np.random.SeedSequence([seed, self._number, number], spawn_key=(1,)))
        if not len(self._usable):  # any record shows, and counts, what is missing
            self._look_for_any()
            return self.text(self.source.numbered(number % len(self.source)), rng)
        epoch, place = divmod(number, len(self._usable))
        record, item = self._usable[permuted(place, len(self._usable), _key(seed, self._number, epoch))]
        text = self.text(record, rng, item if self._data.epoch == "items" else None)
        if text is None and not self._given:
            self._look_for_any()
        if text is not None and self._augments:
            text = replace(text, augmentation=int(rng.integers(1 << 63)))
        return text

    @property
    def num_held_out(self) -> int:
        """Return the number of items of the source for the objective: each is an example of an evaluation."""
        return len(self._items)

    def held_out(self, number: int, seed: int) -> EncodedExample | None:
        """Make the example of an item, in order, that every evaluation with this seed makes."""
        record, item = self._items[number]
        # The first component asks what other objectives ask of the record.
        own = [self._number] if "#" in self.order_key else []
        return self.example(record, np.random.default_rng([seed, record, *own, *([item] if item else [])]), item)

    @property
    def _number(self) -> int:
        return zlib.crc32(self.order_key.encode())

    def _look_for_any(self) -> None:
        """Raise NothingUsable if the first tries gave nothing and no record of the source would.

        Luck decides what the first tries are, and each rank has its own, so that a source with few usable records is
        looked through once before it is refused.
        """
        with self._lock:
            self._tries += 1
            if self._given or self._tries < min(FIRST_TRIES, len(self._usable)):
                return
            numbers = np.linspace(0, len(self.source) - 1, min(LOOKED_AT, len(self.source)), dtype=np.int64)
            causes: Counter[str] = Counter()
            fields: Counter[str] = Counter()
            for number in numbers.tolist():
                beat()
                try:
                    with one_record(self.objective):
                        found = self.source.numbered(number)
                        record = self.source.read(found, image=False)
                        fields.update(list(record.fields))
                        self._make(record, found, np.random.default_rng(number), None)
                except Skip as skip:
                    causes[skip.cause] += 1
                else:
                    self._given = True
                    return
            self._tries -= 1  # the next read tries again
        raise NothingUsable(self._nothing(causes, fields))

    def _nothing(self, causes: Counter[str], fields: Counter[str]) -> str:
        ((cause, count),) = causes.most_common(1)
        languages = getattr(self._options, "languages", None)
        wanted = f" in {', '.join(languages)}" if languages else ""
        return (
            f"mixture.{self.name} gives nothing: none of {causes.total():,} records of source "
            f"{self.source.name} can be used ({count:,} x {cause}); {self.objective} needs the field "
            f"{objectives.FIELDS[self.objective]}{wanted}, and they hold {listed(fields)}; map a field in "
            f"data.fields.{self.source.name}, name another source or objective in mixture.{self.name}, or leave it out "
            f"(mixture.{self.name}.weight=0)."
        )

    def _make(self, record: Record, number: int, rng: np.random.Generator, item: int | None) -> TextExample:
        if self._learns_labels and isinstance(self.source, ShardSource) and names_nothing_absent(record.fields):
            self._learn_labels(self.source)
        one = () if item is None or not getattr(self._module, "ITEMS", False) else (item,)
        example = self._module.make(record.fields, rng, self._options, self._tokenizer, *one)
        if example.image and record.image is None:
            raise Skip("missing image", defect=True, detail="no image file has its key")
        info = ExampleInfo(
            source=self.source.name,
            objective=self.objective,
            key=record.key,
            shard=record.shard,
            language=example.language,
            input_text=example.input_text,
            target_text=example.target_text,
            component=self.name,
            references=example.references or (example.target_text,),
            item=example.item,
        )
        closed = self._closed if example.closed is None else example.closed
        input_ids = example.input_ids
        if input_ids is None:
            input_ids = self._tokenizer.encode_input(example.input_text, closed)
        target_ids = self._tokenizer.encode(example.target_text) if example.target_ids is None else example.target_ids
        if not len(target_ids) and not self._tokenizer.has_ids_of_any_text:
            raise Skip("no label")
        if not len(target_ids):  # EOS alone would teach to answer nothing
            raise Skip("target without any token", defect=True, detail=f"it is {example.target_text[:40]!a}")
        return TextExample(
            _with_eos(input_ids),
            _with_eos(target_ids),
            info,
            closing=1 + closed,
            record=number if example.image else None,
            image_at=record.image_at if example.image else None,
        )

    def _learn_labels(self, source: ShardSource) -> None:
        """Take the source's own labels for negatives; done once, at the first record that names nothing absent."""
        with self._lock:
            if self._learns_labels and isinstance(self._options, LabelOptions):
                self._options = replace(self._options, labels=distinct_labels(source))
                self._learns_labels = False


def _with_eos(ids: Sequence[int]) -> NDArray[np.int32]:
    return np.array([*ids, EOS], np.int32)


def open_components(
    data: DataConfig, mixture: Mixture, tokenizer: Tokenizer, image_size: int, split: str, ledger: Ledger,
    opened: Mapping[str, Source] | None = None,
) -> list[Component]:  # fmt: skip
    """Return the mixture's components over one split, each source opened once, unless it is in `opened`.

    In training each must give something. Raises ConfigurationError if the mixture is wrong or a source has no shards.
    """
    check_mixture(mixture, data.tasks)
    names = dict.fromkeys(component.source for component in mixture.values())
    elsewhere = [name for name in data.fields if is_url(data.location(name)) or os.path.isdir(data.location(name))]
    check_sources(data.fields, {*names, *data.sources, *elsewhere}, "data.fields")
    sources = opened or {name: _open_source(name, data, split, ledger) for name in names}
    return [
        Component(name, key, one, sources[one.source], tokenizer, data, image_size, ledger, split == "train")
        for (name, one), key in zip(mixture.items(), order_keys(mixture), strict=True)
    ]


def _open_source(name: str, data: DataConfig, split: str, ledger: Ledger) -> Source:
    if name in data.tasks:
        return ItemSource(name, data.tasks[name], split, data.retry_s)
    source = ShardSource(name, data.location(name), split, ledger, data.read_options(name))
    if split == "train":  # the other splits may hold less
        check_places(source, f"data.fields.{name}")
    return source


@lru_cache(maxsize=1024)
def _key(seed: int, number: int, epoch: int) -> int:
    """Return the key of the order of an epoch."""
    return int(np.random.SeedSequence([seed, number, epoch], spawn_key=(0,)).generate_state(1, np.uint64)[0])


class Examples:
    """The endless mixture, by number; an example is None where its record cannot be used."""

    def __init__(self, components: Sequence[Component], seed: int) -> None:
        self._components, self._seed = components, seed
        self._order = interleave(tuple(component.weight for component in components))

    def __getitem__(self, number: int) -> TextExample | None:
        component, count = self._order.place(number)
        return self._components[component].drawn(count, self._seed)


def mix(components: Sequence[Component], seed: int) -> Examples:
    """Return the examples of a mixture of these components."""
    return Examples(components, seed)
