"""Predict the text of each held-out example, generated or chosen, with its image and with a blank one."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from common.progress import beat
from data.packing import Rows
from data.stream import StepData
from data.tokenizer import EOS, Tokenizer
from evaluation.sample_sheet import Sample
from model.batch import MicroBatch
from parallel.engine.base import Engine
from train.config import RunConfig
from train.step.batch import to_tensors, trim
from train.step.reduction import in_lockstep

BEST = 5  # choices of a prediction: zero-shot classification reports top-1 and top-5


def predictions(
    engine: Engine,
    batches: Iterable[StepData[Rows]],
    tokenizer: Tokenizer,
    config: RunConfig,
    blind: bool = False,
    choices: Sequence[str] = (),
) -> Iterator[Sample]:
    """Yield a sample for each example of batches of one micro-batch, one example a row; a collective of all ranks.

    All ranks must have equally many batches (`ReplicaReader.held_out`). Texts are generated greedily; with `choices`, a
    prediction has the BEST most likely of them, a line each. `blind`: predict once more with every image blanked.
    Samples are without their image. Raises ReadingStopped on every rank where reading ended on one.
    """
    predict = partial(_choose, engine, tokenizer, choices) if choices else partial(_generate, engine, tokenizer, config)
    for number, data in enumerate(in_lockstep(batches, engine.layout.device), 1):
        beat(f"predictions, batch {number}")
        (rows,) = data.micro_batches
        batch = trim(to_tensors(rows), config, engine.layout.device)
        seeing = predict(batch)
        unseeing = predict(batch.blanked()) if blind else None
        for info in data.infos:
            yield Sample(
                source=info.source,
                objective=info.objective,
                key=info.key,
                language=info.language,
                prompt=info.input_text,
                references=list(info.references),
                id=info.id,
                prediction=seeing[info.row],
                has_image=bool((rows["visual_index"][info.row] >= 0).any()),
                index=info.index,
                component=info.component,
                blind_prediction=unseeing[info.row] if unseeing is not None else None,
            )


def _generate(engine: Engine, tokenizer: Tokenizer, config: RunConfig, batch: MicroBatch) -> list[str]:
    ids = engine.generate(batch, config.evaluation.max_new_tokens).tolist()
    return [tokenizer.decode(row) for row in ids]


def _choose(engine: Engine, tokenizer: Tokenizer, choices: Sequence[str], batch: MicroBatch) -> list[str]:
    """Return the BEST choices of each row, by the log-probability of the text with EOS; of equal ones the first."""
    targets = [[*tokenizer.encode(text), EOS] for text in choices]
    scores = engine.score(batch, [targets] * len(batch.encoder_tokens))
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :BEST].tolist()
    return ["\n".join(choices[number] for number in row) for row in best]
