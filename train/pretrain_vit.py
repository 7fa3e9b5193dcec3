"""Pretrain the ViT alone, as a classifier of images; the same command resumes the run.

    python -m data.labels root=runs/corpus source=objects
    python -m train.pretrain_vit run.steps=100
    python -m train.pretrain_vit experiment=demo_vit vit=nano run.name=small
    torchrun --nproc_per_node 8 -m train.pretrain_vit vit=giant data=web data.root=/data/shards parallel=zero1 \\
        mixture.detection.weight=0 +mixture.captions='{source: cc3m, objective: captioning, weight: 1}'

A run of `train.pretrain` whose model ends with the ViT's last norm and a classifier's head (`classifier.head`). As
PaLI's ViT was (paper section 3.1; big_vision `train_vit_g.py`), it is trained by sigmoid cross-entropy over label sets.
`weights.vit=RUN` gives the ViT to a run of both towers. docs/towers.md has more.
"""

from dataclasses import fields

from omegaconf import DictConfig

from common.errors import ConfigurationError
from train import pretrain
from train.config import RunConfig
from train.entry import entry

READS = (*(group.name for group in fields(RunConfig) if group.name not in ("mt5", "task")), "experiment=")


def main(composed: DictConfig) -> None:
    """Train one run of a ViT alone."""
    if composed.classifier.head == "none":
        raise ConfigurationError("classifier.head=none is for train.pretrain; choose map or patches.")
    pretrain.main(composed)


if __name__ == "__main__":
    entry("pretrain_vit", main, READS)
