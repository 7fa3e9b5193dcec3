"""An example ready to be packed, and what is told about it beside its arrays."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ExampleInfo:
    """Where an example comes from and where it went, for logs, samples and the guard against bad batches.

    `component`: its name in the mixture. `row` and `segment` say where it lies in the rows it was returned with.
    `truncated`: a text had to be cut. `place`: its number among the held-out records of all components.
    """

    source: str
    objective: str
    key: str
    shard: str
    language: str
    input_text: str
    target_text: str
    step: int = -1
    row: int = -1
    segment: int = 0
    truncated: bool = False
    component: str = ""
    place: int = -1


@dataclass(frozen=True)
class EncodedExample:
    """encoder_ids, decoder_ids: int32, each ending with EOS; images: uint8 [images, S, S, 3], none for text alone.

    `closing`: how many of the last encoder ids stay when a text is cut: EOS, and before it the prompt's sentinel.
    """

    encoder_ids: NDArray[np.int32]
    decoder_ids: NDArray[np.int32]
    images: NDArray[np.uint8]
    info: ExampleInfo
    closing: int = 1
