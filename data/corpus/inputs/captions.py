"""Read COCO-35L (`coco_mt_train.jsonl`) and MaXM, which data/tasks has no reader for."""

import json
from pathlib import Path
from typing import Any

from common.errors import ConfigurationError
from data.corpus.inputs.folders import open_bytes
from data.corpus.inputs.tasks import Images
from data.corpus.row import Row, image_file
from data.tasks.item import get, read_json, texts


class Coco35L(Images):
    """Read COCO-35L: a line a caption and language, with its English source.

    `files`: `coco_mt_train.jsonl` (or .bz2), and Karpathy's `dataset_coco.json` for the images' paths, if it is there;
    without it `image_name` gives them.
    """

    def files(self) -> list[Path]:
        """See Reader.files."""
        return [self.root / file for file in self.config.files or ["coco_mt_train.jsonl"]]

    def read(self) -> list[Row]:
        """See Images.read."""
        translations, *rest = self.files()
        captions: dict[str, dict[str, dict[str, None]]] = {}
        for line in _lines(translations):
            image_id = str(get(translations, line, "image_id")).split("_")[0]
            own = captions.setdefault(image_id, {"en": {}})
            own["en"][str(get(translations, line, "caption_tokenized"))] = None
            code = str(get(translations, line, "trg_lang"))
            own.setdefault(code, {})[str(get(translations, line, "translation_tokenized"))] = None
        names = {}
        for file in rest:
            for image in get(file, read_json(file), "images"):
                names[str(get(file, image, "cocoid"))] = f"{image.get('filepath', '')}/{get(file, image, 'filename')}"
        folder, template = self.root / (self.config.images or "images"), self.config.image_name
        rows = []
        for image_id, own in captions.items():
            name = names.get(image_id) or (template or "COCO_train2014_{image_id:0>12}.jpg").format(image_id=image_id)
            fields = {"captions": {code: list(texts) for code, texts in own.items()}}
            rows.append(Row(image_id, fields, image_file(folder / name.lstrip("/"))))
        return rows


class MaXM(Images):
    """Read MaXM's file of one language, whose questions and answers are both in that language."""

    def files(self) -> list[Path]:
        """See Reader.files."""
        return [self.root / file for file in self.config.files]

    def read(self) -> list[Row]:
        """See Images.read."""
        if not self.files():
            raise ConfigurationError("files names no file; name MaXM's, such as maxm_v1_fr.json.")
        rows: dict[str, Row] = {}
        folder = self.root / (self.config.images or "images")
        template = self.config.image_name or "{image_id}.jpg"
        for file in self.files():
            content = read_json(file)
            language = self.config.language or str(get(file, content, "split", "language"))
            for image in get(file, content, "annotations"):
                image_id = str(get(file, image, "image_id"))
                path = folder / template.format(image_id=image_id)
                row = rows.setdefault(image_id, Row(image_id, {"questions": []}, image_file(path)))
                for pair in get(file, image, "qa_pairs"):
                    one: dict[str, Any] = {"id": str(get(file, pair, "question_id")), "language": language}
                    one["question"] = str(get(file, pair, "question"))
                    one["answer"] = list(texts(file, pair.get("answers")))
                    row.fields["questions"].append(one)
        return list(rows.values())


def _lines(file: Path) -> list[dict[str, Any]]:
    try:
        with open_bytes(file) as lines:
            return [json.loads(line) for line in lines if line.strip()]
    except FileNotFoundError:
        raise ConfigurationError(f"{file} is missing; name the official files.") from None
    except (ValueError, EOFError) as error:
        raise ConfigurationError(f"{file} is no JSON Lines ({error}); download it again.") from error
