"""Take what a fine-tuning leaves open from its task: the task's items as a source, and the shape of rows."""

import math
from collections.abc import Sequence
from typing import Any

from common.errors import ConfigurationError
from model.config import ModelConfig

OWN = "${task.name}"  # source of a component that trains on the task of the command line
MULTIPLE = 16  # positions that a row's length is a multiple of
# First score of the metrics that give several.
FIRST_SCORE = {"bleu": "bleu_4", "squad": "f1", "xm3600": "cider_characters", "top_k": "top_1"}
STREAMS = 64  # most streams of a step, and so most data-parallel ranks


def take_from_task(plain: dict[str, Any], task: dict[str, Any]) -> None:
    """Add the task to `data.tasks`, and fill `data.encoder_length` and `data.num_streams` where they are null.

    `plain`: composed settings, whose towers have their sizes. `task`: its task with values in place of interpolations.
    A row holds one image and `task.recipe.text_length` positions of text. Raises ConfigurationError where a component
    trains on a task and there is none.
    """
    data, mixture = plain.get("data") or {}, plain.get("mixture") or {}
    tasks, sources = data.get("tasks") or {}, [(one or {}).get("source") for one in mixture.values()]
    if OWN in sources and not task.get("name"):
        raise ConfigurationError("task is not given; choose one (task=coco; conf/task has them).")
    if OWN in sources or (task.get("name") in sources and task["name"] not in tasks):
        data["tasks"] = tasks | {task["name"]: task}  # that of a saved run stays: an evaluation may have other files
    if "encoder_length" in data and data["encoder_length"] is None:
        size, patch = task.get("image_size") or ModelConfig.image_size, int(plain["vit"]["patch_size"])
        positions = (size // patch) ** 2 + task["recipe"]["text_length"]
        data["encoder_length"] = -(-positions // MULTIPLE) * MULTIPLE
    if "num_streams" in data and data["num_streams"] is None:
        size = data["global_batch_size"]
        data["num_streams"] = math.gcd(STREAMS, task["recipe"]["batch_size"] if isinstance(size, str) else int(size))


def score_name(task: str, metrics: Sequence[str]) -> str:
    """Return the name in metrics.jsonl of a task's first score, which chooses the best checkpoint."""
    return f"validation/{task}/{FIRST_SCORE.get(metrics[0], metrics[0])}" if metrics else "validation/loss"
