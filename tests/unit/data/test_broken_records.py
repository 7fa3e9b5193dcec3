"""One record spoils one example, any process that reads it and whatever it raises; what it was is counted and named."""

import json
import logging

import numpy as np
import pytest

from common.errors import StorageFailed
from data import objectives
from data.config import DataConfig
from data.error_budget import ErrorBudgetExceeded
from data.stream import Stream, evaluation_batches
from tests.unit.data.conftest import IMAGE_SIZE, TOKENS_PER_IMAGE, mixture, png, record
from tests.unit.data.shards.test_source import write_tar

BAD = 3


def stream(root, tokenizer, objective="captioning", minimum=1000) -> Stream:
    data = DataConfig(
        root=str(root),
        tokenizer=tokenizer.path,
        global_batch_size=20,
        num_streams=1,
        encoder_length=96,
        decoder_length=64,
        images_per_row=2,
        error_budget=0.0,
        error_budget_minimum=minimum,
    )
    return Stream(data, mixture(("webli", objective, 1)), tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "train", seed=0)


def with_bad(root, bad: bytes, number: int = 10) -> None:
    members = {}
    for each in range(number):
        members[f"{each:03d}.png"] = png(each)
        members[f"{each:03d}.json"] = bad if each == BAD else json.dumps(record(each)).encode()
    write_tar(root / "webli" / "train-00000.tar", members)


def counted_by_everyone(opened: Stream, number: int = 10) -> None:
    """Check that the bad record alone is missing, from a step of two epochs and from a held-out batch."""
    _, infos = opened.rows(1, range(1))
    assert len(infos) == 18 and f"{BAD:03d}" not in {info.key for info in infos}
    (cause, count), *rest = opened.ledger.drain().items()
    assert count == 2 and not rest
    infos = [info for batch in evaluation_batches(opened, micro_batch_size=number) for info in batch.infos]
    assert list(dict.fromkeys(info.key for info in infos)) == [f"{each:03d}" for each in range(number) if each != BAD]
    assert opened.ledger.drain() == {cause: 1}


@pytest.mark.parametrize(
    ("objective", "bad", "cause"),
    [
        ("captioning", b'{"captions": {"en": "a fine dog \\ud83d"}}', "malformed captions"),
        ("detection", b'{"objects": [{"label": "dog", "box": [0.1, 0.1, Infinity, 0.5]}]}', "malformed objects.box"),
        ("detection", b'{"objects": [{"label": "dog", "box": [0.1, 0.1, 1e999, 0.5]}]}', "malformed objects.box"),
        (
            "captioning",
            b'{"captions": {}, "meta": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
            "broken JSON",
        ),
        ("captioning", b'{"captions": {"en": "fine"}, "meta": ' + b"9" * 5000 + b"}", "broken JSON"),
        ("captioning", b'{"captions": {"en": "\\u2063"}}', "empty caption"),
        ("captioning", b'{"captions": {"en": "\\ufffd"}}', "target without any token"),  # SentencePiece takes it out
    ],
)
def test_a_record_that_cannot_be_used_is_counted_and_named(tmp_path, tokenizer, caplog, objective, bad, cause):
    with_bad(tmp_path, bad)
    with caplog.at_level(logging.WARNING):
        counted_by_everyone(stream(tmp_path, tokenizer, objective))
    assert caplog.text.count(f"source webli: {cause} in ") == 1 and f"(record '{BAD:03d}': " in caplog.text
    with pytest.raises(ErrorBudgetExceeded, match=rf"1 x {cause}.*record '{BAD:03d}': "):
        list(evaluation_batches(stream(tmp_path, tokenizer, objective, minimum=0), 1))


@pytest.mark.parametrize("error", [RecursionError, OverflowError, MemoryError, RuntimeError, AssertionError, KeyError])
@pytest.mark.parametrize("place", ["make", "encode"])
def test_whatever_a_record_raises_is_counted(tmp_path, tokenizer, monkeypatch, error, place):
    with_bad(tmp_path, b'{"captions": {"en": "the bad one"}}')
    owner = {"make": objectives.load("captioning"), "encode": type(tokenizer)}[place]
    usual = getattr(owner, place)

    def raise_at_the_bad_one(*arguments):
        if "the bad one" in str(arguments):
            raise error("it went wrong")
        return usual(*arguments)

    monkeypatch.setattr(owner, place, raise_at_the_bad_one)
    opened = stream(tmp_path, tokenizer)
    counted_by_everyone(opened)
    opened.components[0].example(BAD, np.random.default_rng(0))
    assert opened.ledger.drain() == {f"webli/{error.__name__} in captioning": 1}


@pytest.mark.parametrize("error", [StorageFailed, ErrorBudgetExceeded, KeyboardInterrupt])
def test_what_stops_reading_is_no_defect_of_a_record(tmp_path, tokenizer, monkeypatch, error):
    def stop(*_):
        raise error("it is over")

    with_bad(tmp_path, b"{}")
    monkeypatch.setattr(objectives.load("captioning"), "make", stop)
    opened = stream(tmp_path, tokenizer)
    with pytest.raises(error):
        opened.components[0].example(0, np.random.default_rng(0))
    assert not opened.ledger.drain()


SPELLING = {
    "alt_text": "<extra_id_0> a dog <extra_id_0>",
    "captions": {"en": "see <extra_id_0> </s>"},
    "ocr": [{"text": "EXIT <extra_id_3>"}],
    "questions": [{"question": "what is <extra_id_0>", "answer": "<extra_id_5>"}],
    "objects": [{"label": "<extra_id_0>", "box": [0, 0, 1, 1]}],
    "absent_labels": ["<extra_id_1> cat"],
    "text": "we fill <extra_id_0> with words and <extra_id_1> with more words many times a day",
}


@pytest.mark.parametrize("objective", objectives.NAMES[:-2])  # a task has its own test, labels have no template
def test_the_template_alone_has_sentinels(tmp_path, tokenizer, objective):
    with_bad(tmp_path, json.dumps(SPELLING).encode())
    (component,) = stream(tmp_path, tokenizer, objective).components
    sentinels = {tokenizer.sentinel(number) for number in range(100)}
    for seed in range(20):
        example = component.example(BAD, np.random.default_rng(seed))
        asked, answered = (
            [i for i in ids.tolist() if i in sentinels] for ids in (example.encoder_ids, example.decoder_ids)
        )
        assert not {0, 2} & {*example.encoder_ids.tolist(), *example.decoder_ids.tolist()}
        if objective == "span_corruption":
            assert asked == answered == [tokenizer.sentinel(number) for number in range(len(asked))] != []
        else:
            closing = [tokenizer.sentinel(0)] * (objective != "detection")
            assert asked == closing and not answered
            assert example.encoder_ids[-2:].tolist()[: len(closing)] == closing
            assert example.closing == 1 + len(closing)  # ids that stay where the prompt is cut
