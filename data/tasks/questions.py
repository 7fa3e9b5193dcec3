"""Read question files: VQAv2's (also OKVQA), rows of named fields, SQuAD's (XQuAD, TyDiQA-GoldP)."""

import string
from collections.abc import Iterator
from typing import Any

from common.errors import ConfigurationError
from data.tasks.config import TaskConfig
from data.tasks.item import Item, distinct, get, no_strangers, read_json, text, texts

ROW_FIELDS = ("id", "text", "answers", "image", "language", "group", "ocr")


def vqa_v2(config: TaskConfig) -> list[Item]:
    """Return an item of each question of the first file, with all annotators' answers of the second, if there is one.

    Its group is the answer type (yes/no, number, other). Raises ConfigurationError for answers to unknown questions.
    """
    questions, *annotations = config.files
    answered: dict[str, Any] = {}
    for file in annotations:
        for annotation in get(file, read_json(file), "annotations"):
            number = text(file, annotation, "question_id")
            if number in answered:
                raise ConfigurationError(
                    f"task.files: {file} has the answers to the question {number} twice; remove one."
                )
            answered[number] = annotation
    items = [
        Item(
            id=(number := text(questions, question, "question_id")),
            references=texts(questions, answered.get(number, {}).get("answers")),
            text=text(questions, question, "question"),
            image=text(questions, question, "image_id"),
            image_id=text(questions, question, "image_id"),
            language=config.language,
            group=str(answered.get(number, {}).get("answer_type", "")),
        )
        for question in get(questions, read_json(questions), "questions")
    ]
    where = ", ".join(annotations)
    no_strangers("answers", where, answered.keys() - {item.id for item in items}, "questions", questions)
    return distinct(items, questions)


def rows(config: TaskConfig) -> list[Item]:
    """Return an item of each row; `task.fields` has the rows' names of ROW_FIELDS, and of the list that they lie in.

    A field without an entry there has its own name, where rows have it. Rows are a list, a list under `fields.list`, or
    a mapping from ids. A row's other fields serve the prompt. The names in conf/task are those that
    google-research/big_vision at 0127fb6 reads in `datasets/`: TextVQA and ST-VQA `data` of `question_id`, `question`,
    `image_id` or `file_path`, `answers`; VizWiz `image`, `question`, `answers` of `answer`; TallyQA `image`,
    `question`, `question_id`, `answer`, `issimple` (test alone); xGQA a mapping to `question`, `answer`, `imageId`.
    XNLI's columns are those that readers of XNLI-1.0 use: `language`, `pairID`, `gold_label`, `sentence1`,
    `sentence2`.
    """
    return distinct((_row(config, file, id_, row) for file in config.files for id_, row in _rows(config, file)),
                    ", ".join(config.files))  # fmt: skip


def _rows(config: TaskConfig, file: str) -> Iterator[tuple[str, Any]]:
    content = read_json(file)
    if "list" in config.fields:
        content = get(file, content, config.fields["list"])
    if isinstance(content, dict):
        yield from content.items()
    else:
        for number, row in enumerate(content):
            yield str(row["id"]) if isinstance(row, dict) and "id" in row else str(number), row


def _row(config: TaskConfig, file: str, id_: str, row: Any) -> Item:
    name = {field: config.fields.get(field, field) for field in ROW_FIELDS}

    def cell(field: str, default: str = "") -> str:
        return text(file, row, name[field]) if field in config.fields or field in row else default

    image = cell("image")
    return Item(
        id=_row_id(file, name["id"], row) if "id" in config.fields else id_,
        references=texts(file, row.get(name["answers"])),
        text=cell("text"),
        image=image,
        image_id=image,
        language=cell("language", config.language),
        group=str(row.get(name["group"], "")),  # TallyQA's training rows have none
        ocr=texts(file, row.get(name["ocr"])),
        extra={str(key): value for key, value in row.items() if isinstance(value, str | int | float)},
    )


def _row_id(file: str, name: str, row: Any) -> str:
    """Return a row's id: the field `name`, or a template that joins several."""
    if "{" not in name:
        return text(file, row, name)
    return name.format(**{key: get(file, row, key) for _, key, _, _ in string.Formatter().parse(name) if key})


def maxm(config: TaskConfig) -> list[Item]:
    """Return an item of each question of MaXM's files, one a language, answered in the language of the question.

    A file has `split` (its language) and `annotations` of images with `qa_pairs`; an answer is right as it was written
    or as processed [README of google-research-datasets/maxm].
    """
    items = (
        Item(
            id=text(file, pair, "question_id"),
            references=tuple(
                dict.fromkeys(texts(file, pair.get("answers")) + texts(file, pair.get("processed_answers")))
            ),
            text=text(file, pair, "question"),
            image=text(file, image, "image_id"),
            image_id=text(file, image, "image_id"),
            language=str(content.get("split", config.language)),
            group="collection" if str(pair.get("is_collection")).lower() == "true" else "",
        )
        for file in config.files
        for content in (read_json(file),)
        for image in get(file, content, "annotations")
        for pair in get(file, image, "qa_pairs")
    )
    return distinct(items, ", ".join(config.files))


def squad(config: TaskConfig) -> list[Item]:
    """Return an item of each question, with its paragraph as {context}."""
    items = (
        Item(
            id=text(file, question, "id"),
            references=tuple(dict.fromkeys(texts(file, question.get("answers"), "text"))),
            text=text(file, question, "question"),
            language=config.language,
            extra={"context": text(file, paragraph, "context")},
        )
        for file in config.files
        for article in get(file, read_json(file), "data")
        for paragraph in get(file, article, "paragraphs")
        for question in get(file, paragraph, "qas")
    )
    return distinct(items, ", ".join(config.files))
