"""Attention's pieces: buckets, kernels that are equal, block masks, dropout, positions at another resolution."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers.models.mt5.modeling_mt5 import MT5Attention

from common.errors import ConfigurationError
from model.attention import kernels
from model.attention.bias import bias_by_distance, relative_bias, relative_buckets
from model.attention.kernels import KERNELS
from model.attention.masks import Mask
from model.config import ModelConfig
from model.dropout import dropout, masked, seed_unit, split_mask, value_dropout
from model.tensor_parallel import PlannedGroup, TensorParallel
from model.vit import patchify, resample_position
from tests.unit.model.examples import MODEL, MT5, example, micro_batch, small_model


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_mesh_tensorflows(bidirectional: bool) -> None:
    distance = torch.arange(300)[None, :] - torch.arange(300)[:, None]
    theirs = MT5Attention._relative_position_bucket(
        distance, bidirectional=bidirectional, num_buckets=32, max_distance=128
    )
    diagonals = torch.cat([theirs[:, 0].flip(0), theirs[0, 1:]])
    assert torch.equal(relative_buckets(300, 300, bidirectional, 32, 128, torch.device("cpu")), diagonals)
    last = relative_buckets(1, 300, bidirectional, 32, 128, torch.device("cpu"), first_query=299)
    assert torch.equal(last, theirs[299])


@pytest.mark.parametrize("bidirectional", [True, False])
def test_every_query_and_key_get_the_bias_of_their_bucket(bidirectional: bool) -> None:
    distance = torch.arange(7)[None, :] - torch.arange(2, 7)[:, None]
    theirs = MT5Attention._relative_position_bucket(
        distance, bidirectional=bidirectional, num_buckets=32, max_distance=128
    )
    table = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    found = relative_bias(bias_by_distance(table, MT5, 7, bidirectional), 5, 7, torch.float32, first_query=2)
    assert torch.equal(found, table[theirs].permute(2, 0, 1))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_bias_holds_for_longer_rows_than_it_was_made_for(bidirectional: bool) -> None:
    table = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    short, long = (bias_by_distance(table, MT5, length, bidirectional) for length in (9, 700))
    assert short.shape == (4, 2 * 129 - 1) and long.shape == (4, 2 * 704 - 1)
    for queries, keys, first in ((700, 700, 0), (1, 650, 649), (5, 9, 0)):
        expected = relative_bias(long, queries, keys, torch.float32, first)
        assert torch.equal(relative_bias(short, queries, keys, torch.float32, first), expected)


ROWS = [[example(1), example(2)], [example(3, images=2)], [example(4, images=0), example(5, targets=9)]]
ATTENTIONS = ("encoder", "decoder", "cross")


def attended(kernel: str, kind: str, recompute: bool = False) -> list[Tensor]:
    """The result of a kernel on packed rows, and the gradients of query, key, value and the table of biases."""
    batch = micro_batch(ROWS, encoder_length=150)
    mask = {"encoder": batch.encoder_mask, "decoder": batch.decoder_mask, "cross": batch.cross_mask}[kind]
    generator = torch.Generator().manual_seed(0)
    (rows, queries), keys = mask.queries.shape, mask.keys.shape[1]
    query = torch.randn(queries, rows, 4, 16, generator=generator)
    key, value = torch.randn(2, keys, rows, 4, 16, generator=generator)
    table, weights = torch.randn(32, 4, generator=generator), torch.randn(queries, rows, 64, generator=generator)
    inputs = [query, key, value] + [table] * (kind != "cross")
    for x in inputs:
        x.requires_grad_()
    bias = None if kind == "cross" else bias_by_distance(table, MT5, keys, kind == "encoder")
    result = KERNELS[kernel](query, key, value, bias, mask, recompute)
    counted = result * (mask.queries.t() > 0).unsqueeze(-1)  # padding may attend to anything
    return [counted.detach(), *torch.autograd.grad((counted * weights).sum(), inputs)]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != "plain"])
def test_every_kernel_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch, kernel: str, kind: str) -> None:
    """With its gradients, that of the bias included; flex computes them on a CPU too once torch does not refuse."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    plain = attended("plain", kind)
    for found, expected in zip(attended(kernel, kind), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
    for found, expected in zip(attended("plain", kind, recompute=True), plain, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("length", [256, 300])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_blocks_found_on_the_host_are_those_of_torch(kind: str, length: int) -> None:
    generator = torch.Generator().manual_seed(length)

    def ids(length: int) -> Tensor:
        ends = torch.randint(1, length, (5, 3), generator=generator).sort(1).values
        found = (torch.arange(length)[None, :, None] >= ends[:, None]).sum(2) + 1
        found[0] = 1  # one example
        found[1] = 0  # none
        return torch.where(found < 4, found, 0)  # the rest is padding

    queries = ids(length)
    keys = ids(384) if kind == "cross" else queries
    mask = Mask(queries, keys, causal=kind == "decoder")
    theirs = create_block_mask(mask.blocks.mask_mod, 5, None, length, keys.shape[1], device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(mask.blocks, name), getattr(theirs, name)), name
    for name in ("kv", "full_kv", "q", "full_q"):
        used = (
            torch.arange(getattr(theirs, f"{name}_indices").shape[3]) < getattr(theirs, f"{name}_num_blocks")[..., None]
        )
        ours, others = (getattr(x, f"{name}_indices") for x in (mask.blocks, theirs))
        assert torch.equal(ours[used], others[used]), name
    assert mask.blocks.seq_lengths == theirs.seq_lengths and mask.blocks.BLOCK_SIZE == theirs.BLOCK_SIZE


def test_too_many_lengths_are_an_error_and_not_slow_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its limit torch would compute all scores without a word."""
    monkeypatch.setattr(kernels, "MOST_SHAPES", 2)
    compiles = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiles(*args, backend="eager", **kwargs))
    with torch._dynamo.config.patch():  # restores the limits that it sets
        compiled = kernels.compiled_flex.__wrapped__()
    monkeypatch.setattr(kernels, "flex_attention", compiled)  # which a CPU takes
    limit = torch._dynamo.config.patch(recompile_limit=2)
    with torch.no_grad(), limit, pytest.raises(ConfigurationError, match="kernels for 2 pairs of lengths; set data"):
        for length in (16, 24, 32):
            segments = torch.ones(1, length, dtype=torch.long)
            x = torch.randn(length, 1, 2, 16)
            KERNELS["flex"](x, x, x, None, Mask(segments, segments), False)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dropout_rate", [0.0, 0.2])
def test_the_model_has_the_same_loss_with_every_kernel(dropout_rate: float) -> None:
    rows = [[example(1), example(2, images=0)], [example(3, images=2)]]
    batch = micro_batch(rows, encoder_length=50, decoder_length=16)
    losses = {}
    for kernel in KERNELS:
        model = ModelConfig(image_size=MODEL.image_size, z_loss=0.0, attention=kernel, dropout_rate=dropout_rate)
        torch.manual_seed(0)
        with torch.no_grad():
            losses[kernel] = small_model(model=model).train()((), batch).loss
    for kernel in ("sdpa", "flex"):
        torch.testing.assert_close(losses[kernel], losses["plain"], rtol=1e-5, atol=0)


def test_dropout_keeps_the_expectation_and_is_off_in_evaluation() -> None:
    batch = micro_batch([[example(1)], [example(2)]])
    without = small_model()
    model = small_model(model=ModelConfig(image_size=MODEL.image_size, z_loss=0.0, dropout_rate=0.2))
    with torch.no_grad():
        assert model.eval()((), batch)[0] == without.eval()((), batch)[0]
    block = model.train().encoder_block_0
    x = torch.randn(14, 2, MT5.d_model)
    kept = [block.mlp(x) - x for _ in range(400)]
    mean, spread = torch.stack(kept).mean(0), torch.stack(kept).std(0)
    block.eval()
    expected = block.mlp(x) - x
    assert spread.mean() > 0
    assert ((mean - expected).abs() < 6 * spread / 20 + 1e-6).float().mean() > 0.999
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    one = model.train()((), batch)[0]
    torch.manual_seed(1)
    assert one != model((), batch)[0]
    torch.set_rng_state(generator_state)


def test_dropout_has_one_mask_for_a_whole_sequence() -> None:
    """T5X's: of [L, B, d], the same at all positions, another one in each row; what is left is scaled up."""
    module = torch.nn.Module()
    kept = dropout(torch.ones(6, 50, 40), 0.2, module)
    assert torch.equal(kept, kept[:1].expand_as(kept))
    assert len({tuple(row.tolist()) for row in kept[0]}) == 50
    assert set(kept.unique().tolist()) == {0.0, 1.25}
    assert (kept > 0).float().mean() == pytest.approx(0.8, abs=0.05)
    x = torch.randn(6, 50, 40)
    assert dropout(x, 0.0, module) is x and dropout(x, 0.2, module.eval()) is x


def test_seeding_a_unit_keeps_nothing_for_devices_that_are_not_used() -> None:
    """`torch.manual_seed` would keep a call stack for each of them, in every unit of every micro-batch."""
    kept = [len(kind._queued_calls) for kind in (torch.cuda, torch.xpu, torch.mtia)]
    drawn = []
    for seed, name in [(1, "encoder_block_0"), (1, "encoder_block_0"), (1, "encoder_block_1"), (2, "encoder_block_0")]:
        seed_unit(seed, name)
        drawn.append(torch.rand(3))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2]) and not torch.equal(drawn[0], drawn[3])
    assert [len(kind._queued_calls) for kind in (torch.cuda, torch.xpu, torch.mtia)] == kept


def test_dropout_of_attention_has_one_mask_for_all_queries() -> None:
    """Scores are all equal, and values differ by key: the output of a query is the mask over the keys."""
    length, rows, heads = 16, 3, 2
    nothing = torch.zeros(length, rows, heads, length)
    value = torch.eye(length)[:, None, None, :].expand(length, rows, heads, length)
    one = torch.ones(rows, length, dtype=torch.long)
    dropped = value_dropout(value, 0.5, torch.nn.Module(), TensorParallel())
    masks = KERNELS["plain"](nothing, nothing, dropped, None, Mask(one, one), False).unflatten(2, (heads, length))
    torch.testing.assert_close(masks, masks[:1].expand_as(masks))
    masks = (masks[0] * length).round()
    assert len({tuple(mask.tolist()) for mask in masks.flatten(0, 1)}) == rows * heads
    assert set(masks.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("size", [2, 4])
def test_dropout_of_split_activations_is_that_of_one_process(size: int) -> None:
    """So the parts of the tensor-parallel ranks are drawn independently of each other."""
    module, ranks = torch.nn.Module(), [TensorParallel(PlannedGroup(size, rank)) for rank in range(size)]
    hidden, value = torch.ones(6, 5, 400), torch.ones(30, 5, 8, 16)

    def drawn(parallel: TensorParallel) -> tuple[Tensor, Tensor, Tensor]:
        """What each rank draws for its block, in the order of a block; every rank starts from the same state."""
        torch.manual_seed(3)
        heads, features = (x.shape[2] // parallel.size for x in (value, hidden))
        attention = value_dropout(value[:, :, :heads], 0.2, module, parallel)
        replicated = dropout(hidden, 0.2, module)
        mask = split_mask(hidden[:, :, :features], 0.2, module, parallel)
        return attention, replicated, masked(hidden[:, :, :features], mask)

    alone, each = drawn(TensorParallel()), [drawn(parallel) for parallel in ranks]
    assert torch.equal(torch.cat([found[0] for found in each], dim=2), alone[0])
    assert torch.equal(torch.cat([found[2] for found in each], dim=2), alone[2])
    assert all(torch.equal(found[1], alone[1]) for found in each), "masks of replicated activations are equal"
    kept = [(found[2][0] > 0).float() for found in each]
    assert not torch.equal(kept[0], kept[1])
    # Of n independent draws, the number kept in both halves has mean 0.64 n and deviation sqrt(0.64 x 0.36 n).
    both, number = (kept[0] * kept[1]).sum().item(), kept[0].numel()
    assert abs(both - 0.64 * number) < 4 * (0.64 * 0.36 * number) ** 0.5


@pytest.mark.parametrize("new", [27, 42, 8])
def test_position_embeddings_are_resampled_as_big_vision_does(new: int) -> None:
    position = np.random.default_rng(0).standard_normal((16 * 16, 8)).astype(np.float32)
    grid = scipy.ndimage.zoom(position.reshape(16, 16, 8), (new / 16, new / 16, 1), order=1)
    ours = resample_position(torch.from_numpy(position), new * new)
    torch.testing.assert_close(ours, torch.from_numpy(grid.reshape(new * new, 8)), rtol=1e-5, atol=1e-5)
    same = torch.from_numpy(position)
    assert torch.equal(resample_position(same, 256), same)


def test_patches_are_cut_rows_first_and_the_rest_is_dropped() -> None:
    image = torch.arange(9 * 9 * 3).reshape(1, 9, 9, 3)
    patches = patchify(image, 4)
    assert patches.shape == (1, 4, 48)
    assert torch.equal(patches[0, 1], image[0, :4, 4:8].flatten())
    assert torch.equal(patches[0, 2], image[0, 4:8, :4].flatten())
