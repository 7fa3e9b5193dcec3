"""Predict the text of each held-out example: greedy generation, with its image and with a blank one."""

from collections.abc import Iterable, Iterator

from common.progress import beat
from data.packing import Rows
from data.stream import StepData
from data.tokenizer import Tokenizer
from evaluation.sample_sheet import Sample
from parallel.engine.base import Engine
from train.config import RunConfig
from train.step.batch import to_tensors, trim
from train.step.reduction import in_lockstep


def predictions(
    engine: Engine, batches: Iterable[StepData[Rows]], tokenizer: Tokenizer, config: RunConfig, blind: bool = False
) -> Iterator[Sample]:
    """Yield a sample for each example of batches of one micro-batch, one example a row; a collective of all ranks.

    All ranks must have equally many batches (`ReplicaReader.held_out`). `blind`: generate once more with every image
    blanked. Samples are without their image. Raises ReadingStopped on every rank where reading ended on one.
    """
    max_new_tokens = config.evaluation.max_new_tokens
    for number, data in enumerate(in_lockstep(batches, engine.layout.device), 1):
        beat(f"predictions, batch {number}")
        (rows,) = data.micro_batches
        batch = trim(to_tensors(rows), config, engine.layout.device)
        seeing = engine.generate(batch, max_new_tokens).tolist()
        unseeing = engine.generate(batch.blanked(), max_new_tokens).tolist() if blind else None
        for info in data.infos:
            yield Sample(
                source=info.source,
                objective=info.objective,
                key=info.key,
                language=info.language,
                prompt=info.input_text,
                references=list(info.references),
                id=info.id,
                prediction=tokenizer.decode(seeing[info.row]),
                has_image=bool((rows["visual_index"][info.row] >= 0).any()),
                index=info.index,
                component=info.component,
                blind_prediction=tokenizer.decode(unseeing[info.row]) if unseeing is not None else None,
            )
