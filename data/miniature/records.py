"""Make one record of each source: the JSON-able annotations, and the scene to render (None for text)."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from data.miniature.config import MiniatureConfig
from data.miniature.documents import write_document
from data.miniature.language import language
from data.miniature.questions import absent_pairs, ask
from data.miniature.sampling import SceneOptions, draw_scene
from data.miniature.scene import PAIRS, SIZES, Box, Scene, Shape, uses_held_out

Record = dict[str, Any]
Maker = Callable[[np.random.Generator, str, MiniatureConfig], tuple[Record, Scene | None]]

ENGLISH_SHARE = 0.6  # of questions, and of alt-texts; the other languages share the rest
MOSTLY_SIGNS = SceneOptions(sign_share=0.8)
SIMPLE = (0.55, 0.27, 0.18)  # shares of scenes with 1, 2 and 3 shapes: one shape alone teaches what its name means
SOME_SIGNS = SceneOptions(sign_share=0.2, num_shapes=SIMPLE)
HALF_SIGNS = SceneOptions(sign_share=0.5, num_shapes=SIMPLE)
COUNTABLE = SceneOptions(sign_share=0.25, num_shapes=(0.25, 0.5, 0.25))


def _webli(rng: np.random.Generator, split: str, config: MiniatureConfig) -> tuple[Record, Scene]:
    scene = _scene(rng, MOSTLY_SIGNS, split, config)
    code = _draw_language(rng, config.languages)
    own = language(code)
    wording = own.table["alt_texts"][rng.integers(len(own.table["alt_texts"]))]
    alt_text = wording.format(objects=own.objects(scene, with_size=bool(rng.random() < 0.7)))
    record: Record = {"language": code, "alt_text": alt_text}
    return record | _ocr(scene, config), scene


def _cc3m_35l(rng: np.random.Generator, split: str, config: MiniatureConfig) -> tuple[Record, Scene]:
    scene = _scene(rng, SOME_SIGNS, split, config)
    return {"captions": {code: language(code).objects(scene) for code in config.languages}}, scene


def _vq2a(rng: np.random.Generator, split: str, config: MiniatureConfig) -> tuple[Record, Scene]:
    scene = _scene(rng, COUNTABLE, split, config)
    questions = []
    for question in ask(rng, scene):
        code = _draw_language(rng, config.languages)
        text = question.text(language(code), int(rng.integers(1 << 16)))
        questions.append({"language": code, "question": text, "answer": question.answer})
    return {"questions": questions}, scene


def _objects(rng: np.random.Generator, split: str, config: MiniatureConfig) -> tuple[Record, Scene]:
    scene = _scene(rng, HALF_SIGNS if config.aligned else SOME_SIGNS, split, config)
    absent = absent_pairs(rng, scene, int(rng.integers(3, 6)))
    record: Record = {
        "objects": [{"label": shape.label, "box": _rounded(shape.box, config)} for shape in scene.shapes],
        "absent_labels": [f"{color} {kind}" for color, kind in absent],
    }
    return (record | _ocr(scene, config) if config.aligned else record), scene


def _text(rng: np.random.Generator, split: str, config: MiniatureConfig) -> tuple[Record, None]:
    code = config.languages[int(rng.integers(len(config.languages)))]
    return {"language": code, "text": write_document(rng, language(code), split)}, None


MAKERS: dict[str, Maker] = {
    "webli": _webli,
    "cc3m_35l": _cc3m_35l,
    "vq2a": _vq2a,
    "objects": _objects,
    "text": _text,
}


def names_held_out(record: Record) -> bool:
    """Return whether a caption of a record, in any language, names two things that are held out together."""
    return any(uses_held_out(_named(code, text)) for code, text in record["captions"].items())


def _named(code: str, text: str) -> list[Shape]:
    """Return the things that a caption names, in order."""
    pattern, shapes = _phrases(code)
    return [shapes[found] for found in pattern.findall(text)]


@cache
def _phrases(code: str) -> tuple[re.Pattern[str], dict[str, Shape]]:
    """Return the pattern of all noun phrases of one language, and the shape of each phrase."""
    own = language(code)
    shapes = {own.phrase(s): s for s in (Shape(*pair, size, 0.5, 0.5, 0.0) for pair in PAIRS for size in SIZES)}
    either = "|".join(map(re.escape, sorted(shapes, key=len, reverse=True)))
    # Whole words only (Hebrew's cross ends in its heart), but "and" may be written together with the next word.
    joined = re.escape(str(own.table["and"]).strip())
    return re.compile(rf"(?<!\w)(?:{joined})?({either})(?!\w)" if own.spaced else f"({either})"), shapes


def _draw_language(rng: np.random.Generator, codes: Sequence[str]) -> str:
    others = [code for code in codes if code != "en"]
    if "en" in codes and (not others or rng.random() < ENGLISH_SHARE):
        return "en"
    return others[int(rng.integers(len(others)))]


def _scene(rng: np.random.Generator, options: SceneOptions, split: str, config: MiniatureConfig) -> Scene:
    return draw_scene(rng, replace(options, aligned_signs=config.aligned), split)


def _ocr(scene: Scene, config: MiniatureConfig) -> Record:
    """Return the field of a scene's sign; nothing where it has none."""
    if scene.sign is None:
        return {}
    sign = scene.sign
    return {"ocr": [{"text": sign.word, "language": sign.language, "box": _rounded(sign.box, config)}]}


def _rounded(box: Box, config: MiniatureConfig) -> list[float]:
    return [round(value, 2 if config.aligned else 4) for value in box]
