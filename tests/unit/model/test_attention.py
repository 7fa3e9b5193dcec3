"""Attention's pieces: buckets, the fused form, dropout, and position embeddings at another resolution."""

import numpy as np
import pytest
import scipy.ndimage
import torch
from transformers.models.mt5.modeling_mt5 import MT5Attention

from common.errors import ConfigurationError
from model.attention import Mask, dropout, flex_t5_attention, relative_bias, relative_buckets, t5_attention
from model.config import ModelConfig
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
    found = relative_bias(table, MT5, 5, 7, bidirectional, first_query=2)
    assert torch.equal(found, table[theirs].permute(2, 0, 1))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_fused_attention_equals_the_plain_one(bidirectional: bool) -> None:
    batch = micro_batch([[example(1), example(2)], [example(3, images=2)]])
    segments = batch.encoder_segments
    rows, length = segments.shape
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, length, rows, 4, 16, generator=generator)
    table = torch.randn(32, 4, generator=generator)
    mask = Mask(segments, segments, causal=not bidirectional)
    bias = relative_bias(table, MT5, length, length, bidirectional)
    plain = t5_attention(query, key, value, bias, mask.allowed, 0.0)
    with torch.no_grad():
        fused = flex_t5_attention(query, key, value, table, MT5, bidirectional, mask.blocks)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_model_with_fused_attention_has_the_same_loss() -> None:
    rows = [[example(1), example(2, images=0)], [example(3, images=2)]]
    batch = micro_batch(rows, encoder_length=50, decoder_length=16)
    with torch.no_grad():
        plain = small_model()((), batch).loss
        fused = small_model(model=ModelConfig(image_size=MODEL.image_size, z_loss=0.0, attention="flex"))(
            (), batch
        ).loss
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=0)


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


def test_dropout_of_attention_has_one_mask_for_all_queries() -> None:
    """Scores are all equal, and values differ by key: the output of a query is the mask over the keys."""
    length, rows, heads = 16, 3, 2
    nothing = torch.zeros(length, rows, heads, length)
    value = torch.eye(length)[:, None, None, :].expand(length, rows, heads, length)
    everything = torch.ones(rows, 1, length, length, dtype=torch.bool)
    masks = t5_attention(nothing, nothing, value, None, everything, 0.5).unflatten(2, (heads, length))
    assert torch.equal(masks, masks[:1].expand_as(masks))
    assert len({tuple(mask.tolist()) for mask in masks[0].flatten(0, 1)}) == rows * heads
    assert set(masks.unique().tolist()) == {0.0, 2 / length}


def test_dropout_with_fused_attention_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="attention=plain"):
        ModelConfig(attention="flex", dropout_rate=0.1)


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
