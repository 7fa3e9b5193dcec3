"""How sequences and images are divided over the ranks of a group that is not started."""

import pytest
import torch

from model.tensor_parallel import PlannedGroup, TensorParallel


@pytest.mark.parametrize(("length", "missing"), [(8, 0), (9, 3), (11, 1), (1, 3)])
def test_a_sequence_is_padded_to_a_multiple_of_the_ranks(length: int, missing: int) -> None:
    group = PlannedGroup(4, rank=1)
    assert TensorParallel(group, sequence=True).padding(length) == missing
    assert TensorParallel(group).padding(length) == 0


@pytest.mark.parametrize("images", [1, 2, 3, 4, 7, 8, 9])
def test_every_image_is_in_one_share_and_shares_are_equal(images: int) -> None:
    pixels = torch.arange(1, images + 1, dtype=torch.uint8)[:, None].expand(images, 3)
    shares = [TensorParallel(PlannedGroup(4, rank), whole_vit=True).share_images(pixels) for rank in range(4)]
    assert {len(share) for share in shares} == {-(-images // 4)}
    joined = torch.cat(shares)
    assert torch.equal(joined[:images], pixels) and not joined[images:].any()
    assert TensorParallel(PlannedGroup(4, 1)).share_images(pixels) is pixels
