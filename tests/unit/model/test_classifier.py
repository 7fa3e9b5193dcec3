"""The heads of a ViT alone: pooling as SigLIP's, losses by their definition, targets from the rows."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model.batch import MicroBatch
from model.classifier import BINS, BOX_WEIGHT, FIRST, Classifier, MapHead, PatchHead
from model.config import ClassifierConfig, ViTConfig
from model.costs import BatchShape
from model.pali import initialize
from model.tensor_parallel import TensorParallel

VIT = ViTConfig(width=32, depth=1, mlp_dim=48, num_heads=4, patch_size=14)
CLASSES, OBJECTIVES = 5, 3
TOKENS = 4  # of 28 px


def head(kind: type[Classifier]) -> Classifier:
    made = kind(VIT, 28, ClassifierConfig(bias=-1.0, num_classes=CLASSES), OBJECTIVES, TensorParallel())
    initialize(made, 0, "classifier")
    generator = torch.Generator().manual_seed(0)
    for p in made.parameters():  # zeros hide mistakes
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return made


def batch(texts: list[list[int]], slots: list[int], num_images: int = 3) -> MicroBatch:
    """One row of examples with these target ids, and the images of these slots."""
    n = len(texts)
    segments = torch.arange(1, n + 1).repeat_interleave(TOKENS + 1)
    visual = torch.stack([torch.tensor([*(slot * TOKENS + i for i in range(TOKENS)), -1]) for slot in slots])
    lengths = torch.tensor([len(text) + 1 for text in texts])
    targets = torch.tensor([id for text in texts for id in (*text, 1)])
    decoder = torch.arange(1, n + 1).repeat_interleave(lengths)
    objectives = torch.arange(n).repeat_interleave(lengths)
    rows = (torch.zeros_like(segments), segments, visual.flatten(), torch.zeros_like(targets), targets, decoder)
    images = torch.zeros(num_images, 28, 28, 3, dtype=torch.uint8)
    return MicroBatch(images, *(F.pad(x, (0, 2))[None] for x in rows), F.pad(objectives, (0, 2))[None])


def test_the_pooling_is_that_of_siglip() -> None:
    from transformers import SiglipVisionConfig
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    ours = head(MapHead)
    assert isinstance(ours, MapHead)
    config = SiglipVisionConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4)
    theirs = SiglipMultiheadAttentionPoolingHead(config)
    three = ours.query, ours.key, ours.value
    theirs.load_state_dict({
        "probe": ours.probe[None],
        "attention.in_proj_weight": torch.cat([x.weight for x in three]),
        "attention.in_proj_bias": torch.cat([x.bias for x in three]),
        **{f"attention.out_proj.{k}": getattr(ours.out, k) for k in ("weight", "bias")},
        **{f"layernorm.{k}": getattr(ours.mlp_norm, k) for k in ("weight", "bias")},
        **{f"mlp.fc1.{k}": getattr(ours.mlp_in, k) for k in ("weight", "bias")},
        **{f"mlp.fc2.{k}": getattr(ours.mlp_out, k) for k in ("weight", "bias")},
    })  # fmt: skip
    patches = torch.randn(TOKENS, 3, 32)
    torch.testing.assert_close(ours.pooled(patches), theirs(patches.transpose(0, 1)), rtol=1e-5, atol=1e-6)


def test_sigmoid_cross_entropy_of_label_sets() -> None:
    """Two images in slots out of order; slot 1 is empty, ids that are no label count nothing."""
    ours, patches = head(MapHead), torch.randn(TOKENS, 3, 32)
    labels = {2: [0, 3], 0: [4]}
    rows = batch([[FIRST, FIRST + 3, FIRST + 3], [2, FIRST + 4, FIRST + CLASSES + 7]], [2, 0])
    with torch.no_grad():
        loss, totals, _ = ours((patches,), rows, 0.5)
    assert isinstance(ours, MapHead)
    logits = ours.classes(ours.pooled(patches)).detach()
    losses, right = {}, {}
    for slot, own in labels.items():
        wanted = torch.tensor([float(c in own) for c in range(CLASSES)])
        p = logits[slot].sigmoid()
        losses[slot] = float(-(wanted * p.log() + (1 - wanted) * (1 - p).log()).sum())
        right[slot] = float(int(logits[slot].argmax()) in own)
    assert float(loss) == pytest.approx(0.5 * sum(losses.values()), rel=1e-5)
    expected = [[losses[2], losses[0], 0], [0] * 3, [right[2], right[0], 0], [1, 1, 0]]
    torch.testing.assert_close(totals, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_rows_without_an_example_have_a_gradient_of_zero() -> None:
    for kind in (MapHead, PatchHead):
        ours, patches = head(kind), torch.randn(TOKENS, 3, 32, requires_grad=True)
        loss, totals, _ = ours((patches,), batch([[FIRST]], [0]).emptied())
        loss.backward()
        assert float(loss) == 0 and not totals.any() and patches.grad is not None and not patches.grad.any()


def patch_targets(*texts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    ours, rows = head(PatchHead), batch([*texts], list(range(len(texts))))
    assert isinstance(ours, PatchHead)
    return ours.patch_targets(ours.targets(rows), rows)


def box(*coordinates: float) -> list[int]:
    return [FIRST + CLASSES + min(int(1000 * x), 999) for x in coordinates]


def test_a_patch_names_words_and_box_of_its_object() -> None:
    """Of two images; coordinates in their order, and those of 24 bins; the last object of a patch counts."""
    star = [*box(0, 0.5, 0.49, 1), FIRST + 1, FIRST + 2]  # ymin, xmin, ymax, xmax: the upper right quarter
    whole = [*box(0, 0, 1, 1), FIRST]
    labels, bins, owned = patch_targets(star, [*whole, *star], [*star[:3], FIRST])
    (upper_left, upper_right, *lower), second = labels[0].tolist(), labels[1].tolist()
    assert not any(upper_left) and not any(map(any, lower)) and upper_right == [0, 1, 1, 0, 0]
    assert owned[0].tolist() == [False, True, False, False] and bins[0, 1].tolist() == [0, 12, 11, BINS - 1]
    assert second == [[1, 0, 0, 0, 0], [0, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]] and owned[1].all()
    assert bins[1].tolist() == [[0, 0, 23, 23], [0, 12, 11, 23], [0, 0, 23, 23], [0, 0, 23, 23]]
    assert not labels[2].any() and not owned[2].any(), "three coordinates are no box, nor with another image's"


def test_the_loss_of_patches() -> None:
    ours = head(PatchHead)
    for p in ours.parameters():
        p.data.zero_()
    rows = batch([[*box(0, 0, 1, 1), FIRST]], [1])
    loss, totals, _ = ours((torch.randn(TOKENS, 3, 32),), rows)
    expected = TOKENS * (CLASSES * math.log(2) + BOX_WEIGHT * 4 * math.log(BINS))
    assert float(loss) == pytest.approx(expected) and totals[:, 0].tolist() == pytest.approx([expected, 0, 0, 1])


@pytest.mark.parametrize("kind", [MapHead, PatchHead])
def test_counted_flops_are_what_torch_counts(kind: type[Classifier]) -> None:
    own, images = head(kind), batch([[FIRST]], [0])
    patches = torch.randn(TOKENS, 3, 32)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        own((patches,), images)
    shape = BatchShape(3, TOKENS, 1, TOKENS + 1, 2, 4)
    once = 2 * 2 * 32 * 32 if kind is MapHead else 0  # the query is one for all images; the cost has one for each
    assert counter.get_total_flops() == own.cost(shape).flops - once
    twice = own.cost(replace(shape, images=6))
    assert (twice.flops, twice.activation_bytes) == (2 * own.cost(shape).flops, 2 * own.cost(shape).activation_bytes)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (MapHead, 4 * (3 * 12 * 32 + 3 * (6 * 32 + 2 * 48)) + 8 * 3 * CLASSES),
        (PatchHead, 12 * (4 * 32 + 8 * (CLASSES + 4 * BINS))),
    ],
)
def test_kept_bytes_are_no_less_than_autograd_keeps(kind: type[Classifier], expected: int) -> None:
    own, images = head(kind), batch([[FIRST]], [0])
    parameters = {p.untyped_storage().data_ptr() for p in own.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in parameters and x.dtype == torch.float32:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        own((torch.randn(TOKENS, 3, 32, requires_grad=True),), images)
    assert own.cost(BatchShape(3, TOKENS, 1, TOKENS + 1, 2, 4)).activation_bytes == expected
    assert sum(kept.values()) <= expected < 2 * sum(kept.values())
