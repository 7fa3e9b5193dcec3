"""The mixture as a pure function of an index: example i is known without reading examples 0 … i-1.

Per component, Grain shuffles the records (anew in every epoch), repeats them without end, and hands each to the
objective with a random generator of its own; components are then interleaved by weight.
"""

import logging
import math
import threading
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

# Grain warns on import that jax, which only its profiler needs, is missing.
logging.getLogger("absl").setLevel(logging.ERROR)

import grain  # noqa: E402

from common.progress import beat  # noqa: E402
from data import images, objectives  # noqa: E402
from data.config import ComponentConfig, DataConfig, Mixture, check_mixture, order_keys  # noqa: E402
from data.error_budget import Ledger, NothingUsable  # noqa: E402
from data.examples import EncodedExample, ExampleInfo  # noqa: E402
from data.label_pool import labels_of, names_nothing_absent  # noqa: E402
from data.objectives.base import SENTINEL, LabelOptions  # noqa: E402
from data.shards.scan import printable  # noqa: E402
from data.shards.source import Record, ShardSource  # noqa: E402
from data.skip import Skip, one_record  # noqa: E402
from data.tokenizer import EOS, Tokenizer  # noqa: E402

# A record that an objective must skip is replaced by another of its source, at most so many times.
ATTEMPTS = 16
# After so many records without an example, up to so many more are looked at before the component is refused.
FIRST_TRIES = 1_000
LOOKED_AT = 10_000
MOST_FIELDS = 8  # named in the refusal


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
        source: ShardSource,
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
        self._options = options.for_rows(data.encoder_length, data.decoder_length)
        self._data = data
        self._closed = any(prompt.endswith(SENTINEL) for prompt in self._module.PROMPTS)
        self._tokenizer = tokenizer
        self._image_size = image_size
        self._ledger = ledger
        self._given = not required  # whether an example was made of any record, or none is required
        self._tries = 0
        self._learns_labels = isinstance(self._options, LabelOptions) and not self._options.labels
        self._lock = threading.RLock()

    def example(self, number: int, rng: np.random.Generator) -> EncodedExample | None:
        """Make the example of record `number`; None, counted, if there is none to make."""
        number = self.source.numbered(number)
        try:
            with one_record(self.objective):
                example = self._make(self.source.read(number), rng)
        except Skip as skip:
            if skip.defect:
                shard, key = self.source.shard(number), self.source.key(number)
                self._ledger.count_defect(self.source.name, shard, skip.cause, f"record {key!r:.100}: {skip.detail}")
            else:
                self._ledger.count_skip(self.source.name, f"{self.objective}: {skip.cause}")
            return None
        self._given = True
        self._ledger.count_used(self.source.name)
        return example

    def example_or_replacement(self, number: int, rng: np.random.Generator) -> EncodedExample | None:
        """Make an example as `example` does, but replace what has to be skipped by another record, drawn from `rng`."""
        for _ in range(ATTEMPTS):
            example = self.example(number, rng)
            if example is not None:
                return example
            if not self._given:
                self._look_for_any()
            number = int(rng.integers(len(self.source)))
        return None

    def dataset(self, seed: int) -> grain.MapDataset:
        """Return the endless examples: element i is a pure function of (seed, order_key, i)."""
        shuffle_seed, example_seed = np.random.SeedSequence([seed, self._number]).generate_state(2).tolist()
        records = grain.MapDataset.range(len(self.source)).shuffle(seed=shuffle_seed).repeat()
        return records.random_map(self.example_or_replacement, seed=example_seed)

    def held_out(self, number: int, seed: int) -> EncodedExample | None:
        """Make the example of record `number` that every evaluation with this seed makes."""
        repeats = (
            [self._number] if "#" in self.order_key else []
        )  # the first asks what other objectives ask of the record
        return self.example(number, np.random.default_rng([seed, number, *repeats]))

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
            if self._given or self._tries < min(FIRST_TRIES, len(self.source)):
                return
            numbers = np.linspace(0, len(self.source) - 1, min(LOOKED_AT, len(self.source)), dtype=np.int64)
            causes: Counter[str] = Counter()
            fields: Counter[str] = Counter()
            for number in numbers.tolist():
                beat()
                try:
                    with one_record(self.objective):
                        record = self.source[number]
                        fields.update(list(record.fields))
                        self._make(record, np.random.default_rng(number))
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
        most = sorted(fields, key=lambda name: (-fields[name], name))[:MOST_FIELDS]
        found = ", ".join(printable(name[:40]) for name in most) or "no field"
        return (
            f"mixture.{self.name} gives nothing: none of {causes.total():,} records of source "
            f"{self.source.name} can be used ({count:,} x {cause}); {self.objective} needs the field "
            f"{objectives.FIELDS[self.objective]}{wanted}, and they hold {found}; name another source or objective in "
            f"mixture.{self.name}, or leave it out (mixture.{self.name}.weight=0)."
        )

    def _make(self, record: Record, rng: np.random.Generator) -> EncodedExample:
        if self._learns_labels and names_nothing_absent(record.fields):
            self._learn_labels()
        example = self._module.make(record.fields, rng, self._options, self._tokenizer)
        pixels = np.zeros((0, self._image_size, self._image_size, 3), np.uint8)
        if example.image:
            if record.image is None:
                raise Skip("missing image", defect=True)
            pixels = images.decode(
                record.image, self._image_size, self._data.max_megapixels, self._data.exif_orientation
            )[None]
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
        encode = self._tokenizer.encode_prompt if self._closed else self._tokenizer.encode
        input_ids = encode(example.input_text) if example.input_ids is None else example.input_ids
        target_ids = self._tokenizer.encode(example.target_text) if example.target_ids is None else example.target_ids
        if not len(target_ids):  # EOS alone would teach to answer nothing
            raise Skip("target without any token", defect=True, detail=f"it is {example.target_text[:40]!a}")
        return EncodedExample(_with_eos(input_ids), _with_eos(target_ids), pixels, info, closing=1 + self._closed)

    def _learn_labels(self) -> None:
        """Take the source's own labels for negatives; done once, at the first record that names nothing absent."""
        with self._lock:
            if self._learns_labels and isinstance(self._options, LabelOptions):
                self._options = replace(self._options, labels=labels_of(self.source))
                self._learns_labels = False


def _with_eos(ids: Sequence[int]) -> NDArray[np.int32]:
    return np.array([*ids, EOS], np.int32)


def open_components(
    data: DataConfig, mixture: Mixture, tokenizer: Tokenizer, image_size: int, split: str, ledger: Ledger
) -> list[Component]:
    """Return the mixture's components over one split, each source opened once.

    In training each must give something. Raises ConfigurationError if the mixture is wrong or a source has no shards.
    """
    check_mixture(mixture)
    names = dict.fromkeys(component.source for component in mixture.values())
    sources = {name: ShardSource(name, data.location(name), split, ledger, data.read_options()) for name in names}
    return [
        Component(name, key, one, sources[one.source], tokenizer, data, image_size, ledger, split == "train")
        for (name, one), key in zip(mixture.items(), order_keys(mixture), strict=True)
    ]


def mix(components: Sequence[Component], seed: int) -> grain.MapDataset:
    """Return the endless mixture; an element is None where ATTEMPTS records in a row had to be skipped."""
    _, exponent = math.frexp(max(component.weight for component in components))
    weights = [math.ldexp(component.weight, -exponent) for component in components]  # Grain divides 100 by the smallest
    return grain.MapDataset.mix([component.dataset(seed) for component in components], weights)
