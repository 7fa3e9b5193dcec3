"""Read folders of images by class: ImageNet, and its variants V2, R, A, Sketch and ObjectNet."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError
from common.progress import beat
from data.tasks.config import TaskConfig
from data.tasks.item import Item, distinct, read_json

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def image_folder(config: TaskConfig) -> list[Item]:
    """Return an item of each image in `images`/<class>/, whose references are the names of its class.

    The first file has the classes, {"0": ["n01440764", "tench"], …} (Keras' `imagenet_class_index.json`) or {folder:
    name}; folders are named by either key, as ImageNet's and V2's are. A second file, {folder: [names or keys]}, is for
    sets with folders of their own (ObjectNet's `objectnet_to_imagenet_1k`); other folders are left out. An id is the
    path below `images`.
    """
    names, folders = (
        class_names(config.files[0]),
        dict[str, Any](read_json(config.files[1]) if config.files[1:] else {}),
    )
    return distinct(_items(config, names, folders), str(Path(config.root, config.images)))


def class_names(file: str) -> dict[str, str]:
    """Return the name of each class by its keys. Raises ConfigurationError for a file of another form."""
    content = read_json(file)
    found: dict[str, str] = {}
    for key, value in content.items() if isinstance(content, Mapping) else ():
        keys = [str(key), str(value[0])] if isinstance(value, list) and len(value) == 2 else [str(key)]
        found |= dict.fromkeys(keys, str(value[-1] if isinstance(value, list) else value).replace("_", " "))
    if not found:
        raise ConfigurationError(
            f'task.files: {file} holds no classes; give JSON as {{"0": ["n01440764", "tench"]}} or '
            '{"n01440764": "tench"}.'
        )
    return found


def choices(config: TaskConfig) -> list[str]:
    """Return the texts that a prediction is chosen of: `task.choices`, else all names of the class file."""
    if config.choices or config.format != "image_folder":
        return list(dict.fromkeys(config.choices))
    return list(dict.fromkeys(class_names(str(Path(config.root, config.files[0]))).values()))


def _items(config: TaskConfig, names: Mapping[str, str], folders: Mapping[str, Any]) -> Iterator[Item]:
    root = Path(config.root, config.images)
    if not root.is_dir():
        raise ConfigurationError(f"task.images: {root} is no folder; name that of the folders of the classes.")
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        beat(f"listing {folder}")
        if folders and folder.name not in folders:
            continue  # ObjectNet has classes that ImageNet lacks
        own = folders.get(folder.name, folder.name)
        keys = [str(key) for key in (own if isinstance(own, list) else [own])]
        right = tuple(dict.fromkeys(names.get(key, key) for key in keys))
        if not set(right) <= set(names.values()):
            raise ConfigurationError(
                f"task.files: the folder {folder} is no class of {config.files[0]}; name the file of its classes."
            )
        for image in sorted(folder.iterdir()):
            if image.suffix.lower() in SUFFIXES:
                path = f"{folder.name}/{image.name}"
                yield Item(path, right, image=path, image_id=path, language=config.language)
