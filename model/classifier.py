"""The last unit of a ViT that is pretrained alone: it classifies images, or each patch of them.

Targets are those of PaLI's rows, with a list of labels as the tokenizer: `decoder_targets` of an example are ids of the
labels in its target text, and an example has one image. Id `FIRST` + k is class k, and id `FIRST` + classes + v the
number v of a coordinate (`data.labels`). The loss is a sum over images, so `PaLIConfig.num_targets` counts images.
Every tensor-parallel rank holds the head whole: beside ViT-e's blocks it takes 3 % of the parameters, and next to no
FLOPs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, empty, nn

from model.attention.kernels import split_heads, vit_attention
from model.batch import MicroBatch
from model.config import ClassifierConfig, ViTConfig
from model.costs import BatchShape, Cost, Unit, attention_flops, linear_flops
from model.initializers import Initializer, constant, fan_in_truncated, normal, xavier_uniform, zeros
from model.layers import Linear, describe_replicated
from model.loss import logits_fp32, totals_by_objective
from model.mt5 import HeadOutput
from model.norms import LayerNorm
from model.tensor_parallel import TensorParallel

FIRST = 3  # ids before it are pad, EOS and unknown
COORDINATES = 1000  # a coordinate is a number below it (data/objectives/detection.py)
BINS = 24  # of a coordinate that a patch predicts: narrower than half the difference of two sizes of the demo's shapes
BOX_WEIGHT = 0.25  # of a coordinate's loss beside a label's loss of 1


class Targets(NamedTuple):
    """The targets of a micro-batch, flattened: T = B * M positions of the decoder's rows; I image slots."""

    ids: Tensor  # int64 [T]
    slot: Tensor  # int64 [T]: the image of the position's example; I where there is none
    used: Tensor  # bool [I]: an example has the image
    objective: Tensor  # int64 [I]


class Classifier(Unit):
    """Common part of both heads: which image each target belongs to, and the totals."""

    gives_loss = True

    def __init__(
        self,
        vit: ViTConfig,
        image_size: int,
        config: ClassifierConfig,
        num_objectives: int,
        parallel: TensorParallel,
    ) -> None:
        super().__init__()
        self.vit, self.config, self.num_objectives, self.parallel = vit, config, num_objectives, parallel
        self.tokens, self.num_classes = vit.num_tokens(image_size), config.num_classes

    def linear(
        self, d_in: int, d_out: int, weight_init: Initializer = xavier_uniform, bias_init: float = 0.0
    ) -> Linear:
        """Make a linear map with big_vision's first values, or others."""
        made = Linear(d_in, d_out, weight_init=weight_init, partial_gradient=False)
        describe_replicated(made.bias, "bias", constant(bias_init))
        return made

    def patches(self, carry: tuple[Tensor, ...]) -> Tensor:
        """(vision,) -> all patches of all images, [N, I, width]."""
        return self.parallel.gather(carry[0], partial_gradient=False)[: self.tokens]

    def targets(self, batch: MicroBatch) -> Targets:
        """Find the image of each target: the one of the encoder's segment of the same number."""
        images, (rows, length) = len(batch.images), batch.decoder_targets.shape
        slots = torch.where(batch.visual_index >= 0, batch.visual_index // self.tokens, -1)
        by_segment = slots.new_full((rows, length + 1), -1)  # an example has a target, so no row has more segments
        by_segment.scatter_reduce_(1, batch.encoder_segments.clamp(max=length), slots, "amax")
        slot = by_segment.gather(1, batch.decoder_segments)
        slot = torch.where((batch.decoder_segments > 0) & (slot >= 0), slot, images).flatten()
        used = torch.zeros(images + 1, dtype=torch.bool, device=slot.device)
        used[slot] = True
        objective = slot.new_zeros(images + 1)
        objective[slot] = batch.objectives.flatten()
        return Targets(batch.decoder_targets.flatten(), slot, used[:images], objective[:images])

    def output(self, losses: Tensor, correct: Tensor, targets: Targets, loss_scale: float) -> HeadOutput:
        """Return the results for the loss and the correctness, 0 to 1, of every image slot, fp32 [I] each."""
        used = targets.used.float()
        loss = (losses * used).sum()
        with torch.no_grad():
            statistics = torch.stack([losses.detach() * used, torch.zeros_like(used), correct * used])
            totals = totals_by_objective(statistics, targets.objective, self.num_objectives)
            totals[3] = totals.new_zeros(self.num_objectives).index_add_(0, targets.objective, used)
        return HeadOutput(loss_scale * loss, totals, statistics)


class MapHead(Classifier):
    """Multi-head attention pooling, then the classes (big_vision `models/vit.py::MAPHead`).

    The loss of an image is the sigmoid cross-entropy of its labels, summed over the classes (`utils.sigmoid_xent`). It
    counts as correct where the class of the largest logit is among the labels.
    """

    def __init__(self, vit: ViTConfig, *others: object) -> None:
        super().__init__(vit, *others)  # type: ignore[arg-type]
        d = vit.width
        self.probe = nn.Parameter(empty(1, d))
        describe_replicated(self.probe, "probe", xavier_uniform)
        self.query, self.key, self.value, self.out = (self.linear(d, d) for _ in range(4))
        self.mlp_norm = LayerNorm(d, partial_gradient=False)
        self.mlp_in, self.mlp_out = self.linear(d, vit.mlp_dim), self.linear(vit.mlp_dim, d)
        for layer in (self.mlp_in, self.mlp_out):
            describe_replicated(layer.bias, "bias", normal(1e-6))
        self.classes = self.linear(d, self.num_classes, zeros, self.config.bias)

    def forward(self, carry: tuple[Tensor, ...], batch: MicroBatch, loss_scale: float = 1.0) -> HeadOutput:
        """(vision [N, I, width],) -> (loss, totals, statistics of every image slot); `loss_scale` multiplies it."""
        patches, targets = self.patches(carry), self.targets(batch)
        logits = logits_fp32(self.pooled(patches), self.classes.weight) + self.classes.bias.float()
        images = logits.shape[0]
        label = targets.ids - FIRST
        at = torch.where((label >= 0) & (label < self.num_classes), targets.slot, images)
        wanted = logits.new_zeros(images + 1, self.num_classes)
        wanted[at, label.clamp(0, self.num_classes - 1)] = 1.0
        losses = F.binary_cross_entropy_with_logits(logits, wanted[:images], reduction="none").sum(1)
        correct = wanted[:images].gather(1, logits.detach().argmax(1, keepdim=True)).squeeze(1)
        return self.output(losses, correct, targets, loss_scale)

    def pooled(self, patches: Tensor) -> Tensor:
        """[N, I, width] -> [I, width]."""
        head_dim = self.vit.width // self.vit.num_heads
        query = self.query(self.probe).unsqueeze(1).expand(1, patches.shape[1], -1)
        heads = (split_heads(x, head_dim) for x in (query, self.key(patches), self.value(patches)))
        x = self.out(vit_attention(*heads))
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        return (x + self.mlp_out(hidden)).squeeze(0)

    def cost(self, shape: BatchShape) -> Cost:
        """See Unit.cost. Kept: the patches, keys and values; of each image, some vectors and its logits."""
        d, m, c, tokens = self.vit.width, self.vit.mlp_dim, self.num_classes, shape.images * shape.vision_tokens
        flops = (
            linear_flops(tokens, d, 2 * d)
            + linear_flops(shape.images, d, 2 * d + 2 * m + c)
            + attention_flops(shape.images, 1, shape.vision_tokens, d)
        )
        kept = shape.element_bytes * (3 * tokens * d + shape.images * (6 * d + 2 * m)) + 8 * shape.images * c
        return Cost(4 * d * d + 2 * d * m + 8 * d + m + (d + 1) * c, flops, kept)


class PatchHead(Classifier):
    """One answer of each patch: the labels of the object in it, and the object's box in bins.

    One image gives as many targets as it has patches, so a ViT learns from thousands of images what takes a classifier
    of whole images a billion. Boxes are predicted in bins, as in PaLI's detection: with coordinates as plain numbers, a
    text model did not learn in thousands of steps to read from the features which of two objects is on the left. The
    target is that of detection, `ymin xmin ymax xmax label ...`. A patch belongs to the last object whose box its
    center is in, or at most a third of a patch outside. The accuracy is the share of patches with all labels right.
    """

    def __init__(self, vit: ViTConfig, *others: object) -> None:
        super().__init__(vit, *others)  # type: ignore[arg-type]
        # Zeros, as of MapHead's classes, would keep gradients from the blocks in the first steps -> after 600 steps of
        # the demo a ViT named colors, and neither shapes nor places.
        self.labels = self.linear(vit.width, self.num_classes, fan_in_truncated, self.config.bias)
        self.boxes = self.linear(vit.width, 4 * BINS, fan_in_truncated)

    def forward(self, carry: tuple[Tensor, ...], batch: MicroBatch, loss_scale: float = 1.0) -> HeadOutput:
        """(vision [N, I, width],) -> (loss, totals, statistics of every image slot); `loss_scale` multiplies it."""
        patches, targets = self.patches(carry), self.targets(batch)
        logits = self.labels(patches).float().transpose(0, 1)  # [I, N, classes]
        boxes = self.boxes(patches).float().transpose(0, 1).unflatten(-1, (4, BINS))
        wanted, bins, owned = self.patch_targets(targets, batch)
        losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").sum((1, 2))
        of_boxes = F.cross_entropy(boxes.flatten(0, 2), bins.flatten(), reduction="none").view_as(bins).sum(2)
        losses = losses + BOX_WEIGHT * (of_boxes * owned).sum(1)
        correct = ((logits > 0) == (wanted > 0)).all(2).float().mean(1)
        return self.output(losses, correct, targets, loss_scale)

    @torch.no_grad()
    def patch_targets(self, targets: Targets, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return (labels [I, N, classes], bins of boxes int64 [I, N, 4], whether an object is in the patch [I, N])."""
        images, device = len(batch.images), targets.ids.device
        ids, place = targets.ids, torch.arange(targets.ids.numel(), device=device)
        number = ids - FIRST - self.num_classes
        # An object is named by the position of its last coordinate: the newest one at or before each position.
        newest = torch.where(number >= 0, place, -1).cummax(0).values.clamp(min=3)
        four = newest.unsqueeze(1) + torch.arange(-3, 1, device=device)  # [T, 4]
        box, whole = number[four], (number[four] >= 0).all(1) & (targets.slot[four] == targets.slot.unsqueeze(1)).all(1)
        label = ids - FIRST
        named = whole & (label >= 0) & (label < self.num_classes)
        inside = self.inside((box + 0.5) / COORDINATES) & named.unsqueeze(1)  # [T, N]
        owner = place.new_full((images + 1, self.tokens), -1)
        at = targets.slot.unsqueeze(1).expand(-1, self.tokens)
        owner.scatter_reduce_(0, at, torch.where(inside, newest.unsqueeze(1), -1), "amax")
        owns = inside & (owner[targets.slot] == newest.unsqueeze(1))
        wanted = torch.zeros(images + 1, self.num_classes, self.tokens, device=device)
        wanted.index_put_((targets.slot, label.clamp(0, self.num_classes - 1)), owns.float(), accumulate=True)
        bins = (box * BINS // COORDINATES).clamp(0, BINS - 1)[owner[:images].clamp(min=0)]
        return wanted[:images].clamp(max=1).transpose(1, 2), bins, owner[:images] >= 0

    def inside(self, box: Tensor) -> Tensor:
        """Boxes [T, 4] (ymin, xmin, ymax, xmax; fractions of the image) -> bool [T, N], the patches that they hold."""
        grid = round(self.tokens**0.5)
        center, near = (torch.arange(grid, device=box.device) + 0.5) / grid, 1 / (3 * grid)
        low, high = box[:, :2, None] - near, box[:, 2:, None] + near
        rows, columns = ((center > low) & (center < high)).unbind(1)
        return (rows.unsqueeze(2) & columns.unsqueeze(1)).flatten(1)

    def cost(self, shape: BatchShape) -> Cost:
        """See Unit.cost. Kept: the patches, and the logits with their targets in fp32."""
        d, outputs, tokens = self.vit.width, self.num_classes + 4 * BINS, shape.images * shape.vision_tokens
        kept = tokens * (shape.element_bytes * d + 8 * outputs)
        return Cost((d + 1) * outputs, linear_flops(tokens, d, outputs), kept)


CLASSIFIERS: dict[str, type[Classifier]] = {"map": MapHead, "patches": PatchHead}
