"""Pretrain the ViT alone, as a classifier, in one process.

    python -m train.pretrain_vit experiment=demo
    python -m train.pretrain_vit experiment=demo vit_pretraining.steps=2000 vit_pretraining.output=runs/vit.safetensors
    python -m train.pretrain_vit -m experiment=scaling vit=nano,micro,mini

PaLI's ViT is first trained to classify JFT's images (paper section 3.1; sigmoid cross-entropy as in big_vision
`train_vit_g.py`); a ViT from scratch makes PaLI far worse (the paper's ablation). JFT has a billion images. To learn
from thousands, each patch predicts the words ("red", "circle") in the label of its object and the object's box, so that
one image gives as many targets as it has patches. Boxes are predicted in bins, as in PaLI's detection: with coordinates
as plain numbers, the text model did not learn in thousands of steps to read from the features which of two objects is
on the left.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from rich.progress import track
from torch import Tensor, nn

from common.errors import ConfigurationError, RunStopped
from common.files import beside
from data import fields
from data.error_budget import Ledger
from data.images import decode
from data.objectives.detection import box_bins
from data.shards.source import Record, ShardSource
from data.skip import Skip, one_record
from model.batch import MicroBatch
from model.pali import PaLI, initialize, units
from model.weights import logical_tensors
from model.weights.files import write_tensors
from train.compose import to_run_config
from train.config import RunConfig
from train.entry import entry
from train.run.kept_files import keep_old

LOWER = "give a lower vit_pretraining.learning_rate"
DATA_KEYS = ("data=", "data.root", "data.sources", "data.fields", "data.index_folder", "data.holdout")
READS = ("vit", "vit_pretraining", "model=", "phases", "run.seed", "run.name", "run.folder", *DATA_KEYS)
BINS = 12  # for each of a box's four coordinates
BOX_WEIGHT = 0.25  # weight of a coordinate's loss beside a word's loss of 1


@dataclass(frozen=True)
class Labeled:
    """Hold an image, uint8 [S, S, 3], and the (words, box) of each object in it; a box is in fractions of the image."""

    image: np.ndarray
    objects: Sequence[tuple[set[str], Sequence[float]]]


class Classifier(nn.Module):
    """Classify patches by ViT blocks, a norm, a head: uint8 [I, S, S, 3] -> logits, [N, I, classes + 4 * BINS]."""

    def __init__(self, config: RunConfig, image_size: int, num_classes: int) -> None:
        super().__init__()
        config.model.image_size = image_size
        everything = units(config.pali)
        self.vit = PaLI({n: u for n, u in everything.items() if n == "patches" or n.startswith("vit_block")})
        initialize(self.vit, config.run.seed)
        self.norm = nn.LayerNorm(config.vit.width, eps=1e-6)
        self.head = nn.Linear(config.vit.width, num_classes + 4 * BINS)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of uint8 images [I, S, S, 3]."""
        (tokens,) = self.vit((), _images_only(images))
        return self.head(self.norm(tokens))

    def weights(self) -> dict[str, Tensor]:
        """Return the tensors that PaLI takes over, by logical name: all but the head."""
        norm = {f"bridge.vit_norm.{name}": p.detach() for name, p in self.norm.named_parameters()}
        return {name: tensor.cpu().contiguous() for name, tensor in (logical_tensors(self.vit) | norm).items()}


def main(composed: DictConfig) -> None:
    """Train, and write the weights to `vit_pretraining.output`."""
    config = to_run_config(composed, weights=False)
    settings, size = config.vit_pretraining, next(iter(config.phases.values())).image_size or config.model.image_size
    if config.run.rehearse:
        raise ConfigurationError("run.rehearse=true is for train.pretrain alone; leave it out here.")
    if size % config.vit.patch_size:
        raise ConfigurationError(f"image_size={size} must be a multiple of vit.patch_size={config.vit.patch_size}.")
    output = Path(settings.output)
    _check_writable(output)
    torch.set_num_threads(os.cpu_count() or 1)
    data = config.data
    ledger = Ledger(data.error_budget, data.error_budget_minimum, data.error_window)
    options = data.read_options(settings.source)
    source = ShardSource(settings.source, data.location(settings.source), "train", ledger, options)
    decode_image = partial(
        decode, size=size, max_megapixels=data.max_megapixels, exif_orientation=data.exif_orientation
    )
    grid = size // config.vit.patch_size
    found = list(_labeled(source, decode_image, ledger))
    if not found:
        raise ConfigurationError(f"vit_pretraining.source={settings.source} has no image with objects; name another.")
    records = [each for each in found if any(all(map(len, _inside(box, grid))) for _, box in each.objects)]
    if not records:
        raise ConfigurationError(
            f"vit_pretraining.source={settings.source} has no object as large as a patch of {config.vit.patch_size} of "
            f"{size} pixels; name another."
        )
    words = sorted({word for record in records for found, _ in record.objects for word in found})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier = Classifier(config, size, len(words)).to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    rng = np.random.default_rng(config.run.seed)
    right: list[float] = []
    for step in track(range(settings.steps), f"ViT: {len(words)} classes, {len(records)} images"):
        chosen = [records[i] for i in rng.integers(len(records), size=settings.batch)]
        images = torch.from_numpy(np.stack([record.image for record in chosen]))
        targets = [_targets(record, words, grid) for record in chosen]
        loss, share = _judge(classifier(images.to(device)), torch.from_numpy(np.stack(targets, 1)).to(device))
        if not math.isfinite(loss.item()):
            raise RunStopped(f"The ViT's loss is not finite at step {step + 1}, so {output} is not written; {LOWER}.")
        optimizer.param_groups[0]["lr"] = settings.learning_rate * _schedule(step, settings.steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right.append(share)
    try:
        with beside(output) as partial_file:
            write_tensors(classifier.weights(), partial_file)
            kept = keep_old(output, partial_file)
    except ValueError as error:  # a weight is not finite after the last update
        raise RunStopped(f"After step {settings.steps} {error.args[0].rstrip('.')}; {LOWER}.") from error
    if kept is not None:
        print(f"{kept}: the file that was there")
    print(f"{output}: all words right at {np.mean(right[-20:]):.1%} of the last patches")


def _check_writable(output: Path) -> None:
    """Make the folder of `output`. Raise ConfigurationError before the training where no file can be written."""
    if output.is_dir():
        raise ConfigurationError(f"vit_pretraining.output={output} is a folder; name a file in it.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise ConfigurationError(
            f"vit_pretraining.output={output} cannot be written ({error.strerror}); choose another."
        ) from error


def _schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate: linear warm-up over 50 steps, linear decay over the last fifth."""
    return min(1.0, (step + 1) / 50, (steps - step) / (0.2 * steps))


def _labeled(source: ShardSource, decode_image: Callable[[bytes], np.ndarray], ledger: Ledger) -> Iterator[Labeled]:
    """Yield every record of the source that has an image and objects with boxes; a broken one costs budget."""
    for number in range(len(source)):
        try:
            with one_record("the ViT's pretraining"):
                record: Record = source[number]
                found = fields.objects(record.fields, boxes=True)
                objects = [(set(each.label.split()), each.box) for each in found if each.box is not None]
                if record.image is None or not objects:
                    raise Skip("no image with boxes")
                image = decode_image(record.image)
        except Skip as skip:
            if not skip.defect:
                ledger.count_skip(source.name, skip.cause)
            else:
                place = f"record {source.key(number)!r:.100}: {skip.detail}"
                ledger.count_defect(source.name, source.shard(number), skip.cause, place)
        else:
            ledger.count_used(source.name)
            yield Labeled(image, objects)


def _targets(record: Labeled, words: Sequence[str], grid: int) -> np.ndarray:
    """Return fp32 [grid * grid, words + 4 * BINS]: 1 for words and bins of the box of the object in a patch."""
    targets = np.zeros((grid, grid, len(words) + 4 * BINS), np.float32)
    for found, box in record.objects:
        bins = np.eye(BINS)[box_bins(box, BINS)]
        targets[np.ix_(*_inside(box, grid))] = [*(float(word in found) for word in words), *bins.flatten()]
    return targets.reshape(grid * grid, -1)


def _inside(box: Sequence[float], grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows and columns of the patches whose centers are in a box, or at most a third of a patch outside."""
    center, near = (np.arange(grid) + 0.5) / grid, 1 / (3 * grid)
    rows, columns = (
        np.flatnonzero((center > low - near) & (center < high + near))
        for low, high in ((box[0], box[2]), (box[1], box[3]))
    )
    return rows, columns


def _judge(output: Tensor, targets: Tensor) -> tuple[Tensor, float]:
    """Return (loss per image, share of patches with all words right) of two [N, I, words + 4 * BINS]."""
    (logits, box_logits), (named, bins) = (x.tensor_split([-4 * BINS], -1) for x in (output, targets))
    objects = named.any(-1)
    words = F.binary_cross_entropy_with_logits(logits, named, reduction="sum")
    box_logits, bins = (x[objects].view(-1, BINS) for x in (box_logits, bins))
    boxes = F.cross_entropy(box_logits, bins, reduction="sum")
    right = ((logits > 0) == (named > 0)).all(-1).float().mean()
    return (words + BOX_WEIGHT * boxes) / output.shape[1], float(right)


def _images_only(images: Tensor) -> MicroBatch:
    nothing = torch.zeros(1, 1, dtype=torch.long, device=images.device)
    return MicroBatch(images, nothing, nothing, nothing, nothing, nothing, nothing, nothing)


if __name__ == "__main__":
    entry("pretrain", main, READS)
