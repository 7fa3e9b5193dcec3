"""Use a trained model in Python: answer a prompt about images, or score given answers.

    from train.inference import PaLIPipeline
    pipeline = PaLIPipeline.from_folder("runs/demo/export")
    pipeline.ask("photo.jpg", "Answer in EN: what color is the circle?")

The folder is an export (`python -m train.export`), or a run's folder, whose newest checkpoint is read.
"""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from common.errors import ConfigurationError
from data.examples import EncodedExample, ExampleInfo
from data.images import decode
from data.packing import RowShape, pack
from data.skip import Skip
from data.tokenizer import CLOSING, EOS, Tokenizer
from data.tokenizer_files import find_tokenizer
from model.batch import MicroBatch
from model.config import PaLIConfig
from model.generation import generate, score
from model.layers import parameter_parts
from model.pali import PaLI, units
from model.weights import load
from model.weights.export_folder import is_export, open_export
from model.weights.source import VOCABULARY, read_tower_config
from model.weights.stored import Stored, Values, listed
from parallel.checkpoint.stored_weights import StoredWeights
from train.export import checked_tokenizer, read_run_config
from train.step.batch import to_tensors
from train.weights.saved_checkpoint import find_checkpoint

PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")  # of Pillow; others, such as CMYK, are converted first
ImageLike = str | Path | bytes | Image.Image | NDArray[np.uint8]


class PaLIPipeline:
    """A model in one process with its tokenizer, in evaluation mode."""

    def __init__(self, model: PaLI, tokenizer: Tokenizer, config: PaLIConfig, device: torch.device | str) -> None:
        self.model, self.tokenizer, self.config = model.to(device).eval(), tokenizer, config
        self.device = torch.device(device)

    @classmethod
    def from_folder(
        cls, folder: str | Path, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> "PaLIPipeline":
        """Read an export, or the newest checkpoint of a run's folder (`FOLDER@STEP`: that of a step).

        `device`: by default the first GPU, else the CPU. `dtype`: of weights and activations. Raises
        ConfigurationError for a folder that holds neither.
        """
        if Path(folder).is_dir() and not is_export(Path(folder)) and not Path(folder, "checkpoints").is_dir():
            raise ConfigurationError(
                f"folder={folder} is neither an export (config.json, text/config.json) nor a run (checkpoints/); name "
                "one, such as runs/demo/export."
            )
        if is_export(Path(folder)):
            config, tensors = open_export(Path(folder))
            tokenizer = _read_tokenizer(Path(folder), config)
        else:
            weights = StoredWeights(*find_checkpoint(str(folder), "folder")[:2])
            run = read_run_config("folder", weights)
            config, tensors, tokenizer = run.pali, weights.tensors, checked_tokenizer(run, weights)
        model = _filled(config, tensors, dtype, f"folder={folder}")
        return cls(model, tokenizer, config, device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def ask(self, image: ImageLike | None, prompt: str, max_new_tokens: int = 64, **search: Any) -> str:
        """Return the text that the model generates; see `ask_all`. `image`: None for a prompt without one."""
        return self.ask_all([image], [prompt], max_new_tokens, **search)[0]

    def ask_all(
        self, images: Sequence[ImageLike | None], prompts: Sequence[str], max_new_tokens: int = 64, **search: Any
    ) -> list[str]:
        """Return the answers to several prompts at once, whose lengths may differ.

        A file, encoded bytes, a Pillow image or an array uint8 [H, W, 3] is an image. `search`: the fields of
        `model.search.Search`, greedy by default. Raises ConfigurationError for an image that cannot be read.
        """
        if not prompts:
            return []
        answers = generate(self.model, self.batch(images, prompts), max_new_tokens, **search)
        return [self.tokenizer.decode(answer) for answer in answers.tolist()]

    def score(self, image: ImageLike | None, prompt: str, answers: Sequence[str]) -> list[float]:
        """Return the log-probability (nats) of each answer, EOS included; image and prompt are encoded once."""
        targets = [[*self.tokenizer.encode(answer), EOS] for answer in answers]
        scores: list[float] = score(self.model, self.batch([image], [prompt]), [targets])[0].tolist()
        return scores

    def batch(self, images: Sequence[ImageLike | None], prompts: Sequence[str]) -> MicroBatch:
        """Return one row per prompt; the closing sentinel of every prompt of the paper is added where it is missing."""
        if len(images) != len(prompts):
            raise ConfigurationError(
                f"{len(images)} images are given for {len(prompts)} prompts; give an image, or None, for each prompt."
            )
        size, tokens_per_image = self.config.model.image_size, self.config.tokens_per_image
        examples = []
        for image, prompt in zip(images, prompts, strict=True):
            prompt = prompt if prompt.endswith(CLOSING) else prompt + CLOSING
            ids = np.array([*self.tokenizer.encode_prompt(prompt), EOS], np.int32)
            pixels = np.zeros((0, size, size, 3), np.uint8) if image is None else read_image(image, size)[None]
            info = ExampleInfo("", "vqa", "", "", "en", prompt, "")
            examples.append(EncodedExample(ids, np.array([EOS], np.int32), info, pixels, closing=2))
        length = max(len(one.images) * tokens_per_image + len(one.encoder_ids) for one in examples)
        shape = RowShape(length, 1, 1, size, tokens_per_image)  # a decoder of one position: an example a row
        return to_tensors(pack(examples, shape)[0]).to(self.device)


def read_image(image: ImageLike, size: int) -> NDArray[np.uint8]:
    """Read an image as uint8 [size, size, 3], in the way of training. Raises ConfigurationError."""
    name = str(image) if isinstance(image, str | Path) else f"<{type(image).__name__}>"
    try:
        if isinstance(image, str | Path):
            content = Path(image).read_bytes()
        elif isinstance(image, bytes):
            content = image
        else:
            opened = image if isinstance(image, Image.Image) else Image.fromarray(image)
            buffer = io.BytesIO()
            (opened if opened.mode in PNG_MODES else opened.convert("RGB")).save(buffer, "PNG", compress_level=0)
            content = buffer.getvalue()
        return decode(content, size)
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigurationError(f"image={name} cannot be read ({why}); name a readable file.") from error
    except (TypeError, ValueError) as error:  # an array of another shape or type
        raise ConfigurationError(f"image={name} cannot be read ({error}); give uint8 [H, W, 3].") from error
    except Skip as skip:
        raise ConfigurationError(f"image={name} cannot be read ({skip.detail}); name another file.") from skip


def _read_tokenizer(folder: Path, config: PaLIConfig) -> Tokenizer:
    """Read the tokenizer of an export. Raises ConfigurationError where it is missing, or was exchanged."""
    file = find_tokenizer(folder) or folder / "tokenizer.model"
    tokenizer, text = Tokenizer(file), read_tower_config(folder, "mt5", f"folder={folder}") or {}
    mine = tokenizer.vocabulary()
    if tokenizer.vocab_size > config.mt5.vocab_size or text.get(VOCABULARY, mine) != mine:
        raise ConfigurationError(
            f"folder={folder}: {file.name} is not the tokenizer of this model ({VOCABULARY} of config.json is not "
            f"that of its {tokenizer.vocab_size} pieces); export the model again."
        )
    return tokenizer


def _filled(config: PaLIConfig, tensors: Stored, dtype: torch.dtype, where: str) -> PaLI:
    """Make a model and read its values, one tensor at a time, so that they are in memory once."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = PaLI(units(config))
    finally:
        torch.set_default_dtype(before)
    if missing := {part.name for _, part in parameter_parts(model)} - tensors.keys():
        raise ConfigurationError(f"{where} lacks {listed(missing)}; its settings are those of another model.")
    load(model, Values(tensors))
    return model
