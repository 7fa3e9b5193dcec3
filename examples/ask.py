"""Ask a trained model a question about an image, in one process.

    python -m examples.ask model=runs/demo image=photo.jpg question="What color is the circle?"
    python -m examples.ask model=runs/demo image=photo.jpg prompt="Generate the alt_text in DE at 0: <extra_id_0>"

`model` is an exported folder, or a run's folder: its newest checkpoint is read, under whatever layout it was saved.
"""

from dataclasses import dataclass

from omegaconf import MISSING

from common.command_line import parse, run_command
from common.errors import ConfigurationError
from data.objectives import vqa
from train.inference import PaLIPipeline


@dataclass
class Options:
    """Ask a trained model a question about an image."""

    model: str = MISSING
    """Folder of an export (python -m train.export), or of a run with a checkpoint."""
    image: str = MISSING
    """A JPEG, PNG or WebP file."""
    question: str | None = None
    """A question; the prompt is that of the vqa objective, with the answer in English."""
    prompt: str | None = None
    """A whole prompt, such as those in data/objectives/; instead of a question."""
    max_new_tokens: int = 64
    """Most tokens of the answer."""


def main(options: Options) -> None:
    """Print the answer."""
    if (options.question is None) == (options.prompt is None):
        raise ConfigurationError("question or prompt is missing, or both are given; give one of them.")
    prompt = options.prompt or vqa.PROMPTS[0].format(language="EN", question=options.question)
    print(PaLIPipeline.from_folder(options.model).ask(options.image, prompt, options.max_new_tokens))


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
