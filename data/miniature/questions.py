"""Ask questions with exactly one right answer, balanced so that guesses without the image are rarely right."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from data.miniature.language import Language
from data.miniature.scene import PAIRS, Pair, Scene, Shape

SEPARATION = 0.3  # fraction of the image: the least distance of the thing “on the left” (…) to any other
SIZE_SHARE = 0.05  # of the records that can ask for a size
EXISTS_SHARE = 0.05
# Three shapes of one color are rarer than one. With these shares the answers 1, 2 and 3 are equally frequent.
COUNT_COLOR_SHARE = {1: 0.09, 2: 0.3, 3: 1.0}


@dataclass(frozen=True)
class Question:
    """Hold a question before it is put into words: `template` names its wordings, the other fields fill the slots."""

    template: str
    answer: str
    color: str = ""
    kind: str = ""
    where: str = ""
    phrase: Shape | None = None

    def text(self, language: Language, wording: int) -> str:
        """Put the question into words; `wording` picks one of the language's wordings."""
        wordings = language.table["questions"][self.template]
        form = "figures" if self.template == "count_color" else "figure"
        return str(wordings[wording % len(wordings)]).format(
            color=language.color(self.color, form) if self.color else "",
            shape=language.definite(self.kind) if self.kind else "",
            where=language.table["where"][self.where] if self.where else "",
            phrase=language.phrase(self.phrase, with_size=False) if self.phrase else "",
        )


def ask(rng: np.random.Generator, scene: Scene) -> list[Question]:
    """Return different questions about the scene: three for one shape, at most five for two, six for three."""
    wanted = len(scene.shapes) + 2 + int(rng.integers(2)) * (len(scene.shapes) > 1)
    chosen: list[Question] = []
    if rng.random() < EXISTS_SHARE:
        chosen.append(_exists(rng, scene))
    sizes = _sizes(scene)
    if sizes and rng.random() < SIZE_SHARE:
        chosen.append(_pick(rng, sizes))
    families = [(family(rng, scene), share) for family, share in _FAMILIES]
    while len(chosen) < wanted and any(questions for questions, _ in families):
        for index in rng.permutation(len(families)):
            questions, share = families[index]
            if questions and len(chosen) < wanted and rng.random() < share:
                question = _pick(rng, questions)
                questions.remove(question)
                chosen.append(question)
    return [chosen[index] for index in rng.permutation(len(chosen))]


def _pick(rng: np.random.Generator, questions: list[Question]) -> Question:
    return questions[rng.integers(len(questions))]


def _sizes(scene: Scene) -> list[Question]:
    return [Question("size", shape.size, kind=shape.kind) for shape in _unique(scene, lambda shape: shape.kind)]


def _colors(rng: np.random.Generator, scene: Scene) -> list[Question]:
    return [Question("color", shape.color, kind=shape.kind) for shape in _unique(scene, lambda shape: shape.kind)]


def _shapes(rng: np.random.Generator, scene: Scene) -> list[Question]:
    return [Question("shape", shape.kind, color=shape.color) for shape in _unique(scene, lambda shape: shape.color)]


def _positions(rng: np.random.Generator, scene: Scene) -> list[Question]:
    questions = []
    for where, shape in outermost(scene).items():
        answers = {"what_at": shape.label, "color_at": shape.color, "shape_at": shape.kind}
        template = list(answers)[rng.integers(len(answers))]
        questions.append(Question(template, answers[template], where=where))
    return questions


def _counts(rng: np.random.Generator, scene: Scene) -> list[Question]:
    questions = [Question("count", str(len(scene.shapes)))]
    for color, number in Counter(shape.color for shape in scene.shapes).items():
        if rng.random() < COUNT_COLOR_SHARE[number]:
            questions.append(Question("count_color", str(number), color=color))
    return questions


# Kinds of questions and their shares. The largest have those that need a word of the question and the image.
_FAMILIES: tuple[tuple[Callable[[np.random.Generator, Scene], list[Question]], float], ...] = (
    (_colors, 1.0),
    (_shapes, 1.0),
    (_positions, 0.3),
    (_counts, 0.25),
)


def _exists(rng: np.random.Generator, scene: Scene) -> Question:
    if rng.random() < 0.5:
        return _pick(rng, [Question("exists", "yes", phrase=shape) for shape in scene.shapes])
    color, kind = absent_pairs(rng, scene, 1)[0]
    return Question("exists", "no", phrase=Shape(color, kind, "small", 0.5, 0.5, 0.0))


def outermost(scene: Scene) -> dict[str, Shape]:
    """Find the shapes that are clearly the furthest left, right, up and down, by SEPARATION from shapes and sign."""
    if len(scene.shapes) < 2:
        return {}
    things = [*scene.shapes, *([scene.sign] if scene.sign else [])]
    found = {}
    for where, axis, direction in (("left", "x", 1), ("right", "x", -1), ("top", "y", 1), ("bottom", "y", -1)):
        ranked = sorted(things, key=lambda thing: direction * float(getattr(thing, axis)))
        first, second = ranked[:2]
        if isinstance(first, Shape) and abs(getattr(second, axis) - getattr(first, axis)) >= SEPARATION:
            found[where] = first
    return found


def absent_pairs(rng: np.random.Generator, scene: Scene, number: int) -> list[Pair]:
    """Draw pairs that are not in the scene, half of them near misses."""
    present = {shape.pair for shape in scene.shapes}
    absent = [pair for pair in PAIRS if pair not in present]
    near = [pair for pair in absent if any(pair[0] == color or pair[1] == kind for color, kind in present)]
    chosen: list[Pair] = []
    while len(chosen) < number:
        pool = near if rng.random() < 0.5 else absent
        pair = pool[rng.integers(len(pool))]
        if pair not in chosen:
            chosen.append(pair)
    return chosen


def _unique(scene: Scene, attribute: Callable[[Shape], str]) -> list[Shape]:
    """Return the shapes that share the attribute with no other."""
    counts = Counter(attribute(shape) for shape in scene.shapes)
    return [shape for shape in scene.shapes if counts[attribute(shape)] == 1]
