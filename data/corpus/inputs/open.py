"""Open an input by its format."""

from collections.abc import Callable

from common.errors import ConfigurationError
from data.corpus.config import BuildConfig, InputConfig
from data.corpus.inputs.captions import Coco35L, MaXM
from data.corpus.inputs.objects import ImageNet, OpenImages, VisualGenome
from data.corpus.inputs.tables import Tables
from data.corpus.inputs.tars import Tars
from data.corpus.inputs.tasks import TaskImages, is_task
from data.corpus.row import Reader
from data.tasks.config import FORMATS

OWN: dict[str, Callable[[str, InputConfig, int], Reader]] = {
    "table": Tables,
    "text": Tables,
    "mc4": Tables,
    "cc3m": Tables,
    "cc12m": Tables,
    "coco_35l": Coco35L,
    "maxm": MaXM,
    "open_images": OpenImages,
    "visual_genome": VisualGenome,
    "imagenet": ImageNet,
    "objects365": TaskImages,
}


def open_input(name: str, config: InputConfig, build: BuildConfig) -> Reader:
    """Return the reader of an input. Raises ConfigurationError for an unknown format and missing files."""
    if config.format == "img2dataset":
        return Tars(name, config, build.image.max_mib)
    if config.format in OWN:
        return OWN[config.format](name, config, build.part_rows)
    if is_task(config.format):
        return TaskImages(name, config, build.part_rows)
    raise ConfigurationError(
        f"inputs.{name}.format={config.format!r} is unknown; choose img2dataset, {', '.join(OWN)}, a name of conf/task "
        f"or one of {', '.join(FORMATS)}."
    )
