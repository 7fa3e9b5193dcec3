"""Read a task's items as the rows of an evaluation."""

from collections import Counter
from collections.abc import Sequence

from common.progress import beat
from data.examples import EncodedExample
from data.packing import RowShape
from data.skip import Skip
from data.tasks.config import TaskConfig
from data.tasks.item import Item
from data.tasks.read import encode_item, prompt
from data.tokenizer import Tokenizer

MULTIPLE = 16  # positions that a row's length is a multiple of
MOST_TEXT = 1024  # tokens of a prompt; a longer one is cut, and counted


class ItemComponent:
    """Make the examples of a task's items; `skipped` counts the items without one, by cause."""

    def __init__(self, config: TaskConfig, items: Sequence[Item], tokenizer: Tokenizer, image_size: int) -> None:
        self.source, self.skipped = items, Counter[str]()
        self._config, self._tokenizer, self._image_size = config, tokenizer, image_size

    @property
    def num_held_out(self) -> int:
        """Return the number of items."""
        return len(self.source)

    def held_out(self, number: int, seed: int) -> EncodedExample | None:
        """Make the example of an item, None where its image cannot be read; nothing is drawn from `seed`."""
        try:
            return encode_item(self._config, self.source[number], self._tokenizer, self._image_size, number)
        except Skip as skip:
            self.skipped[skip.cause] += 1
            return None


class ItemStream:
    """Hold a task's items with the shape of their rows, which the longest prompt fits; `cut` counts longer ones."""

    def __init__(
        self, config: TaskConfig, items: Sequence[Item], tokenizer: Tokenizer, image_size: int, tokens_per_image: int
    ) -> None:
        longest, self.cut = 0, 0
        for number, item in enumerate(items):
            length = len(tokenizer.encode_prompt(prompt(config, item)))
            longest, self.cut = max(longest, length), self.cut + (length >= MOST_TEXT)
            if number % 10_000 == 0:
                beat(f"prompts, item {number}")
        positions = min(longest + 1, MOST_TEXT) + (tokens_per_image if config.images else 0)
        self.shape = RowShape(-(-positions // MULTIPLE) * MULTIPLE, MULTIPLE, 1, image_size, tokens_per_image)
        self.components = [ItemComponent(config, items, tokenizer, image_size)]
