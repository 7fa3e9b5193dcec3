"""Span corruption has the properties of T5's recipe."""

import numpy as np
import pytest

from common.errors import ConfigurationError
from data.objectives import span_corruption
from data.objectives.span_corruption import Options, num_noise, random_spans_noise_mask, raw_length


def runs(mask: np.ndarray) -> int:
    return int((mask[1:] & ~mask[:-1]).sum() + mask[0])


@pytest.mark.parametrize("length", [2, 3, 10, 113, 568])
def test_the_mask_has_exactly_the_noise_and_spans_of_the_recipe(length):
    for seed in range(20):
        mask = random_spans_noise_mask(np.random.default_rng(seed), length, 0.15, 3.0)
        tokens, spans = num_noise(length, 0.15, 3.0)
        assert (len(mask), int(mask.sum()), runs(mask)) == (length, tokens, spans)
        assert not mask[0] and mask[-1]
    assert tokens == max(round(0.15 * length), 1)


def test_lengths_are_those_of_mt5():
    # t5.data.random_spans_helper(1024, extra_tokens_per_span 1 and 1): 1137 tokens, targets of 229 with EOS.
    assert raw_length(1024, 0.15, 3.0) == 1137
    tokens, spans = num_noise(1137, 0.15, 3.0)
    assert (1137 - tokens + spans + 1, tokens + spans + 1) == (1024, 229)


def test_a_text_has_at_most_as_many_spans_as_there_are_sentinels():
    """From 2,000 tokens on: then spans grow longer instead."""
    assert num_noise(2000, 0.15, 3.0) == (300, 100)
    assert num_noise(2100, 0.15, 3.0) == (315, 100)
    assert num_noise(3000, 0.15, 3.0) == (450, 100)
    assert runs(random_spans_noise_mask(np.random.default_rng(0), 3000, 0.15, 3.0)) == 100
    assert raw_length(3000, 0.15, 3.0) == 3411  # less 512 of noise, with 100 sentinels and EOS: 3,000


def test_every_position_is_noised_equally_often_inside_the_text():
    masks = [random_spans_noise_mask(np.random.default_rng(seed), 100, 0.15, 3.0) for seed in range(3000)]
    frequency = np.mean(masks, axis=0)
    assert frequency[20:80].min() > 0.11 and frequency[20:80].max() < 0.19


def test_input_and_target_hold_the_text_exactly(tokenizer):
    text = " ".join(f"word{index}" for index in range(30))
    ids = tokenizer.encode(text)
    for seed in range(20):
        example = span_corruption.make({"text": text}, np.random.default_rng(seed), Options(), tokenizer)
        assert not example.image and example.input_ids is not None and example.target_ids is not None
        sentinels = {tokenizer.sentinel(number) for number in range(100)}
        assert [token for token in example.target_ids if token in sentinels] == [
            tokenizer.sentinel(number) for number in range(num_noise(len(ids), 0.15, 3.0)[1])
        ]
        spans: dict[int, list[int]] = {}
        for token in example.target_ids:
            if token in sentinels:
                current = spans.setdefault(token, [])
            else:
                current.append(token)
        restored = [each for token in example.input_ids for each in (spans[token] if token in sentinels else [token])]
        assert restored == ids


def test_a_long_text_gives_one_chunk_that_fits(tokenizer):
    text = " ".join(f"word{index}" for index in range(400))
    options = Options(input_length=64)
    inputs = {
        tuple(span_corruption.make({"text": text}, np.random.default_rng(seed), options, tokenizer).input_ids or ())
        for seed in range(30)
    }
    assert max(len(ids) + 1 for ids in inputs) == 64 and len(inputs) > 20


def test_every_part_of_a_long_text_is_drawn(tokenizer):
    """Of a text of one and a half chunks, over 40 draws: the second, shorter chunk too, to its last token."""
    options = Options(input_length=32)
    longest = raw_length(32, 0.15, 3.0)
    words = [f"word{index}" for index in range(200)]
    count = next(n for n in range(200) if len(tokenizer.encode(" ".join(words[:n]))) >= 1.5 * longest)
    text = " ".join(words[:count])
    ids, seen = tokenizer.encode(text), []
    for seed in range(40):
        example = span_corruption.make({"text": text}, np.random.default_rng(seed), options, tokenizer)
        drawn = set(example.input_ids or ()) | set(example.target_ids or ())
        seen.append(drawn - {tokenizer.sentinel(number) for number in range(100)})
    assert longest < len(ids) < 2 * longest
    assert {frozenset(ids[:longest]), frozenset(ids[longest:])} == set(map(frozenset, seen))


def test_spans_are_read_back():
    assert span_corruption.read("<extra_id_0> two <extra_id_1> five six") == {0: "two", 1: "five six"}


def test_input_and_target_fill_rows_and_no_more(tokenizer):
    """Every sentinel of the target has its place in the input, however short either row is."""
    text = " ".join(f"word{index}" for index in range(400))
    for encoder_length, decoder_length in ((96, 64), (96, 12), (16, 64), (3, 3)):
        options = Options().for_rows(encoder_length, decoder_length)
        example = span_corruption.make({"text": text}, np.random.default_rng(0), options, tokenizer)
        asked, answered = (
            [token for token in ids or () if token >= tokenizer.sentinel(99)]
            for ids in (example.input_ids, example.target_ids)
        )
        assert asked == answered != []
        assert len(example.input_ids or ()) < encoder_length and len(example.target_ids or ()) < decoder_length
    assert Options(input_length=20).for_rows(96, 64).input_length == 20


@pytest.mark.parametrize("option", [{"input_length": 97}, {"target_length": 65}, {"input_length": 192}])
def test_more_than_a_row_holds_is_refused(option):
    (name,) = option
    with pytest.raises(ConfigurationError, match=rf"span_corruption: {name}=\d+ is more than a row of data\.\w+=\d+"):
        Options(**option).for_rows(96, 64)
    with pytest.raises(ConfigurationError, match=f"{name}=2 must be 3 or more"):
        Options(**{name: 2})
