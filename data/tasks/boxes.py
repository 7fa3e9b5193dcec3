"""Read COCO's detection annotations, and RefCOCO in their form: one item an image, whose references are its boxes."""

from typing import Any

from data.tasks.config import TaskConfig
from data.tasks.item import Item, distinct, get, read_json, text


def coco_detection(config: TaskConfig) -> list[Item]:
    """Return an item of each image; {text} is its `caption`, else the labels of all categories, joined by " and ".

    MDETR's files of RefCOCO have a caption, the phrase, and one box.

    `extra` has `height` and `width` in pixels, and `boxes`: [label, ymin, xmin, ymax, xmax] in pixels. Crowds are left
    out.
    """
    (file,) = config.files
    content = read_json(file)
    labels = {get(file, one, "id"): text(file, one, "name") for one in get(file, content, "categories")}
    boxes: dict[Any, list[list[Any]]] = {}
    for one in get(file, content, "annotations"):
        if not one.get("iscrowd"):
            left, top, width, height = get(file, one, "bbox")
            box = [labels[get(file, one, "category_id")], top, left, top + height, left + width]
            boxes.setdefault(get(file, one, "image_id"), []).append(box)
    every = " and ".join(labels.values())
    items = (
        Item(
            id=text(file, image, "id"),
            references=tuple(" ".join(map(str, [*box[1:], box[0]])) for box in boxes.get(image["id"], ())),
            text=str(image.get("caption", every)),
            image=text(file, image, "file_name"),
            image_id=str(image["id"]),
            language=config.language,
            extra={key: get(file, image, key) for key in ("height", "width")} | {"boxes": boxes.get(image["id"], [])},
        )
        for image in get(file, content, "images")
    )
    return distinct(items, file)
