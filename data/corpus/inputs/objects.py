"""Read sets of labels and boxes: Open Images, Visual Genome, Objects365 (COCO's form) and ImageNet's folders."""

import csv
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError
from data.corpus.inputs.tasks import Images, in_fractions
from data.corpus.row import Row, image_file
from data.tasks.item import get, read_json

CONFIDENT = 0.5  # of a label in Open Images: 1 is verified as present, 0 as absent, machines' lie between
IMAGENET = ("*.JPEG", "*.jpeg", "*.jpg")


class OpenImages(Images):
    """Read Open Images' CSV files: boxes, labels of images, and descriptions of classes, in any order.

    A label of an image with confidence 0 was verified as absent: `absent_labels`. Boxes are fractions already.
    """

    def files(self) -> list[Path]:
        """See Reader.files."""
        named = [self.root / file for file in self.config.files] or sorted(self.root.glob("*.csv"))
        if not named:
            raise ConfigurationError(f"inputs.{self.name}.files names no file; name Open Images' CSV files.")
        return named

    def read(self) -> list[Row]:
        """See Images.read."""
        names: dict[str, str] = {}
        tables = []
        for file in self.files():
            header, rows = _csv_rows(file)
            if header[:1] == ["ImageID"]:
                tables.append((file, header, rows))
            else:  # the descriptions of classes have no header
                names |= {key: label for key, label, *_ in [header, *rows] if key != "LabelName"}
        found: dict[str, dict[str, Any]] = {}
        for file, header, rows in tables:
            for values in rows:
                line = dict(zip(header, values, strict=False))
                own = found.setdefault(line["ImageID"], {"objects": [], "absent_labels": []})
                label = names.get(str(get(file, line, "LabelName")))
                if label is None:
                    raise ConfigurationError(
                        f"{file} has the class {line['LabelName']}, which no file of descriptions has; add the file."
                    )
                _add(own, label, line)
        folder, template = self.root / (self.config.images or "images"), self.config.image_name or "{image_id}.jpg"
        return [
            Row(key, _without_doubles(own), image_file(folder / template.format(image_id=key)))
            for key, own in found.items()
        ]


def _add(own: dict[str, Any], label: str, line: dict[str, str]) -> None:
    """Add a line of a CSV file of Open Images to the record of its image."""
    if "XMin" in line:
        if line.get("IsGroupOf") != "1":  # a box around many is the box of none
            box = [float(line[edge]) for edge in ("YMin", "XMin", "YMax", "XMax")]
            own["objects"].append({"label": label, "box": [min(max(edge, 0.0), 1.0) for edge in box]})
    elif float(line.get("Confidence", 1)) == 0:
        own["absent_labels"].append(label)
    elif float(line.get("Confidence", 1)) >= CONFIDENT:
        own["objects"].append({"label": label})


def _without_doubles(own: dict[str, Any]) -> dict[str, Any]:
    """Return a record without labels that a box has too, and without absent labels that are also present."""
    boxed = {each["label"] for each in own["objects"] if "box" in each}
    objects = [each for each in own["objects"] if "box" in each or each["label"] not in boxed]
    present = {each["label"] for each in objects}
    absent = [label for label in dict.fromkeys(own["absent_labels"]) if label not in present]
    return {"objects": objects} | ({"absent_labels": absent} if absent else {})


class VisualGenome(Images):
    """Read Visual Genome: `objects.json` with names and boxes in pixels, `image_data.json` with the images' sizes.

    `question_answers.json`, if `files` names it, adds questions. A file is recognized by its entries.
    """

    def files(self) -> list[Path]:
        """See Reader.files."""
        return [self.root / file for file in self.config.files or ["objects.json", "image_data.json"]]

    def read(self) -> list[Row]:
        """See Images.read."""
        found: dict[str, dict[str, Any]] = {}
        for file in self.files():
            for image in read_json(file):
                key = str(image["id"] if "qas" in image and "image_id" not in image else get(file, image, "image_id"))
                found.setdefault(key, {}).update(image)
        template = self.config.image_name or "{image_id}.jpg"
        folder = self.root / (self.config.images or "VG_100K")
        rows = []
        for key, image in found.items():
            if "height" not in image:
                raise ConfigurationError(f"image {key} has no size; add image_data.json to files.")
            rows.append(Row(key, _genome(image), image_file(folder / template.format(image_id=key))))
        return rows


def _genome(image: dict[str, Any]) -> dict[str, Any]:
    objects = []
    for each in image.get("objects", ()):
        top, left = each["y"], each["x"]
        names = [str(name).strip() for name in each.get("names", ()) if str(name).strip()]
        if names:
            box = [names[0], top, left, top + each["h"], left + each["w"]]
            objects.append(in_fractions(box, image["height"], image["width"]))
    asked = [
        {"id": str(each["qa_id"]), "language": "en", "question": each["question"], "answer": [each["answer"]]}
        for each in image.get("qas", ())
    ]
    return {"objects": objects} | ({"questions": asked} if asked else {})


class ImageNet(Images):
    """Read ImageNet's folders: `n01440764/*.JPEG` below `images`, and `LOC_synset_mapping.txt` with the classes' names.

    The record has the class as `objects` and `class_id`; the first name of a synset is its label.
    """

    def files(self) -> list[Path]:
        """See Reader.files."""
        return [self.root / file for file in self.config.files or ["LOC_synset_mapping.txt"]]

    def read(self) -> list[Row]:
        """See Images.read."""
        (file,) = self.files()
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise ConfigurationError(f"{file} cannot be read ({error.strerror}); name the file of synsets.") from error
        folder = self.root / (self.config.images or "train")
        rows = []
        for number, line in enumerate(filter(str.strip, lines)):
            synset, _, names = line.partition(" ")
            label = names.split(",")[0].strip()
            paths = sorted(path for pattern in IMAGENET for path in (folder / synset).glob(pattern))
            fields = {"objects": [{"label": label}], "class_id": number, "synset": synset}
            rows += [Row(f"{synset}/{path.stem}", dict(fields), image_file(path)) for path in paths]
        if not rows:
            raise ConfigurationError(f"{folder} has no folder of a synset with images; correct images or split.")
        return rows


def _csv_rows(file: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with open(file, encoding="utf-8", newline="") as lines:
            header, *rows = list(csv.reader(lines)) or [[]]
    except OSError as error:
        raise ConfigurationError(f"{file} cannot be read ({error.strerror}); name the official file.") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigurationError(f"{file} is no CSV file ({error}); download it again.") from error
    return header, rows
