"""What the model answers: greedy generation over batches, seeing and blind."""

from collections.abc import Iterable, Iterator

from data.examples import ExampleInfo
from data.packing import Rows
from data.tokenizer import Tokenizer
from parallel.engine import Engine
from progress import beat
from train.agreement import together
from train.samples import Sample
from train.steps import Trim, as_tensors


def answers(
    engine: Engine,
    batches: Iterable[tuple[Rows, list[ExampleInfo]]],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    trim: Trim,
    blind: bool = False,
) -> Iterator[Sample]:
    """One sample per example, of batches with one example a row. With `blind`, asked again with every image blanked.

    A collective: all ranks must hold equally many batches (`data.stream.evaluation_batches` sees to it). Raises
    ErrorBudgetExceeded on every rank where reading raises it on one.
    """
    for number, (rows, infos) in enumerate(together(batches), 1):
        beat(f"answers to batch {number}")
        batch = trim(as_tensors(rows))
        seen = engine.generate(batch, max_new_tokens).tolist()
        unseen = engine.generate(batch.blanked(), max_new_tokens).tolist() if blind else None
        for info in infos:
            has_image = bool((rows["visual_index"][info.row] >= 0).any())
            yield Sample(
                source=info.source,
                objective=info.objective,
                key=info.key,
                language=info.language,
                prompt=info.input_text,
                references=[info.target_text],
                prediction=tokenizer.decode(seen[info.row]),
                picture=rows["images"][info.row] if has_image else None,
                blind_prediction=tokenizer.decode(unseen[info.row]) if unseen is not None else None,
            )
