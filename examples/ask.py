"""Ask a trained model a question about an image, in one process.

    python -m examples.ask run=runs/demo image=photo.jpg question="What color is the circle?"
    python -m examples.ask run=runs/demo image=photo.jpg prompt="Generate the alt_text in DE at 0: <extra_id_0>"

`run` is a run's folder; its newest checkpoint is read, under whatever layout it was saved.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from omegaconf import MISSING

from common.command_line import parse, run_command
from common.errors import ConfigurationError
from data.examples import EncodedExample, ExampleInfo
from data.images import decode
from data.objectives import vqa
from data.packing import RowShape, pack
from data.skip import Skip
from data.tokenizer import EOS, Tokenizer
from parallel.checkpoint.checkpointer import Checkpointer
from parallel.config import ParallelConfig
from parallel.distributed import launch
from parallel.layout import Layout
from train.build import build_phase_engine
from train.compose import to_run_config
from train.phases import find_span, for_phase, spans
from train.saved_run import read_settings
from train.step.batch import to_tensors


@dataclass
class Options:
    """Ask a trained model a question about an image."""

    run: str = MISSING
    """Folder of a run with a checkpoint."""
    image: str = MISSING
    """A JPEG, PNG or WebP file."""
    question: str | None = None
    """A question; the prompt is that of the vqa objective, with the answer in English."""
    prompt: str | None = None
    """A whole prompt, such as those in data/objectives/; instead of a question."""
    max_new_tokens: int = 64
    """Most tokens of the answer."""


def ask(options: Options) -> str:
    """Return the model's answer; raise ConfigurationError for a run without settings or checkpoint."""
    settings = read_settings(Path(options.run))
    if settings is None:
        raise ConfigurationError(f"run={options.run} holds no run (no config.yaml); train one first.")
    config = to_run_config(settings)
    config.parallel = ParallelConfig()  # one process, whatever layout the run had
    checkpointer = Checkpointer(Path(options.run, "checkpoints"))
    step = checkpointer.latest_step()
    if step is None:
        raise ConfigurationError(f"run={options.run} holds no checkpoint yet; train the run first.")
    span = find_span(spans(config), step)
    config = for_phase(config, span)
    engine = build_phase_engine(config, span.phase, Layout.start(config.parallel, launch()), restored=True)
    checkpointer.load_latest(engine, weights_only=True)

    tokenizer, size = Tokenizer(config.data.tokenizer), config.model.image_size
    prompt = options.prompt or vqa.PROMPTS[0].format(language="EN", question=options.question)
    pixels = read_image(options.image, size)
    encoder_ids = np.array([*tokenizer.encode_prompt(prompt), EOS], np.int32)
    info = ExampleInfo("", "vqa", "", "", "en", prompt, "")
    example = EncodedExample(encoder_ids, np.array([EOS], np.int32), pixels[None], info, closing=2)
    tokens_per_image = config.pali.tokens_per_image
    rows, _ = pack([example], RowShape(tokens_per_image + len(encoder_ids), 1, 1, size, tokens_per_image))
    answer: torch.Tensor = engine.generate(to_tensors(rows), options.max_new_tokens)
    return tokenizer.decode(answer[0].tolist())


def read_image(path: str, size: int) -> NDArray[np.uint8]:
    """Read an image file as [size, size, 3]. Raises ConfigurationError."""
    try:
        return decode(Path(path).read_bytes(), size)
    except OSError as error:
        raise ConfigurationError(f"image={path} cannot be read ({error.strerror}); name a readable file.") from error
    except Skip as skip:
        raise ConfigurationError(f"image={path} cannot be read ({skip.detail}); name another file.") from skip


def main(options: Options) -> None:
    """Print the answer."""
    if (options.question is None) == (options.prompt is None):
        raise ConfigurationError("question or prompt is missing, or both are given; give one of them.")
    print(ask(options))


if __name__ == "__main__":
    run_command(lambda words: main(parse(words, Options)))
