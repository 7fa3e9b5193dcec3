"""A corpus of a few tars, made in a temporary folder: every kind of record, in several languages."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.config import ComponentConfig, DataConfig, Mixture, order_keys
from data.corpus_text import corpus_texts
from data.shards.writer import write_shard
from data.stream import Stream
from data.tokenizer import Tokenizer, train_tokenizer

COLORS = ("red", "green", "blue", "yellow", "white", "black")
SHAPES = ("circle", "square", "star", "cross")
IMAGE_SIZE = 28
TOKENS_PER_IMAGE = 4
COMPONENTS = (
    ("text", "span_corruption", 1),
    ("webli", "split_captioning", 2),
    ("cc3m_35l", "captioning", 3),
    ("webli", "ocr", 2),
    ("vq2a", "vqa", 4),
    ("vq2a", "vqg", 1),
    ("objects", "object_vqa", 2),
    ("objects", "detection", 2),
)


def png(seed: int, size: int = 20) -> bytes:
    """A small image, encoded."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def record(number: int) -> dict:
    """A record that serves every objective."""
    color, shape = COLORS[number % 6], SHAPES[number % 4]
    label = f"{color} {shape}"
    box = [0.1, 0.2, 0.5 + number % 5 / 10, 0.75]
    return {
        "language": "en",
        "alt_text": f"an image of a {label} number {number}",
        "captions": {"en": f"a {label}", "de": f"ein Bild von {label}", "zh": "红色的圆形在中间"},
        "ocr": [
            {"text": "EXIT", "language": "en", "box": [0.5, 0.1, 0.6, 0.4]},
            {"text": "ВЫХОД", "language": "ru", "box": [0.7, 0.1, 0.8, 0.4]},
            {"text": "NO", "language": "en", "box": [0.1, 0.1, 0.2, 0.4]},
        ],
        "questions": [
            {"language": "en", "question": "What color is it?", "answer": color},
            {"language": "fr", "question": "Quelle est la forme ?", "answer": shape},
        ],
        "objects": [{"label": label, "box": box}, {"label": "dog", "box": [0.0, 0.0, 1.0, 1.0]}],
        "prompt": "What is it? <extra_id_0>",
        "closed": True,
        "references": [label, color, " "],
        "has_image": True,
        "absent_labels": ["cat", "traffic light", "sheep"],
        "text": " ".join(f"word{(number * 7 + index) % 50}" for index in range(40)),
    }


def write_source(root: Path, name: str, shards: int = 2, samples: int = 12, split: str = "train") -> None:
    for shard in range(shards):
        numbers = range(shard * samples, (shard + 1) * samples)
        write_shard(
            root / name / f"{split}-{shard:05d}.tar",
            [(f"{name}{number:04d}", record(number), None if name == "text" else png(number)) for number in numbers],
        )


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    for name in ("webli", "cc3m_35l", "vq2a", "objects", "text"):
        write_source(root, name)
        write_source(root, name, shards=1, samples=5, split="validation")
    train_tokenizer(corpus_texts(root), root / "tokenizer.model", vocab_size=700)
    return root


@pytest.fixture(scope="session")
def tokenizer(corpus) -> Tokenizer:
    return Tokenizer(corpus / "tokenizer.model")


@pytest.fixture
def data(corpus) -> DataConfig:
    return DataConfig(
        root=str(corpus),
        tokenizer=str(corpus / "tokenizer.model"),
        global_batch_size=24,
        num_streams=4,
        encoder_length=96,
        decoder_length=64,
        images_per_row=3,
    )


def mixture(*components: tuple[str, str, float]) -> Mixture:
    """Each component named by its source and objective."""
    made = {str(number): ComponentConfig(*one, options={}) for number, one in enumerate(components or COMPONENTS)}
    return dict(zip(order_keys(made), made.values(), strict=True))


@pytest.fixture
def stream(data, tokenizer) -> Stream:
    return Stream(data, mixture(), tokenizer, IMAGE_SIZE, TOKENS_PER_IMAGE, "train", seed=7)
