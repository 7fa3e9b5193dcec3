"""Scenes, language tables and questions before anything is written."""

from collections import Counter, defaultdict

import numpy as np
import pytest

from data.miniature.language import CODES, language, sign_words
from data.miniature.questions import Question, ask, outermost
from data.miniature.records import COUNTABLE, SOME_SIGNS
from data.miniature.render import render
from data.miniature.sampling import draw_scene
from data.miniature.scene import COLORS, KINDS, PAIRS, SIZES, Scene, Shape, held_out_together, uses_held_out
from data.miniature.text_image import sign_extent, visual_order, word_mask

GRAY = ((150, 150, 150), (150, 150, 150))


def questions_of(split: str, num_scenes: int) -> list[Question]:
    rng = np.random.default_rng(0)
    return [question for _ in range(num_scenes) for question in ask(rng, draw_scene(rng, COUNTABLE, split))]


def test_scenes_follow_the_held_out_rule() -> None:
    things = [Shape(*pair, size, 0.5, 0.5, 0.0) for pair in PAIRS for size in SIZES]
    for thing in things:
        assert sum(held_out_together(thing, other) for other in things) == len(things) / 7
    rng = np.random.default_rng(0)
    for split in ("train", "validation", "test"):
        for _ in range(300):
            scene = draw_scene(rng, SOME_SIGNS, split)
            assert uses_held_out(scene.shapes) == (split == "test")
            for shape in scene.shapes:
                assert min(shape.box) > 0 and max(shape.box) < 1


def test_blind_guessing_gains_little() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    english = language("en")
    for question in questions_of("train", 6000):
        answers[question.text(english, 0)][question.answer] += 1
    asked = questions_of("test", 1000)
    best = {text: counts.most_common(1)[0][0] for text, counts in answers.items()}
    blind = float(np.mean([best.get(question.text(english, 0)) == question.answer for question in asked]))
    print(f"blind accuracy {blind:.3f} over {len(asked)} questions")
    assert blind < 0.35


def test_answers_are_balanced() -> None:
    questions = questions_of("train", 4000)
    shares = {name: count / len(questions) for name, count in Counter(q.template for q in questions).items()}
    assert 0.005 < shares["size"] < 0.04 and 0.005 < shares["exists"] < 0.04
    assert 0.3 < shares["color"] < 0.42 and 0.18 < shares["shape"] < 0.3
    assert 0.1 < shares["what_at"] + shares["color_at"] + shares["shape_at"] < 0.2
    assert 0.11 < shares["count"] + shares["count_color"] < 0.2
    for template, most in {"exists": 0.55, "size": 0.56, "count": 0.53, "count_color": 0.55, "color": 0.19}.items():
        answers = Counter(question.answer for question in questions if question.template == template)
        assert max(answers.values()) / sum(answers.values()) < most, (template, answers)


def test_ambiguous_questions_are_not_asked() -> None:
    twins = (Shape("red", "circle", "small", 0.5, 0.3, 0.0), Shape("blue", "circle", "small", 0.51, 0.8, 0.0))
    scene = Scene(twins, None, GRAY)
    assert set(outermost(scene)) == {"left", "right"}
    for seed in range(50):
        templates = {question.template for question in ask(np.random.default_rng(seed), scene)}
        assert not templates & {"color", "size"}


@pytest.mark.parametrize("code", CODES)
def test_language_tables_are_complete(code: str) -> None:
    """Every slot of every phrase and question is filled, and different things have different names."""
    spoken = language(code)
    shapes = [Shape(color, kind, size, 0.5, 0.5, 0.0) for color in COLORS for kind in KINDS for size in SIZES]
    assert len({spoken.phrase(shape) for shape in shapes}) == len(shapes)
    for question in questions_of("train", 100):
        for wording in range(3):
            text = question.text(spoken, wording)
            assert "{" not in text and "  " not in text
    for where in ("left", "right", "top", "bottom"):
        assert "{phrase}" in spoken.table["document"][where]
    assert len(spoken.table["document"]["count"]) == 3
    assert len(spoken.table["document"]["facts"]) == 9


def test_german_and_russian_agree() -> None:
    star, heart = (Shape("blue", kind, "large", 0.5, 0.5, 0.0) for kind in ("star", "heart"))
    assert language("de").phrase(star) == "ein großer blauer Stern"
    assert language("de").phrase(heart) == "ein großes blaues Herz"
    assert language("ru").phrase(star) == "большая синяя звезда"
    assert language("ru").phrase(heart) == "большое синее сердце"


def test_sign_words_belong_to_one_language_and_fit() -> None:
    words = [word for word, _ in sign_words()]
    assert len(set(words)) == len(words)
    assert all(3 <= len(word) <= 7 for word in words)
    assert all(max(sign_extent(word)) < 0.94 for word in words)


@pytest.mark.parametrize("word, code", sign_words())
def test_every_sign_has_ink(word: str, code: str) -> None:
    share = np.asarray(word_mask(word)).mean() / 255
    assert 0.1 < share < 0.8, (word, code)


def test_arabic_is_shaped_and_turned() -> None:
    shown = visual_order("كتاب")
    assert shown != "كتاب"
    assert all("\ufb50" <= letter <= "\ufefc" for letter in shown)  # presentation forms: the letters join
    assert shown[-1] == "\ufedb"  # the first letter, kaf in its initial form, is the rightmost


def test_shapes_are_drawn_in_their_boxes() -> None:
    for kind in KINDS:
        shape = Shape("red", kind, "large", 0.5, 0.4, 0.1)
        pixels = np.asarray(render(Scene((shape,), None, GRAY), 112), dtype=np.int32)
        rows, columns = np.nonzero(pixels[..., 0] - pixels[..., 1] > 90)
        found = np.array([rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]) / 112
        assert np.abs(found - shape.box).max() < 1.6 / 112, kind
