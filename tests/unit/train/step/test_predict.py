"""A model predicts every example twice in an evaluation: as it is, and with a blank image."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from data.examples import ExampleInfo
from data.packing import Rows, RowShape, empty_rows
from data.stream import StepData
from model.batch import MicroBatch
from tests.unit.train.ranks import Ranks
from train.evaluate import is_wanted
from train.step.predict import predictions
from train.step.validation import Validation

SHAPE = RowShape(encoder_length=64, decoder_length=16, images_per_row=1, image_size=28, tokens_per_image=4)
TOKENIZER: Any = SimpleNamespace(decode=lambda ids: f"answer {ids[0]}")
CONFIG: Any = SimpleNamespace(
    data=SimpleNamespace(trim_multiple=0),
    evaluation=SimpleNamespace(max_new_tokens=1, samples=3),
    pali=SimpleNamespace(tower=None),
)


class Engine:
    """Record the batches; predict the brightness of a row's image."""

    def __init__(self) -> None:
        self.layout = SimpleNamespace(device=torch.device("cpu"))
        self.given: list[MicroBatch] = []

    def generate(self, batch: MicroBatch, max_new_tokens: int) -> torch.Tensor:
        self.given.append(batch)
        return batch.images.reshape(batch.num_rows, -1)[:, :max_new_tokens].long()


def reading(*brightness: int) -> StepData[Rows]:
    """Return two rows, with an example in as many of the leading ones as there are values."""
    rows: Rows = empty_rows(2, SHAPE)
    infos = []
    for row, value in enumerate(brightness):
        rows["images"][row] = value
        rows["visual_index"][row, :4] = np.arange(4)
        infos.append(ExampleInfo("vq2a", "vqa", f"k{value}", "s", "en", "What?", "red", row=row, index=value))
    return StepData([rows], infos)


def test_the_blind_pass_shows_the_same_rows_with_every_image_gray() -> None:
    engine: Any = Engine()
    asked = list(predictions(engine, [reading(10, 20), reading(30)], TOKENIZER, CONFIG, blind=True))
    seeing, blind, *_ = engine.given
    assert len(engine.given) == 4 and sorted(seeing.images.unique().tolist()) == [10, 20]
    assert blind.images.shape == seeing.images.shape and bool((blind.images == 127).all())
    assert torch.equal(blind.encoder_tokens, seeing.encoder_tokens)
    assert [(s.prediction, s.blind_prediction) for s in asked] == [
        ("answer 10", "answer 127"), ("answer 20", "answer 127"), ("answer 30", "answer 127"),
    ]  # fmt: skip
    assert [(s.index, s.has_image, s.image) for s in asked] == [(10, True, None), (20, True, None), (30, True, None)]


def test_without_a_blind_pass_the_model_predicts_once() -> None:
    engine: Any = Engine()
    (asked,) = predictions(engine, [reading(10)], TOKENIZER, CONFIG)
    assert len(engine.given) == 1 and asked.blind_prediction is None


def test_nothing_is_generated_where_no_rank_has_an_example_left(monkeypatch: pytest.MonkeyPatch) -> None:
    engines: list[Any] = [Engine(), Engine()]
    batches = [[reading(10), reading(), reading()], [reading(20), reading(30), reading()]]

    def ask(rank: int) -> list[int]:
        return [s.index for s in predictions(engines[rank], batches[rank], TOKENIZER, CONFIG)]

    assert Ranks(2, monkeypatch).run(ask) == [[10], [20, 30]]
    assert [len(engine.given) for engine in engines] == [2, 2], "a collective: both ranks or none"


def test_languages_are_chosen_by_those_of_the_examples() -> None:
    info = ExampleInfo("s", "vqa", "k", "s", "de", "Was?", "rot")
    assert is_wanted(SimpleNamespace(languages=[]), info)  # type: ignore[arg-type]
    assert is_wanted(SimpleNamespace(languages=["fr", "de"]), info)  # type: ignore[arg-type]
    assert not is_wanted(SimpleNamespace(languages=["fr"]), info)  # type: ignore[arg-type]


def test_the_main_rank_shows_the_same_samples_whatever_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks interleave their batches; a rank that is no replica leader adds none."""

    def samples(
        rank: int, batches: list[list[StepData[Rows]]], is_replica_leader: bool = True
    ) -> list[tuple[int, int]]:
        read: list[int] = []
        validation: Any = SimpleNamespace(
            config=CONFIG.evaluation,
            run_config=CONFIG,
            components=["vqa", "ocr"],
            tokenizer=TOKENIZER,
            layout=SimpleNamespace(is_replica_leader=is_replica_leader, device=torch.device("cpu")),
            reader=SimpleNamespace(
                held_out=lambda batch, limit: batches[rank],
                image=lambda index, limit: read.append(index) or np.full((28, 28, 3), index, np.uint8),
            ),
        )
        engine: Any = Engine()
        shown = Validation.samples(validation, engine)
        found = [(sample.index, int(sample.image.max())) for sample in shown if sample.image is not None]
        assert read == [index for index, _ in found], "only images that are shown are read"
        return found

    alone = [[reading(1, 2), reading(3, 4)]]
    dealt = [[reading(1), reading(4)], [reading(2), reading(3)]]
    shown = [(1, 1), (2, 2), (3, 3)]
    assert Ranks(1, monkeypatch).run(lambda rank: samples(rank, alone)) == [shown]
    assert Ranks(2, monkeypatch).run(lambda rank: samples(rank, dealt)) == [shown, []]
    assert Ranks(2, monkeypatch).run(lambda rank: samples(rank, alone * 2, is_replica_leader=rank == 0)) == [shown, []]
