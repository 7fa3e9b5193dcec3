"""One record of each source: the JSON-able annotations, and the scene to render (None for text)."""

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np

from data.miniature.documents import write_document
from data.miniature.language import language
from data.miniature.questions import absent_pairs, ask
from data.miniature.sampling import SceneOptions, draw_scene
from data.miniature.scene import HELD_OUT, SIZES, Box, Scene, Shape

Record = dict[str, Any]
Maker = Callable[[np.random.Generator, str, Sequence[str]], tuple[Record, Scene | None]]

ENGLISH_SHARE = 0.35  # of questions, and of alt-texts; the other languages share the rest
MOSTLY_SIGNS = SceneOptions(sign_share=0.8)
SIMPLE = (0.55, 0.27, 0.18)  # shares of scenes with 1, 2 and 3 shapes: one shape alone teaches what its name means
SOME_SIGNS = SceneOptions(sign_share=0.2, num_shapes=SIMPLE)
# A quarter has a sign and then one or two shapes; these weights make 1, 2 and 3 equally frequent over all.
COUNTABLE = SceneOptions(sign_share=0.25, num_shapes=(5 / 18, 5 / 18, 4 / 9))


def _webli(rng: np.random.Generator, split: str, codes: Sequence[str]) -> tuple[Record, Scene]:
    scene = draw_scene(rng, MOSTLY_SIGNS, split)
    code = _draw_language(rng, codes)
    spoken = language(code)
    wording = spoken.table["alt_texts"][rng.integers(len(spoken.table["alt_texts"]))]
    alt_text = wording.format(objects=spoken.objects(scene, with_size=bool(rng.random() < 0.7)))
    record: Record = {"language": code, "alt_text": alt_text}
    if scene.sign:
        sign = scene.sign
        record["ocr"] = [{"text": sign.word, "language": sign.language, "box": _rounded(sign.box)}]
    return record, scene


def _cc3m_35l(rng: np.random.Generator, split: str, codes: Sequence[str]) -> tuple[Record, Scene]:
    scene = draw_scene(rng, SOME_SIGNS, split)
    return {"captions": {code: language(code).objects(scene) for code in codes}}, scene


def _vq2a(rng: np.random.Generator, split: str, codes: Sequence[str]) -> tuple[Record, Scene]:
    scene = draw_scene(rng, COUNTABLE, split)
    questions = []
    for question in ask(rng, scene, split):
        code = _draw_language(rng, codes)
        text = question.text(language(code), int(rng.integers(1 << 16)))
        questions.append({"language": code, "question": text, "answer": question.answer})
    return {"questions": questions}, scene


def _objects(rng: np.random.Generator, split: str, codes: Sequence[str]) -> tuple[Record, Scene]:
    scene = draw_scene(rng, SOME_SIGNS, split)
    absent = absent_pairs(rng, scene, split, int(rng.integers(3, 6)))
    return {
        "objects": [{"label": shape.label, "box": _rounded(shape.box)} for shape in scene.shapes],
        "absent_labels": [f"{colour} {kind}" for colour, kind in absent],
    }, scene


def _text(rng: np.random.Generator, split: str, codes: Sequence[str]) -> tuple[Record, None]:
    code = codes[int(rng.integers(len(codes)))]
    return {"language": code, "text": write_document(rng, language(code), split)}, None


MAKERS: dict[str, Maker] = {
    "webli": _webli,
    "cc3m_35l": _cc3m_35l,
    "vq2a": _vq2a,
    "objects": _objects,
    "text": _text,
}


def names_held_out(record: Record) -> bool:
    """Whether a record's texts, in whatever language, name a held-out pair (questions and answers included)."""
    texts = [("en", label) for label in record.get("absent_labels", [])]
    texts += [("en", entry["label"]) for entry in record.get("objects", [])]
    texts += list(record.get("captions", {}).items())
    for entry in record.get("questions", []):
        texts += [(entry["language"], entry["question"]), ("en", entry["answer"])]
    texts += [(record["language"], record[name]) for name in ("alt_text", "text") if name in record]
    return any(_held_out_phrases(code).search(text) for code, text in texts)


@cache
def _held_out_phrases(code: str) -> re.Pattern[str]:
    """Finds any noun phrase of the held-out pairs in one language, or, in English, their labels."""
    spoken = language(code)
    shapes = [Shape(colour, kind, size, 0.5, 0.5, 0.0) for colour, kind in sorted(HELD_OUT) for size in SIZES]
    phrases = {spoken.phrase(shape, with_size) for shape in shapes for with_size in (False, True)}
    if code == "en":
        phrases |= {shape.label for shape in shapes}
    either = "|".join(map(re.escape, sorted(phrases)))
    # Whole words only (Hebrew's cross ends in its heart), but "and" may be written together with the next word.
    joined = re.escape(str(spoken.table["and"]).strip())
    return re.compile(rf"(?<!\w)(?:{joined})?(?:{either})(?!\w)" if spoken.spaced else either)


def _draw_language(rng: np.random.Generator, codes: Sequence[str]) -> str:
    others = [code for code in codes if code != "en"]
    if "en" in codes and (not others or rng.random() < ENGLISH_SHARE):
        return "en"
    return others[int(rng.integers(len(others)))]


def _rounded(box: Box) -> list[float]:
    return [round(value, 4) for value in box]
