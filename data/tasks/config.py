"""Settings of one evaluation task (conf/task)."""

import string
from dataclasses import dataclass, field

from common.errors import ConfigurationError
from common.values import PATH, at_least, one_of
from data import languages

FORMATS = ("coco_captions", "karpathy", "textcaps", "xm3600", "vqa_v2", "rows", "squad", "coco_detection")
SUBMISSIONS = ("none", "coco", "vqa", "squad")


@dataclass
class TaskConfig:
    """Name the files, the prompt and the metrics of a task (`python -m train.evaluate task=coco`)."""

    name: str = ""
    """Name of the task in reports. Empty by default: no task, but the run's own mixture."""
    format: str = "rows"
    """Format of the files: coco_captions, karpathy, textcaps, xm3600, vqa_v2, rows, squad or coco_detection."""
    root: str = field(default=".", metadata=PATH)
    """Folder that `files` and `images` lie in. The working folder by default."""
    files: list[str] = field(default_factory=list)
    """Official files, in the order of the format; of vqa_v2 questions, then annotations."""
    images: str = ""
    """Folder of the images. Empty by default: a task of text alone."""
    image_name: str = "{image}"
    """Path of an image below `images`, made of {image} or {image_id}, such as COCO_val2014_{image_id:0>12}.jpg."""
    fields: dict[str, str] = field(default_factory=dict)
    """Of `rows`: the file's names of id, text, answers, image, language, group and ocr, and `list`, of its list.
    An id may join fields, as {language}-{pairID}.
    """
    prompt: str = "Answer in {language}: {text} <extra_id_0>"
    """The input text, of {language} (EN), {text}, {ocr}, {context} and other fields of an item."""
    language: str = "en"
    """Language of items that name none, and of the prompt. English by default."""
    split: str = "test"
    """Of karpathy: train, val or test. Test by default."""
    metrics: list[str] = field(default_factory=list)
    """Metrics to report (evaluation/tasks.py lists them)."""
    submission: str = "none"
    """File for a test server: coco, vqa, squad or none. None by default."""
    image_size: int | None = None
    """Pixels of a side. Null by default: as the checkpoint's phase."""
    max_new_tokens: int = 32
    """Tokens of a prediction at most. 32 by default: captions and answers are shorter."""
    blind: bool = False
    """Predict once more with every image blank, for the score without seeing. False by default: it takes as long."""
    report_items: int = 1000
    """Predictions that report.html shows, with their images. 1000 by default: a page of some 8 MB."""
    limit: int | None = None
    """Evaluate the first so many items. Null by default: all."""

    def __post_init__(self) -> None:
        one_of("task.format", self.format, FORMATS)
        one_of("task.submission", self.submission, SUBMISSIONS)
        at_least("task.", 1, max_new_tokens=self.max_new_tokens, report_items=self.report_items)
        if self.limit is not None:
            at_least("task.", 1, limit=self.limit)
        if languages.canonical(self.language) is None:
            raise ConfigurationError(f"task.language={self.language!r} is no code of a language, such as en.")
        for key, template in (("prompt", self.prompt), ("image_name", self.image_name)):
            try:
                list(string.Formatter().parse(template))
            except ValueError as error:
                broken = str(error)
            else:
                continue
            raise ConfigurationError(f"task.{key}={template!r} is no template ({broken}); write names in braces.")
