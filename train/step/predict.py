"""What the model answers: greedy generation over batches, seeing and blind."""

from collections.abc import Iterable, Iterator

from common.progress import beat
from data.tokenizer import Tokenizer
from evaluation.sample_sheet import Sample
from parallel.engine.base import Engine
from train.step.batch import Trim, as_tensors
from train.step.reader import Reading
from train.step.reduction import together


def answers(
    engine: Engine,
    batches: Iterable[Reading],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    trim: Trim,
    blind: bool = False,
) -> Iterator[Sample]:
    """One sample per example, without its picture, of readings of one micro-batch with one example a row. With `blind`,
    asked again with every image blanked.

    A collective: all ranks must hold equally many batches (`ReplicaReader.held_out` sees to it). Raises
    ReadingStopped on every rank where reading raises it on one.
    """
    for number, reading in enumerate(together(batches, engine.layout.device, is_empty), 1):
        beat(f"answers to batch {number}")
        (rows,) = reading.rows
        batch = trim(as_tensors(rows))
        seen = engine.generate(batch, max_new_tokens).tolist()
        unseen = engine.generate(batch.blanked(), max_new_tokens).tolist() if blind else None
        for info in reading.infos:
            yield Sample(
                source=info.source,
                objective=info.objective,
                key=info.key,
                language=info.language,
                prompt=info.input_text,
                references=[info.target_text],
                prediction=tokenizer.decode(seen[info.row]),
                has_image=bool((rows["visual_index"][info.row] >= 0).any()),
                index=info.place,
                component=info.component,
                blind_prediction=tokenizer.decode(unseen[info.row]) if unseen is not None else None,
            )


def is_empty(reading: Reading) -> bool:
    """Whether a reading holds no example."""
    return not reading.infos
