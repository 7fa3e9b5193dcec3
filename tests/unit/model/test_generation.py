"""When a search ends, what T5X's beams find, how often a token is drawn, and the score of given texts."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import ConfigurationError
from model.generation import Decoder, generate, score
from model.pali import PaLI
from model.search import EOS, Choice, Greedy, Sampled, Search
from model.tensor_parallel import TensorParallel
from tests.unit.model.examples import example, micro_batch, small_model

REDUCE = {dist.ReduceOp.MAX: torch.maximum, dist.ReduceOp.MIN: torch.minimum, dist.ReduceOp.SUM: torch.add}


class Scripted(Decoder):
    """Gives written tokens [steps, B], and keeps what it was given."""

    def __init__(self, steps: list[list[int]]) -> None:
        self.steps, self.given = iter(steps), []

    def start(self) -> None:
        pass

    def next(self, tokens: Tensor, choice: Choice) -> tuple[Tensor, ...]:
        assert isinstance(choice, Greedy)
        self.given.append(tokens.squeeze(1).tolist())
        return (torch.tensor(next(self.steps)),)


class OtherRank:
    """A group of two: after each step of this rank, whether a row of the other one still runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, running: list[int]) -> None:
        self.running = iter(running)
        monkeypatch.setattr(dist, "all_reduce", self.all_reduce)

    def size(self) -> int:
        return 2

    def all_reduce(self, x: Tensor, op: Any, group: Any) -> None:
        assert group is self
        x.copy_(REDUCE[op](x, torch.tensor(next(self.running), dtype=x.dtype)))


def answers(steps: list[list[int]], most: int, together: Any = None) -> tuple[list[list[int]], list[list[int]]]:
    """(answers by row, tokens that the decoder was given step by step)."""
    batch = micro_batch([[example(row)] for row in range(len(steps[0]))])
    decoder = Scripted(steps)
    return generate(small_model(), batch, most, together, decoder).tolist(), decoder.given


def test_a_row_that_has_ended_is_padded_and_all_end_with_the_last() -> None:
    found, given = answers([[5, 7], [EOS, 8], [9, EOS], [9, 9]], most=4)
    assert found == [[5, EOS, 0], [7, 8, EOS]]
    assert given == [[0, 0], [5, 7], [EOS, 8]]


def test_no_more_tokens_than_asked_for() -> None:
    assert answers([[5], [6], [7]], most=2)[0] == [[5, 6]]


@pytest.mark.parametrize(
    ("running", "expected"),
    [
        ([1, 1, 1, 0], [[5, EOS, 0, 0]]),  # the other rank ends two steps later
        ([0, 0, 0, 0], [[5, EOS]]),  # it has ended before
    ],
)
def test_ranks_that_share_parameters_end_together(
    running: list[int], expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    group = OtherRank(monkeypatch, running)
    assert answers([[5], [EOS], [9], [9], [9]], most=5, together=group)[0] == expected


def rough_model() -> PaLI:
    """A model whose tokens are far from equally probable, and that often ends."""
    model = small_model()
    model.head.output.weight.data *= 3
    return model


BATCH = [[example(1, 1, 7)], [example(2, 0, 3)]]  # an image and a text, a shorter text


def test_given_texts_are_scored_as_the_loss_scores_them() -> None:
    model, batch = rough_model().eval(), micro_batch(BATCH)
    texts = [[3, 4, EOS], [9, EOS], [5, 6, 7, 8, 20, EOS], [EOS]]
    found = score(model, batch, [texts, texts[::-1]])
    for row, own in enumerate([texts, texts[::-1]]):
        for column, text in enumerate(own):
            one = example(row + 1, 1 - row, 7 if row == 0 else 3)
            one.targets = text[:-1]
            nll = model((), micro_batch([[one]])).statistics[0].sum()
            assert found[row, column].item() == pytest.approx(-nll.item(), rel=1e-5)


def test_many_texts_share_one_pass_of_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, passes = rough_model(), micro_batch(BATCH), []
    model.encoder_norm.register_forward_hook(lambda *_: passes.append(1))
    texts = [[token, *[3] * (token % 5), EOS] for token in range(3, 63)]
    whole = score(model, batch, [texts] * 2)
    monkeypatch.setattr("model.generation.SCORED_AT_ONCE", 16)  # two texts at a time
    assert torch.allclose(whole, score(model, batch, [texts] * 2), rtol=1e-5)
    assert len(passes) == 2


def test_beams_of_t5_find_the_best_of_all_texts() -> None:
    """With half as many beams as tokens, nothing that can win is pruned: compare with all texts of two tokens."""
    model, batch, alpha = rough_model(), micro_batch(BATCH), 0.6
    tokens = range(model.head.mt5.vocab_size)
    texts = [[EOS], *([token, EOS] for token in tokens if token != EOS)]
    penalty = torch.tensor([((5 + len(text)) / 6) ** alpha for text in texts])
    expected = score(model, batch, [texts] * 2) / penalty
    found = generate(model, batch, 2, num_beams=len(tokens) // 2, length_penalty=alpha).tolist()
    assert [[t for t in row if t] for row in found] == [[t for t in texts[i] if t] for i in expected.argmax(1).tolist()]


def test_beams_are_at_least_as_probable_as_greedy_search() -> None:
    model, batch = rough_model(), micro_batch(BATCH)

    def probability(found: Tensor) -> Tensor:
        rows = [[row[: row.index(EOS) + 1] if EOS in row else row] for row in found.tolist()]
        return score(model, batch, rows).sum()

    greedy, beams = (generate(model, batch, 12, num_beams=n, length_penalty=0.0) for n in (1, 6))
    assert probability(beams) > probability(greedy)


def test_draws_follow_the_nucleus() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(20000, 4)
    for temperature, top_p, expected in (
        (1.0, 1.0, [0.5, 0.3, 0.15, 0.05]),
        (1.0, 0.75, [0.625, 0.375, 0, 0]),
        (0.5, 1.0, [0.25 / 0.365, 0.09 / 0.365, 0.0225 / 0.365, 0.0025 / 0.365]),
    ):
        draw = Sampled(Search(temperature=temperature, top_p=top_p, seed=3), torch.device("cpu"))
        (tokens,) = draw(logits, TensorParallel())
        found = tokens.bincount(minlength=4) / len(tokens)
        assert torch.allclose(found, torch.tensor(expected), atol=0.012)
        assert not found[torch.tensor(expected) == 0].any()


def test_a_seed_gives_the_same_draws() -> None:
    model, batch = rough_model(), micro_batch(BATCH)
    one, same, other = (generate(model, batch, 9, temperature=1.0, seed=seed).tolist() for seed in (1, 1, 2))
    assert one == same != other


@pytest.mark.parametrize(
    "wrong", [{"num_beams": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 0.5}, {"length_norm": "t6"},
              {"num_beams": 2, "temperature": 1.0}]
)  # fmt: skip
def test_impossible_searches(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Search(**wrong)
