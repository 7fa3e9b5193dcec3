"""The mixture as a pure function of an index: example i is known without reading examples 0 … i-1.

Per component, Grain shuffles the records (anew in every epoch), repeats them without end, and hands each to the
objective with a random generator of its own; components are then interleaved by weight.
"""

import logging
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# Grain warns on import that jax, which only its profiler needs, is missing.
logging.getLogger("absl").setLevel(logging.ERROR)

import grain  # noqa: E402

from data import images, objectives  # noqa: E402
from data.config import ComponentConfig, DataConfig, MixtureConfig  # noqa: E402
from data.examples import EncodedExample, ExampleInfo  # noqa: E402
from data.ledger import Ledger  # noqa: E402
from data.objectives.base import MALFORMED, Skip  # noqa: E402
from data.shards import Record, ShardSource  # noqa: E402
from data.tokenizer import EOS, Tokenizer  # noqa: E402

# A record that an objective must skip is replaced by another of its source, at most so many times.
ATTEMPTS = 16


class Component:
    """One objective asked of the records of one source."""

    def __init__(
        self, config: ComponentConfig, source: ShardSource, tokenizer: Tokenizer, image_size: int, ledger: Ledger
    ):
        self.objective = config.objective
        self.source = source
        self.weight = config.weight
        self._module = objectives.load(config.objective)
        self._options = objectives.options(config.objective, config.options)
        self._tokenizer = tokenizer
        self._image_size = image_size
        self._ledger = ledger

    def example(self, number: int, rng: np.random.Generator) -> EncodedExample | None:
        """The example made of record `number`, or None, counted, if there is none to make."""
        try:
            record = self.source[number]
            return self._make(record, rng)
        except Skip as skip:
            if skip.defect:
                self._ledger.count_defect(self.source.name, self.source.shard(number), skip.cause)
            else:
                self._ledger.count_skip(self.source.name, f"{self.objective}: {skip.cause}")
            return None

    def example_or_replacement(self, number: int, rng: np.random.Generator) -> EncodedExample | None:
        """As `example`, but what has to be skipped is replaced by another record, drawn from `rng`."""
        for _ in range(ATTEMPTS):
            example = self.example(number, rng)
            if example is not None:
                return example
            number = int(rng.integers(len(self.source)))
        return None

    def dataset(self, seed: int) -> grain.MapDataset:
        """Endless: element i is a pure function of (seed, source, objective, i)."""
        name = zlib.crc32(f"{self.source.name}/{self.objective}".encode())
        shuffle_seed, example_seed = np.random.SeedSequence([seed, name]).generate_state(2).tolist()
        records = grain.MapDataset.range(len(self.source)).shuffle(seed=shuffle_seed).repeat()
        return records.random_map(self.example_or_replacement, seed=example_seed)

    def _make(self, record: Record, rng: np.random.Generator) -> EncodedExample:
        try:
            example = self._module.make(record.fields, rng, self._options, self._tokenizer)
        except MALFORMED as error:
            raise Skip(f"malformed fields for {self.objective}", defect=True) from error
        pixels = np.zeros((0, self._image_size, self._image_size, 3), np.uint8)
        if example.image:
            if record.image is None:
                raise Skip("missing image", defect=True)
            pixels = images.decode(record.image, self._image_size)[None]
        info = ExampleInfo(
            source=self.source.name,
            objective=self.objective,
            key=record.key,
            shard=record.shard,
            language=example.language,
            input_text=example.input_text,
            target_text=example.target_text,
        )
        return EncodedExample(
            self._ids(example.input_text, example.input_ids),
            self._ids(example.target_text, example.target_ids),
            pixels,
            info,
        )

    def _ids(self, text: str, ids: Sequence[int] | None) -> NDArray[np.int32]:
        return np.array([*(self._tokenizer.encode(text) if ids is None else ids), EOS], np.int32)


def open_components(
    data: DataConfig, mixture: MixtureConfig, tokenizer: Tokenizer, image_size: int, split: str, ledger: Ledger
) -> list[Component]:
    """The mixture's components over one split, each source opened once.

    Raises ConfigurationError if the mixture is wrong or a source has no shards.
    """
    mixture.check()
    names = dict.fromkeys(component.source for component in mixture.components)
    sources = {name: ShardSource(name, data.location(name), split, ledger) for name in names}
    return [
        Component(component, sources[component.source], tokenizer, image_size, ledger)
        for component in mixture.components
    ]


def mix(components: Sequence[Component], seed: int) -> grain.MapDataset:
    """The endless mixture; an element is None where ATTEMPTS records in a row had to be skipped."""
    return grain.MapDataset.mix(
        [component.dataset(seed) for component in components], [component.weight for component in components]
    )
