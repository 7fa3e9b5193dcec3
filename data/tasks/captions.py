"""Read caption files: COCO's (also NoCaps, VizWiz-Captions), Karpathy's splits of COCO, Crossmodal-3600."""

from collections.abc import Iterator

from data.tasks.config import TaskConfig
from data.tasks.item import Item, distinct, get, no_strangers, read_json, text


def coco_captions(config: TaskConfig) -> list[Item]:
    """Return an item of each of `images`, with all captions of `annotations` that are not rejected.

    The item's id is the image's. NoCaps' `domain` is its group.
    """
    (file,) = config.files
    content = read_json(file)
    captions: dict[str, list[str]] = {}
    for annotation in content.get("annotations", ()) if isinstance(content, dict) else ():
        image_id = text(file, annotation, "image_id")
        captions.setdefault(image_id, [])
        if not annotation.get("is_rejected"):  # VizWiz marks captions of annotators who gave none
            captions[image_id].append(text(file, annotation, "caption"))
    items = [
        Item(
            id=text(file, image, "id"),
            references=tuple(captions.get(str(image["id"]), ())),
            image=str(image.get("file_name", "")),
            image_id=str(image["id"]),
            language=config.language,
            group=str(image.get("domain", "")),
        )
        for image in get(file, content, "images")
    ]
    no_strangers("captions", file, captions.keys() - {item.id for item in items}, "images", file)
    return distinct(items, file)


def karpathy(config: TaskConfig) -> list[Item]:
    """Return an item of each image of `split` in `dataset_coco.json`; `val` does not include `restval`."""
    (file,), splits = config.files, config.split.split("+")
    items = (
        Item(
            id=text(file, image, "cocoid", "imgid"),
            references=tuple(text(file, sentence, "raw") for sentence in get(file, image, "sentences")),
            image="/".join(filter(None, (image.get("filepath"), get(file, image, "filename")))),
            image_id=text(file, image, "cocoid", "imgid"),
            language=config.language,
        )
        for image in get(file, read_json(file), "images")
        if get(file, image, "split") in splits
    )
    return distinct(items, file)


def textcaps(config: TaskConfig) -> list[Item]:
    """Return an item of each image of TextCaps' `data`, which has a row a caption; a test file has no captions.

    Fields: `image_id`, `caption_str`, `reference_strs` (big_vision's `datasets/textcaps` at 0127fb6; MMF's dataset).
    """
    (file,) = config.files
    found: dict[str, tuple[str, list[str]]] = {}
    for row in get(file, read_json(file), "data"):
        image_id = text(file, row, "image_id")
        _, captions = found.setdefault(image_id, (str(row.get("image_path", image_id)), []))
        for caption in row.get("reference_strs") or filter(None, [row.get("caption_str")]):
            if str(caption) not in captions:
                captions.append(str(caption))
    items = (Item(id_, tuple(own), "", path, id_, config.language) for id_, (path, own) in found.items())
    return distinct(items, file)


def xm3600(config: TaskConfig) -> list[Item]:
    """Return an item of each image and language of `captions.jsonl`; references are the tokenized captions."""
    (file,) = config.files
    return distinct(_xm3600_items(file, read_json(file)), file)


def _xm3600_items(file: str, images: list[dict[str, object]]) -> Iterator[Item]:
    for image in images:
        key = text(file, image, "image/key")
        for language, captions in image.items():
            if isinstance(captions, dict) and "caption" in captions:
                references = captions.get("caption/tokenized") or captions["caption"]
                yield Item(f"{key}/{language}", tuple(map(str, references)), "", key, key, language, language)
