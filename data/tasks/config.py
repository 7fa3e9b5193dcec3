"""Settings of one task (conf/task): its official files, its prompt, its metrics, and the recipe of its fine-tuning."""

import string
from dataclasses import dataclass, field, replace

from common.errors import ConfigurationError
from common.values import PATH, above, at_least, one_of
from data import languages

FORMATS = (
    "coco_captions",
    "karpathy",
    "textcaps",
    "xm3600",
    "vqa_v2",
    "rows",
    "squad",
    "coco_detection",
    "maxm",
    "image_folder",
)
SUBMISSIONS = ("none", "coco", "vqa", "vizwiz", "squad")
TRAIN, VALIDATION = "train", "validation"  # parts of a task besides the items that it is scored on


@dataclass
class TaskPart:
    """Name the files of a task's training or validation items, where they differ from those that it is scored on."""

    files: list[str] = field(default_factory=list)
    """Official files, in the order of the format. Empty by default: the task's, where `split` takes other items."""
    images: str | None = None
    """Folder of the images. Null by default: the task's."""
    image_name: str | None = None
    """Path of an image below `images`. Null by default: the task's."""
    split: str | None = None
    """Of karpathy, such as train+restval. Null by default: the task's."""
    ocr: list[str] = field(default_factory=list)
    """Files of OCR strings. Empty by default: the task's."""

    @property
    def is_given(self) -> bool:
        """Return whether the part has items of its own."""
        return bool(self.files or self.split)


@dataclass
class TaskSweep:
    """List the values that a sweep tries, joined by commas; the defaults are the paper's search space."""

    learning_rate: str = "1e-5,3e-5,1e-4"
    """Of `task.recipe.learning_rate`."""
    batch_size: str = "128,256,512"
    """Of `task.recipe.batch_size`."""


@dataclass
class TaskRecipe:
    """Give a task's fine-tuning its length and rates (`python -m train.finetune`; conf/finetune.yaml reads them).

    The defaults are those of most tasks in PaLI's table of hyper-parameters; linear decay to zero belongs to it too.
    """

    steps: int = 5000
    """Steps. 5000 by default: VizWiz, TextVQA, OKVQA and ST-VQA."""
    learning_rate: float = 1e-4
    """Learning rate that linear decay begins with. 1e-4 by default; COCO and OKVQA have 3e-5."""
    batch_size: int = 256
    """Examples of a step. 256 by default, for all tasks."""
    dropout_rate: float = 0.1
    """Dropout of mT5. 0.1 by default, for all tasks."""
    text_length: int = 64
    """Positions of an encoder row for text, beside the visual tokens of one image; the paper states none. 64 by
    default: questions; more for OCR strings."""
    target_length: int = 48
    """Positions of a decoder row; the paper states none. 48 by default: captions and answers."""
    sweep: TaskSweep = field(default_factory=TaskSweep)
    """Values that a sweep tries (`sweep=task` with `-m`)."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "text_length", "target_length")
        at_least("task.recipe.", 1, **{name: getattr(self, name) for name in counts})
        above("task.recipe.", 0, learning_rate=self.learning_rate)
        if not 0 <= self.dropout_rate < 1:
            raise ConfigurationError(f"task.recipe.dropout_rate={self.dropout_rate} must lie in [0, 1).")


@dataclass
class TaskConfig:
    """Name the files, the prompt and the metrics of a task (`python -m train.evaluate task=coco`)."""

    name: str = ""
    """Name of the task in reports. Empty by default: no task, but the run's own mixture."""
    format: str = "rows"
    """Format of the files: coco_captions, karpathy, textcaps, xm3600, vqa_v2, rows, squad, coco_detection, maxm or
    image_folder."""
    root: str = field(default=".", metadata=PATH)
    """Folder that `files` and `images` lie in. The working folder by default."""
    files: list[str] = field(default_factory=list)
    """Official files, in the order of the format; of vqa_v2 questions, then annotations."""
    images: str = ""
    """Folder of the images. Empty by default: a task of text alone."""
    image_name: str = "{image}"
    """Path of an image below `images`, made of {image} or {image_id}, such as COCO_val2014_{image_id:0>12}.jpg."""
    fields: dict[str, str] = field(default_factory=dict)
    """Of `rows`: the file's names of id, text, answers, image, language, group and ocr where those are others, and
    `list`, of its list. An id may join fields, as {language}-{pairID}.
    """
    prompt: str = "Answer in {language}: {text} <extra_id_0>"
    """The input text, of {language} (EN), {text}, {ocr}, {context} and other fields of an item."""
    language: str = "en"
    """Language of items that name none, and of the prompt. English by default."""
    split: str = "test"
    """Of karpathy: train, restval, val or test, or several joined by +. Test by default."""
    ocr: list[str] = field(default_factory=list)
    """Files of OCR strings by image, for {ocr} in the prompt: TextVQA's Rosetta files, or rows of image_id and ocr.
    Empty by default: {ocr} is what an item itself has, else nothing."""
    train: TaskPart = field(default_factory=TaskPart)
    """Training items. None by default: the task is for evaluation alone."""
    validation: TaskPart = field(default_factory=TaskPart)
    """Items that a fine-tuning is validated on. By default those that the task is scored on."""
    recipe: TaskRecipe = field(default_factory=TaskRecipe)
    """Length and rates of a fine-tuning."""
    metrics: list[str] = field(default_factory=list)
    """Metrics to report (evaluation/tasks.py lists them)."""
    submission: str = "none"
    """File for a test server: coco, vqa, vizwiz, squad or none. None by default."""
    image_size: int | None = None
    """Pixels of a side. Null by default: as the checkpoint's phase."""
    max_new_tokens: int = 32
    """Tokens of a prediction at most. 32 by default: captions and answers are shorter."""
    choose: bool = False
    """Score every text of `choices` by its likelihood, and predict the five best, in place of generating. False by
    default; zero-shot classification sets it."""
    choices: list[str] = field(default_factory=list)
    """Texts to choose of. Empty by default: the names of all classes of image_folder."""
    blind: bool = False
    """Predict once more with every image blank, for the score without seeing. False by default: it takes as long."""
    report_items: int = 1000
    """Predictions that report.html shows, with their images. 1000 by default: a page of some 8 MB."""
    limit: int | None = None
    """Evaluate the first so many items. Null by default: all. A fine-tuning reads all training items all the same."""

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

    def for_part(self, name: str) -> "TaskConfig":
        """Return the settings of the training or validation items; without such a part, of the task's own items.

        Raises ConfigurationError for a task without training items.
        """
        if name not in (TRAIN, VALIDATION):
            return self
        part: TaskPart = getattr(self, name)
        if not part.is_given and name == TRAIN:
            raise ConfigurationError(
                f"task.train.files names no file, so {self.name} has nothing to train on; name the task's training "
                "files, or choose another task."
            )
        own = {key: value for key, value in vars(part).items() if value}
        return replace(self, **own, limit=None) if name == TRAIN else replace(self, **own)
