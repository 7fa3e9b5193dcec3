"""Fine-tune a model on a task of official files; the same command resumes the run.

    python -m train.finetune task=coco task.root=/data/coco run.initial=runs/paper_3b
    torchrun --nproc_per_node 8 -m train.finetune task=vqav2 task.root=/data/vqa run.initial=runs/stage2@best \\
        task.image_size=588 parallel=zero1
    python -m train.finetune -m sweep=task task=okvqa task.root=/data/okvqa weights.vit=export weights.mt5=export

A run of `train.pretrain` with the settings of conf/finetune.yaml: the task (conf/task) gives files, prompt, resolution
and recipe. docs/finetune.md has more.
"""

from dataclasses import fields

from train.config import RunConfig
from train.entry import entry
from train.pretrain import main

READS = (*(group.name for group in fields(RunConfig) if group.name != "classifier"), "experiment=", "sweep=")


if __name__ == "__main__":
    entry("finetune", main, READS)
