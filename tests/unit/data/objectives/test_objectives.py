"""Prompts are the paper's, word for word, and targets can be read back."""

import numpy as np
import pytest

from common.errors import ConfigurationError
from data import objectives
from data.fields import Word
from data.objectives import detection, object_vqa, ocr, split_captioning
from data.objectives.base import Example
from data.skip import Skip
from tests.unit.data.conftest import record


def make(name: str, fields: dict, seed: int = 0, tokenizer=None, **options) -> Example:
    return objectives.load(name).make(fields, np.random.default_rng(seed), objectives.options(name, options), tokenizer)


def test_objectives_are_numbered_for_good():
    assert objectives.NAMES == (
        "span_corruption",
        "split_captioning",
        "captioning",
        "ocr",
        "vqa",
        "vqg",
        "object_vqa",
        "detection",
        "task",
        "labels",
    )


@pytest.mark.parametrize("name", objectives.NAMES)
def test_an_example_is_a_pure_function_of_record_and_seed(name, tokenizer):
    assert make(name, record(3), 5, tokenizer) == make(name, record(3), 5, tokenizer)
    assert len({str(make(name, record(3), seed, tokenizer)) for seed in range(20)}) > 1


@pytest.mark.parametrize("name", objectives.NAMES)
def test_a_record_of_another_kind_is_skipped_without_blame(name, tokenizer):
    with pytest.raises(Skip) as skip:
        make(name, {}, tokenizer=tokenizer)
    assert not skip.value.defect


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("split_captioning", {"alt_text": "  "}),
        ("captioning", {"captions": {"en": ""}}),
        ("span_corruption", {"text": "\n"}),
        ("vqa", {"questions": [{"language": "en", "question": "", "answer": "x"}]}),
    ],
)
def test_an_empty_text_is_a_defect(name, fields, tokenizer):
    with pytest.raises(Skip) as skip:
        make(name, fields, tokenizer=tokenizer)
    assert skip.value.defect


def test_captioning_prompt():
    example = make("captioning", {"captions": {"de": "ein Hund"}})
    assert example.input_text == "Generate the alt_text in DE at 0: <extra_id_0>"
    assert (example.target_text, example.language, example.image) == ("ein Hund", "de", True)


def test_language_codes_follow_the_paper_and_the_options():
    hebrew = {"captions": {"he": "כלב"}}
    assert make("captioning", hebrew).input_text == "Generate the alt_text in IW at 0: <extra_id_0>"
    lower = make("captioning", hebrew, language_case="lower")
    assert lower.input_text == "Generate the alt_text in iw at 0: <extra_id_0>"
    both = {"captions": {"de": "ein Hund", "fr": "un chien"}}
    assert {make("captioning", both, seed, languages=["fr"]).language for seed in range(9)} == {"fr"}


def test_split_captioning_prompt_counts_the_words_given():
    text = "a dog on the beach"
    examples = {make("split_captioning", {"alt_text": text, "language": "en"}, seed) for seed in range(60)}
    assert {(example.input_text, example.target_text) for example in examples} == {
        ("Generate the alt_text in EN at 0: <extra_id_0>", "a dog on the beach"),
        ("Generate the alt_text in EN at 1: a <extra_id_0>", "dog on the beach"),
        ("Generate the alt_text in EN at 2: a dog <extra_id_0>", "on the beach"),
        ("Generate the alt_text in EN at 3: a dog on <extra_id_0>", "the beach"),
        ("Generate the alt_text in EN at 4: a dog on the <extra_id_0>", "beach"),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a dog,  on a beach", ["a ", "dog,  ", "on ", "a ", "beach"]),
        (" Grüße\u00a0an\x1calle ", ["Grüße\u00a0", "an\x1c", "alle "]),
        ("红色圆形", ["红", "色", "圆", "形"]),
        ("iPhone 手机壳 15", ["iPhone ", "手", "机", "壳 ", "15"]),
        ("กำลัง", ["ก", "ำ", "ลั", "ง"]),  # SARA AM is a letter to Unicode, not a mark
        ("赤いPC机", ["赤", "い", "PC", "机"]),
        ("दो कुत्ते", ["दो ", "कुत्ते"]),
    ],
)
def test_a_word_of_an_unspaced_script_is_a_character_with_its_marks(text, words):
    starts = split_captioning.word_starts(text)
    ends = [*starts[1:], len(text)]
    assert [text[start:end] for start, end in zip(starts, ends, strict=True)] == words


BLOCKS = ("\u0e00\u0eff", "\u1000\u109f", "\u1780\u17ff", "\u3040\u30ff", "\u3400\u4dbf", "\u4e00\u9fff",
          "\uf900\ufaff", "\U00020000\U000323af")  # fmt: skip


@pytest.mark.parametrize(("first", "last"), BLOCKS)
def test_unspaced_scripts_begin_and_end_with_their_unicode_blocks(first, last):
    for character in (first, last):
        assert split_captioning.word_starts(f"a{character}b") == [0, 1, 2], hex(ord(character))
    for character in (chr(ord(first) - 1), chr(ord(last) + 1)):
        assert split_captioning.word_starts(f"a{character}b") == [0], hex(ord(character))


def test_ocr_prompt_and_reading_order():
    def item(text, ymin, xmin, language="en"):
        return {"text": text, "language": language, "box": [ymin, xmin, ymin + 0.1, xmin + 0.1]}

    items = [item("four", 0.6, 0.1), item("two", 0.10, 0.5), item("three", 0.3, 0.3), item("one", 0.11, 0.1)]
    example = make("ocr", {"ocr": [*items, item("Ausgang", 0.0, 0.0, "de")]}, languages=["en"])
    assert example.input_text == "Generate the ocr_text in EN: <extra_id_0>"
    assert example.target_text == "one two three four"
    words = [Word(each["text"], "en", each["box"]) for each in items]
    assert [word.text for word in ocr.reading_order(words)] == ["one", "two", "three", "four"]
    unplaced = [*words[:2], Word("lost", "en", None), *words[2:]]  # it has no place
    assert ocr.reading_order(unplaced) == unplaced


def test_vqa_and_vqg_prompts_are_cross_lingual():
    fields = {"questions": [{"language": "fr", "question": "Quel animal ?", "answer": "dog"}]}
    answer = make("vqa", fields)
    assert (answer.input_text, answer.target_text) == ("Answer in EN: Quel animal ? <extra_id_0>", "dog")
    question = make("vqg", fields)
    assert question.input_text == "Generate a question in FR for dog: <extra_id_0>"
    assert (question.target_text, question.language) == ("Quel animal ?", "fr")


def test_every_wording_travels_as_a_reference_and_the_item_is_named():
    fields = {"questions": [{"question": "Color?", "answer": ["red", "crimson"], "language": "en"}],
              "captions": {"de": ["ein Hund", "ein Tier"]}}  # fmt: skip
    answered = make("vqa", fields)
    assert answered.references == ("red", "crimson") and answered.target_text in answered.references
    assert answered.item == "0"
    captioned = make("captioning", fields)
    assert captioned.references == ("ein Hund", "ein Tier") and captioned.item == "de"


def test_object_vqa_asks_in_the_four_ways_and_answers_truly():
    fields = {
        "objects": [{"label": "cat", "box": [0, 0, 1, 1]}, {"label": "dog", "box": [0, 0, 1, 1]}],
        "absent_labels": ["cow"],
    }
    present, yes_no, kinds = {"cat", "dog"}, [], set()
    for seed in range(400):
        example = make("object_vqa", fields, seed)
        text, answer = example.input_text, object_vqa.read(example.target_text)
        assert text.startswith("Answer in EN: ") and text.endswith(" <extra_id_0>")
        question = text.removeprefix("Answer in EN: ").removesuffix(" <extra_id_0>")
        if question == "List the objects present:":
            kinds.add("list")
            assert answer == ["cat", "dog"]
        elif question.startswith("Which of "):
            kinds.add("which")
            asked = question.removeprefix("Which of ").removesuffix(" are in the image?").split(", ")
            assert answer == [label for label in asked if label in present] and "cow" in asked and len(answer) > 0
        else:
            asked = question.removeprefix("Is ").removesuffix(" in the image?").split(", ")
            kinds.add("one" if len(asked) == 1 else "all")
            assert answer == (["Yes"] if present.issuperset(asked) else ["No"])
            yes_no += answer
    assert kinds == {"list", "one", "all", "which"}
    assert 0.4 < yes_no.count("Yes") / len(yes_no) < 0.6


def test_detection_prompt_names_absent_classes_too_and_the_target_is_numbers():
    fields = {
        "objects": [
            {"label": "cat", "box": [0.01, 0.02, 0.09, 0.1]},
            {"label": "red dog", "box": [0, 0.5, 1.0, 0.999]},
        ],
        "absent_labels": ["cow", "sheep"],
    }
    example = make("detection", fields, order="reading")
    assert example.target_text == "0 500 999 999 red dog 10 20 90 100 cat"
    prompts = {make("detection", fields, seed).input_text for seed in range(100)}
    classes = [set(prompt.removeprefix("detect ").split(" and ")) for prompt in prompts]
    assert all({"cat", "red dog"} <= each <= {"cat", "red dog", "cow", "sheep"} for each in classes)
    assert {"cat", "red dog"} in classes and {"cat", "red dog", "cow", "sheep"} in classes
    assert {make("detection", fields, seed).target_text.count("cat") for seed in range(9)} == {1}


def test_detection_reads_back_what_it_wrote():
    rng = np.random.default_rng(0)
    labels = ["cat", "red circle", "2 door car", "traffic light"]
    for _ in range(50):
        corners = np.sort(rng.random((5, 2, 2)), axis=1)
        objects = [{"label": labels[int(rng.integers(4))], "box": pair.reshape(-1).tolist()} for pair in corners]
        boxes = detection.read(make("detection", {"objects": objects}, order="reading").target_text)
        expected = sorted(objects, key=lambda item: item["box"][:2])
        assert [box.label for box in boxes] == [item["label"] for item in expected]
        assert np.abs(np.array([box[:4] for box in boxes]) - [item["box"] for item in expected]).max() <= 0.0005001


@pytest.mark.parametrize("text", ["", "dog", "1 2 3 dog", "there is no 5 cat"])
def test_detection_reads_no_box_out_of_nonsense(text):
    assert detection.read(text) == []


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("captioning", {"languages": [False, "da"]}, r"languages\[0\]=False must be text; .* 'no'"),
        ("captioning", {"languages": ["en", 7]}, r"languages\[1\]=7 must be text"),
        ("captioning", {"languages": "den"}, "languages='den' must be a list"),
        ("captioning", {"languages": []}, "leaves none"),
        ("captioning", {"languages": ["en", "en glish"]}, "'en glish', which is no code"),
        ("ocr", {"language_case": True}, "language_case=True must be text"),
        ("detection", {"labels": "zebra"}, "labels='zebra' must be a list"),
        ("object_vqa", {"labels": [None]}, r"labels\[0\]=None must be text"),
        ("detection", {"labels": ["dog", " "]}, "labels holds a blank one"),
        ("detection", {"max_negatives": -1}, "max_negatives=-1 must be 0 or more"),
        ("detection", {"max_negatives": 1.5}, "max_negatives: Value '1.5'"),
        ("detection", {"order": "sideways"}, "order='sideways'"),
        ("object_vqa", {"max_objects": True}, "max_objects=True must be a number"),
        ("object_vqa", {"max_objects": 1}, "max_objects=1"),
        ("span_corruption", {"input_length": 100.5}, "input_length: Value '100.5'"),
        ("span_corruption", {"input_length": 2}, "input_length=2 must be 3 or more"),
        ("span_corruption", {"mean_span_length": float("nan")}, "mean_span_length=nan must be a finite number"),
        ("span_corruption", {"noise_density": 1.0}, "noise_density=1.0 must lie in"),
        ("span_corruption", {"noise_density": "much"}, "noise_density: Value 'much'"),
        ("object_vqa", {"languages": ["de"]}, "languages is not an option of object_vqa; did you mean language_case"),
        (
            "detection",
            {"languages": ["de"]},
            "languages is not an option of detection; known here: .*labels",
        ),
        ("detection", {"language_case": "lower"}, "language_case is not an option of detection"),
        ("span_corruption", {"language_case": "lower"}, "language_case is not an option of span_corruption"),
    ],
)
def test_options_are_typed_and_none_is_ignored(name, options, message):
    with pytest.raises(ConfigurationError, match=rf"options\..*{message}"):
        objectives.options(name, options)


def test_options_of_the_right_kind():
    assert objectives.options("captioning", {"languages": ["no", "he"]}).uses("iw")
    assert objectives.options("captioning", {"languages": None}).uses("xx")
    assert objectives.options("span_corruption", {"noise_density": 0.5, "mean_span_length": 2}).mean_span_length == 2.0


def test_negatives_come_from_the_labels_where_a_record_names_none_absent():
    fields = {"objects": [{"label": "dog", "box": [0, 0, 1, 1]}]}
    labels = ["dog", "cat", "cow"]
    asked = " ".join(make("detection", fields, seed, labels=labels).input_text for seed in range(30))
    assert "cat" in asked and "cow" in asked and "dog and dog" not in asked
    answers = {make("object_vqa", fields, seed, labels=labels).target_text for seed in range(60)}
    assert answers == {"dog", "Yes", "No"}
    assert {make("object_vqa", fields, seed).target_text for seed in range(30)} == {"dog"}
    named = fields | {"absent_labels": ["fox"]}
    assert not any("cow" in make("detection", named, seed, labels=labels).input_text for seed in range(30))


@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_prompt_names_as_many_absent_classes_as_allowed_at_most(most):
    fields = {"objects": [{"label": "dog", "box": [0, 0, 1, 1]}]}
    labels = ["cat", "cow", "fox", "hen"]
    prompts = [make("detection", fields, seed, labels=labels, max_negatives=most).input_text for seed in range(40)]
    assert {sum(label in prompt for label in labels) for prompt in prompts} == {*range(most + 1)}


def test_an_option_that_does_not_exist_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match=r"langages is not an option of ocr; did you mean languages\?"):
        objectives.options("ocr", {"langages": ["en"]})
    with pytest.raises(ConfigurationError, match="language_case"):
        objectives.options("ocr", {"language_case": "title"})


def test_detection_leaves_out_whole_boxes_that_a_row_cannot_hold(tokenizer):
    labels = ["cat", "red circle", "2 door car", "traffic light"]
    objects = [{"label": labels[i % 4], "box": [i / 100, 0.1, 0.5, 0.75]} for i in range(16)]
    whole = make("detection", {"objects": objects}, order="reading").target_text
    first = len(tokenizer.encode(detection.box_text(objects[0]["box"], "cat")))
    for length in (2, first, first + 1, *range(first + 2, 120, 7)):
        options = objectives.options("detection", {"order": "reading"}).for_rows(64, length)
        rng = np.random.default_rng(length)
        if length <= first:
            with pytest.raises(Skip, match="no box fits a row") as skip:
                detection.make({"objects": objects}, rng, options, tokenizer)
            assert not skip.value.defect
            continue
        example = detection.make({"objects": objects}, rng, options, tokenizer)
        kept = detection.read(example.target_text)
        assert example.target_ids == tokenizer.encode(example.target_text) and len(example.target_ids) < length
        assert whole.startswith(example.target_text + " ") and [box.label for box in kept] == (labels * 4)[: len(kept)]
        assert set(example.input_text.removeprefix("detect ").split(" and ")) == {box.label for box in kept}
        longer = detection.box_text(objects[len(kept)]["box"], labels[len(kept) % 4])
        assert len(tokenizer.encode(f"{example.target_text} {longer}")) >= length


def test_object_vqa_does_not_list_a_part(tokenizer):
    fields = {"objects": [{"label": f"thing number {number}"} for number in range(9)]}
    example = make("object_vqa", fields, tokenizer=tokenizer)
    length = len(tokenizer.encode(example.target_text)) + 1
    for rows, fits in (((64, length), True), ((64, length - 1), False)):
        options = objectives.options("object_vqa", {}).for_rows(*rows)
        if fits:
            made = object_vqa.make(fields, np.random.default_rng(0), options, tokenizer)
            assert made.target_text == example.target_text
        else:
            with pytest.raises(Skip, match="answer longer than a row"):
                object_vqa.make(fields, np.random.default_rng(0), options, tokenizer)
