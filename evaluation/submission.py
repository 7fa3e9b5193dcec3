"""Write predictions as the test servers take them: COCO's, VQA's, VizWiz's and SQuAD's format."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.files import write_text
from data.tasks.item import Item


def _id(text: str) -> int | str:
    """Return an id as the task's file has it: a number where it is one."""
    return int(text) if text.isascii() and text.isdigit() and str(int(text)) == text else text


def coco(predictions: Mapping[str, str], items: Sequence[Item]) -> list[dict[str, Any]]:
    """Return `[{image_id, caption}]`, for COCO, NoCaps, TextCaps and VizWiz-Captions."""
    return [{"image_id": _id(item.image_id), "caption": predictions.get(item.id, "")} for item in items]


def vqa(predictions: Mapping[str, str], items: Sequence[Item]) -> list[dict[str, Any]]:
    """Return `[{question_id, answer}]`, for VQAv2, OKVQA, TextVQA and ST-VQA."""
    return [{"question_id": _id(item.id), "answer": predictions.get(item.id, "")} for item in items]


def vizwiz(predictions: Mapping[str, str], items: Sequence[Item]) -> list[dict[str, Any]]:
    """Return `[{image, answer}]`, for VizWiz-VQA (format_for_evalai of facebookresearch/pythia's vizwiz dataset)."""
    return [{"image": item.image, "answer": predictions.get(item.id, "")} for item in items]


def squad(predictions: Mapping[str, str], items: Sequence[Item]) -> dict[str, str]:
    """Return `{id: answer}`, for XQuAD and TyDiQA-GoldP."""
    return {item.id: predictions.get(item.id, "") for item in items}


FORMATS: Mapping[str, Callable[[Mapping[str, str], Sequence[Item]], Any]] = {
    "coco": coco,
    "vqa": vqa,
    "vizwiz": vizwiz,
    "squad": squad,
}


def write_submission(name: str, predictions: Mapping[str, str], items: Sequence[Item], path: Path) -> None:
    """Write the predictions of all items, an empty text where there is none: servers refuse files with gaps."""
    write_text(path, json.dumps(FORMATS[name](predictions, items), ensure_ascii=False))
