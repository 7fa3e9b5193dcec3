"""Write text-only documents: descriptions of scenes in one language, between simple facts."""

import numpy as np

from data.miniature.language import Language
from data.miniature.questions import absent_pairs, outermost
from data.miniature.sampling import SceneOptions, draw_scene
from data.miniature.scene import Scene, Shape

DESCRIBED = SceneOptions(sign_share=0.4)


def write_document(rng: np.random.Generator, language: Language, split: str) -> str:
    """Describe two scenes in full, each with a fact or two after it: some 40 to 120 words."""
    sentences: list[str] = []
    for _ in range(2):
        sentences += _describe(rng, language, draw_scene(rng, DESCRIBED, split))
        facts = language.table["document"]["facts"]
        sentences += [facts[index] for index in rng.permutation(len(facts))[: int(rng.integers(1, 3))]]
    return language.sentence_break.join(sentences)


def _describe(rng: np.random.Generator, language: Language, scene: Scene) -> list[str]:
    table = language.table["document"]
    opening = table["openings"][rng.integers(len(table["openings"]))]
    sentences = [opening.format(objects=language.objects(scene)), table["count"][len(scene.shapes) - 1]]
    places = [table[where].format(phrase=language.phrase(shape)) for where, shape in outermost(scene).items()]
    sentences += [places[index] for index in rng.permutation(len(places))[:2]]
    if scene.sign:
        sentences.append(table["sign"].format(word=scene.sign.word))
    shape, answer = scene.shapes[rng.integers(len(scene.shapes))], table["affirm"]
    if rng.random() < 0.5:
        color, kind = absent_pairs(rng, scene, 1)[0]
        shape, answer = Shape(color, kind, "small", 0.5, 0.5, 0.0), table["deny"]
    question = language.table["questions"]["exists"][0].format(phrase=language.phrase(shape, with_size=False))
    return [*sentences, question, answer]
