"""A step is a pure function of (configuration, seed, step), whatever rank reads it and whatever was read before."""

from dataclasses import replace

import numpy as np
import pytest

from common.errors import ConfigurationError
from data import images
from data.digest import row_digest, step_digest
from data.packing import Rows
from data.reading.reader import Reader
from data.stream import Stream, evaluation_batches, held_out_example
from tests.unit.data.conftest import IMAGE_SIZE, TOKENS_PER_IMAGE, mixture


def equal(one: Rows, other: Rows) -> bool:
    return all(np.array_equal(one[name], other[name]) for name in Rows.__annotations__)


def test_every_objective_comes_in_its_share(stream):
    infos = [info for step in range(1, 18) for info in stream.rows(step, range(4))[1]]
    counts = {name: sum(info.objective == name for info in infos) / len(infos) for name in {i.objective for i in infos}}
    for component in stream.components:
        assert counts[component.objective] == pytest.approx(component.weight / 17, abs=0.003)


def test_steps_are_the_same_in_any_order_and_any_process(data, tokenizer, stream):
    again = Stream(data, mixture(), tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "train", seed=7)
    forwards = {step: stream.rows(step, range(4)) for step in range(1, 6)}
    for step in (5, 3, 1, 4, 2):
        rows, infos = again.rows(step, range(4))
        assert equal(rows, forwards[step][0]) and infos == forwards[step][1]
    other = Stream(data, mixture(), tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "train", seed=8)
    assert [info.key for info in other.rows(1, range(4))[1]] != [info.key for info in forwards[1][1]]


WRITTEN_DOWN = [
    "vq2a/vqa vq2a0007 fr",
    "cc3m_35l/captioning cc3m_35l0009 de",
    "webli/split_captioning webli0010 en",
    "webli/ocr webli0002 ru",
    "vq2a/vqa vq2a0022 fr",
    "objects/object_vqa objects0011 en",
    "objects/detection objects0012 en",
    "cc3m_35l/captioning cc3m_35l0014 en",
    "vq2a/vqa vq2a0017 fr",
    "text/span_corruption text0001 en",
    "webli/split_captioning webli0021 en",
    "cc3m_35l/captioning cc3m_35l0011 zh",
    "webli/ocr webli0007 ru",
    "vq2a/vqa vq2a0000 fr",
    "vq2a/vqg vq2a0016 en",
    "objects/object_vqa objects0023 en",
    "objects/detection objects0017 en",
    "vq2a/vqa vq2a0008 en",
    "cc3m_35l/captioning cc3m_35l0015 en",
    "webli/split_captioning webli0006 en",
    "webli/ocr webli0010 en",
    "vq2a/vqa vq2a0013 en",
    "objects/object_vqa objects0014 en",
    "objects/detection objects0002 en",
]


def read_in_two_steps(data, tokenizer, *components) -> list[str]:
    stream = Stream(data, mixture(*components), tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "train", seed=7)
    infos = [info for step in (1, 2) for info in stream.rows(step, range(4))[1]]
    return [f"{info.component} {info.key} {info.language}" for info in infos]


def test_which_records_two_steps_hold(data, tokenizer):
    """Written down: a comparison of the stream with itself accepts any change of seeds, order or draws."""
    data = replace(data, global_batch_size=12, num_streams=4)
    assert read_in_two_steps(data, tokenizer) == WRITTEN_DOWN


@pytest.mark.parametrize("scale", [1e-310, 1e-12, 1e300])
def test_weights_are_relative_whatever_their_size(data, tokenizer, scale):
    components = [("vq2a", "vqa", 2), ("webli", "ocr", 1)]
    scaled = [(source, objective, weight * scale) for source, objective, weight in components]
    assert read_in_two_steps(data, tokenizer, *scaled) == read_in_two_steps(data, tokenizer, *components)


def test_a_component_that_comes_again_has_an_order_and_draws_of_its_own(data, tokenizer):
    found = read_in_two_steps(data, tokenizer, ("vq2a", "vqa", 1), ("vq2a", "vqa", 1))
    columns = [
        [line.split()[1] for line in found if line.startswith(name + " ")] for name in ("vq2a/vqa", "vq2a/vqa#2")
    ]
    assert len(columns[0]) == len(columns[1]) == 24 and columns[0] != columns[1]
    assert sum(one == other for one, other in zip(*columns, strict=True)) < 6
    alone = read_in_two_steps(data, tokenizer, ("vq2a", "vqa", 1))
    assert [line.split()[1] for line in alone][:24] == columns[0]  # the first is as it would be alone


def test_evaluation_draws_anew_for_a_component_that_comes_again(data, tokenizer):
    twice = mixture(("webli", "split_captioning", 1), ("webli", "split_captioning", 1))
    stream = Stream(data, twice, tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "validation", 0)
    infos = [info for batch in evaluation_batches(stream, 5) for info in batch.infos]
    assert [info.key for info in infos[:5]] == [info.key for info in infos[5:]]
    assert [info.input_text for info in infos[:5]] != [info.input_text for info in infos[5:]]


def test_evaluation_lists_every_item_once(data, tokenizer):
    every = mixture(("vq2a", "vqa", 1), ("cc3m_35l", "captioning", 1), ("webli", "ocr", 1), ("objects", "detection", 1))
    stream = Stream(data, every, tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "validation", 0)
    infos = [info for batch in evaluation_batches(stream, 5) for info in batch.infos]
    items = {"vq2a": ("0", "1"), "cc3m_35l": ("en", "de", "zh"), "webli": ("en", "ru"), "objects": ("",)}
    expected = [(f"{name}{number:04d}", item) for name, own in items.items() for number in range(5) for item in own]
    assert [(info.key, info.item) for info in infos] == expected
    assert len({info.id for info in infos}) == len(infos) == sum(one.num_held_out for one in stream.components)


def test_an_epoch_of_items_shows_every_item_once(data, tokenizer):
    components = (("cc3m_35l", "captioning", 1),)  # 24 records of three languages: three steps of 24 examples
    stream = Stream(replace(data, epoch="items"), mixture(*components), tokenizer, IMAGE_SIZE, 4, "train", seed=0)
    ids = [info.id for step in range(1, 7) for info in stream.rows(step, range(4))[1]]
    assert len(set(ids[:72])) == 72 and sorted(ids[:72]) == sorted(ids[72:]) and ids[:72] != ids[72:]


def test_an_epoch_shows_every_record_once_and_epochs_differ(data, tokenizer):
    stream = Stream(data, mixture(("vq2a", "vqa", 1)), tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "train", seed=0)
    first, second = ([info.key for info in stream.rows(step, range(4))[1]] for step in (1, 2))
    assert len(set(first)) == len(set(second)) == 24
    assert first != second


@pytest.mark.parametrize("data_parallel_size", [2, 4])
def test_digest_does_not_depend_on_the_ranks_that_read(stream, data_parallel_size):
    assert step_digest(stream, 4, data_parallel_size) == step_digest(stream, 4, 1)
    assert step_digest(stream, 4, 1) != step_digest(stream, 5, 1)


def test_readers_of_all_ranks_read_the_step(stream):
    keys = []
    for rank in range(2):
        reader = Reader(stream, rank, 2, micro_batch_size=2)
        found = reader.read(6)
        reader.close()
        batches, infos = found.micro_batches, found.infos
        keys += [info.key for info in infos]
        assert all(batch["encoder_tokens"].shape == (2, 96) and batch["images"].shape[0] == 6 for batch in batches)
        assert found.truncated == sum(info.truncated for info in infos)
        for info in infos:
            batch = batches[info.row // 2]
            assert info.segment in batch["decoder_segments"][info.row % 2]
    assert sorted(keys) == sorted(info.key for info in stream.rows(6, range(4))[1]) and len(keys) == 24


def test_targets_are_cut_to_their_own_length(data, tokenizer):
    """Span corruption is cut by whole pairs of sentinels, detection by whole boxes, and other texts at their end."""
    parts = mixture(("text", "span_corruption", 1), ("objects", "detection", 1), ("cc3m_35l", "captioning", 1))
    longest = {}
    for length in (None, 9):
        own = replace(data, target_length=length)
        stream = Stream(own, parts, tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "train", seed=0)
        rows, infos = stream.rows(1, range(4))
        segments = rows["decoder_segments"]
        longest[length] = max(int((segments[info.row] == info.segment).sum()) for info in infos)
    assert longest[9] <= 9 < longest[None]


def test_reading_may_begin_and_go_on_anywhere(stream):
    straight, resumed = Reader(stream, 0, 1, 2), Reader(stream, 0, 1, 2, prefetch=0)
    expected = {step: straight.read(step) for step in (1, 2, 3, 4)}
    for step in (3, 4, 2):
        found = resumed.read(step)
        assert found.infos == expected[step].infos
        assert all(equal(*pair) for pair in zip(found.micro_batches, expected[step].micro_batches, strict=True))


def test_an_error_of_the_background_thread_is_raised_by_read(stream, monkeypatch):
    def broken(step, streams, multiple):
        raise RuntimeError(f"step {step}")

    monkeypatch.setattr(stream, "rows", broken)
    with pytest.raises(RuntimeError, match="step 3"):
        Reader(stream, 0, 1, 2).read(3)


def test_streams_that_ranks_cannot_share_are_a_configuration_error(stream):
    with pytest.raises(ConfigurationError, match="num_streams=4 cannot be dealt evenly to 3"):
        Reader(stream, 0, 3, 2)


def test_evaluation_is_one_example_a_row_in_order_and_even_over_ranks(data, tokenizer):
    both = mixture(("webli", "split_captioning", 1), ("objects", "detection", 1))
    validation = Stream(data, both, tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "validation", 0)
    ranks = [list(evaluation_batches(validation, 2, 5, rank, 2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == 3
    keys = [info.key for batches in zip(*ranks, strict=True) for batch in batches for info in batch.infos]
    assert keys == [f"webli{n:04d}" for n in range(5)] + [f"objects{n:04d}" for n in range(5)]
    for (rows,), infos in ((batch.micro_batches, batch.infos) for batches in ranks for batch in batches):
        assert rows["encoder_tokens"].shape == (2, 96) and rows["images"].shape[0] == 2
        for row, info in enumerate(infos):
            assert info.row == row and info.segment == 1
            assert tokenizer.decode(rows["decoder_targets"][row]) == info.target_text
        assert not rows["decoder_segments"][len(infos) :].any()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_is_evaluated_is_chosen_before_it_is_batched_and_does_not_depend_on_ranks(data, tokenizer, size):
    both = mixture(("webli", "split_captioning", 1), ("objects", "detection", 1))
    validation = Stream(data, both, tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "validation", 0)

    def third(info):
        return int(info.key[-1]) % 3 == 1

    ranks = [list(evaluation_batches(validation, 2, 5, rank, size, 0, third)) for rank in range(size)]
    assert {len(batches) for batches in ranks} == {-(-10 // (2 * size))}
    for batches in ranks:  # without a gap, so that batches behind the last example are empty
        sizes = [len(batch.infos) for batch in batches]
        assert sizes == sorted(sizes, reverse=True) and all(
            batch.micro_batches[0]["images"].shape[0] == 2 for batch in batches
        )
    found = sorted((info.index, info.key) for batches in ranks for batch in batches for info in batch.infos)
    assert found == [(1, "webli0001"), (4, "webli0004"), (6, "objects0001"), (9, "objects0004")]


def test_a_held_out_example_is_found_again_by_its_place(data, tokenizer):
    both = mixture(("webli", "split_captioning", 1), ("objects", "detection", 1))
    validation = Stream(data, both, tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "validation", 0)
    (batch,) = list(evaluation_batches(validation, 10, 5))
    (rows,) = batch.micro_batches
    for info in batch.infos:
        again = held_out_example(validation, info.index, 5, 0)
        assert (again.info.key, again.info.target_text) == (info.key, info.target_text)
        assert np.array_equal(again.images[0], rows["images"][info.row])
    with pytest.raises(IndexError):
        held_out_example(validation, 10, 5, 0)


def test_a_repeated_component_is_evaluated_with_draws_of_its_own(data, tokenizer):
    twice = mixture(("webli", "split_captioning", 1), ("webli", "split_captioning", 1))
    first, second = Stream(data, twice, tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "train", seed=7).components
    drawn = [[component.held_out(number, 7).info.input_text for number in range(12)] for component in (first, second)]
    plain = [first.example(number, np.random.default_rng([7, number])).info.input_text for number in range(12)]
    assert drawn[0] == plain != drawn[1]


def test_a_digest_counts_types_and_not_the_bytes_alone(stream):
    rows, _ = stream.rows(1, range(1))
    same_bytes = {**rows, "decoder_tokens": rows["decoder_tokens"].view(np.uint32)}
    assert row_digest(rows, 0, stream.shape) == row_digest({**rows}, 0, stream.shape)
    assert row_digest(rows, 0, stream.shape) != row_digest(same_bytes, 0, stream.shape)


def test_a_rank_reads_the_images_of_its_own_rows_and_counts_its_own_texts(data, tokenizer, monkeypatch):
    """A pool of several ranks: each makes all of its texts, none decodes an image of a row that is another's."""
    decoded, decode = [], images.decode
    monkeypatch.setattr(images, "decode", lambda *arguments: decoded.append(1) or decode(*arguments))
    stream = Stream(data, mixture(), tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "train", seed=7)
    assert stream.pool_streams == 4
    whole, infos = stream.rows(3, range(4))
    with_image = sum(info.objective != "span_corruption" for info in infos)
    assert len(decoded) == with_image
    used = {name: stream.ledger.account(name).used for name in stream.facts()}
    decoded.clear()
    found = []
    for rank in range(4):
        before = len(decoded)
        rows, own = stream.rows(3, range(rank, rank + 1))
        found += [row_digest(rows, row, stream.shape) for row in range(len(rows["encoder_tokens"]))]
        assert len(decoded) - before == sum(info.objective != "span_corruption" for info in own)
    assert len(decoded) == with_image
    assert found == [row_digest(whole, row, stream.shape) for row in range(len(whole["encoder_tokens"]))]
    assert {name: stream.ledger.account(name).used for name in stream.facts()} == {n: 2 * c for n, c in used.items()}


def test_pools_are_whole_streams_that_divide_all(data):
    counts = {
        pool: replace(data, global_batch_size=96, num_streams=12, pool_examples=pool).pool_streams
        for pool in (1, 8, 9, 17, 40, 96, 500)
    }
    assert counts == {1: 1, 8: 1, 9: 2, 17: 3, 40: 6, 96: 12, 500: 12}
