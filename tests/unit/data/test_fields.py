"""What a record holds is taken as docs/data.md lists it, or is missing, or is malformed; nothing is guessed."""

import json

import numpy as np
import pytest

from common.errors import ConfigurationError
from data import fields, languages, objectives
from data.fields import Malformed
from data.objectives.base import Example
from data.skip import Skip

DEEP = 200_000
SURROGATE = "a fine dog \ud83d"


def make(name: str, record: dict, seed: int = 0, tokenizer=None, **options) -> Example:
    made = objectives.options(name, options)
    return objectives.load(name).make(record, np.random.default_rng(seed), made, tokenizer)


def of_object(**item) -> dict:
    return {"objects": [{"label": "dog", "box": [0.1, 0.2, 0.3, 0.4]}, item]}


def of_box(box) -> dict:
    return {"objects": [{"label": "dog", "box": box}], "ocr": [{"text": "EXIT", "language": "en", "box": box}]}


NO_TEXT = [5, 1.5, True, {"en": "a dog"}, [["a dog"]], ["a dog", 5], SURROGATE, ["a dog", SURROGATE]]
NO_BOX = [
    [40, 100, 200, 300],  # pixels
    [0.9, 0.8, 0.1, 0.2],  # corners swapped
    [0.1, 0.8, 0.9, 0.2],
    [0.1, 0.1, 0.5],
    [0.1, 0.1, 0.5, 0.5, 0.5],
    [0.1, 0.1, float("inf"), 0.5],
    [0.1, float("nan"), 0.4, 0.5],
    [0.1, 0.1, 10**400, 0.5],
    [0.1, 0.1, 1.001, 0.5],
    [-0.001, 0.1, 0.5, 0.5],
    [False, 0.1, 0.5, True],
    ["0.1", "0.1", "0.5", "0.5"],
    [0.1, 0.1, None, 0.5],
    {"ymin": 0.1},
    "0.1 0.1 0.5 0.5",
    [],
    0.5,
]


@pytest.mark.parametrize("value", NO_TEXT)
@pytest.mark.parametrize(
    ("name", "field", "record"),
    [
        ("split_captioning", "alt_text", lambda value: {"alt_text": value}),
        ("captioning", "captions", lambda value: {"captions": {"en": value}}),
        ("span_corruption", "text", lambda value: {"text": value}),
        ("vqa", "questions.answer", lambda value: {"questions": [{"question": "why?", "answer": value}]}),
        ("vqg", "questions.question", lambda value: {"questions": [{"question": value, "answer": "so"}]}),
        ("ocr", "ocr.text", lambda value: {"ocr": [{"text": value}]}),
        ("detection", "objects.label", lambda value: of_object(label=value, box=[0, 0, 1, 1])),
        ("object_vqa", "objects.label", lambda value: of_object(label=value)),
        ("object_vqa", "absent_labels", lambda value: of_object(label="cat") | {"absent_labels": [value]}),
    ],
)
def test_only_text_is_text(name, field, record, value, tokenizer):
    with pytest.raises(Malformed) as found:
        make(name, record(value), tokenizer=tokenizer)
    assert found.value.defect and found.value.cause == f"malformed {field}"
    assert f"{field} is " in found.value.detail and len(found.value.detail) < 250


@pytest.mark.parametrize("box", NO_BOX, ids=str)
def test_a_box_is_four_fractions_in_order(box):
    for name, field in (("detection", "objects.box"), ("ocr", "ocr.box")):
        with pytest.raises(Malformed) as found:
            make(name, of_box(box))
        assert found.value.cause == f"malformed {field}" and len(found.value.detail) < 250
    assert make("object_vqa", of_box(box)).target_text == "dog"  # it looks at no box


@pytest.mark.parametrize("box", [[0, 0, 1, 1], [0.0, 0.0, 1.0000001, 1.0], (0.1, 0.1, 0.1, 0.5)])
def test_whole_images_roundings_and_lines_are_boxes(box):
    assert make("ocr", of_box(box)).target_text == "EXIT"


@pytest.mark.parametrize(
    ("name", "field", "record"),
    [
        ("captioning", "captions", {"captions": ["a dog"]}),
        ("captioning", "captions", {"captions": "a dog"}),
        ("captioning", "captions", {"captions": {"not a code": "a dog"}}),
        ("split_captioning", "language", {"alt_text": "a dog", "language": 5}),
        ("split_captioning", "language", {"alt_text": "a dog", "language": ["en"]}),
        ("vqa", "questions", {"questions": {"question": "why?", "answer": "so"}}),
        ("vqa", "questions", {"questions": ["why?"]}),
        ("vqa", "questions.language", {"questions": [{"language": 7, "question": "why?", "answer": "so"}]}),
        ("ocr", "ocr", {"ocr": "EXIT"}),
        ("ocr", "ocr.language", {"ocr": [{"text": "EXIT", "language": {}}]}),
        ("detection", "objects", {"objects": ["dog"]}),
        ("detection", "objects.label", of_object(label=" ")),
        ("detection", "objects.label", of_object(label=["dog", "puppy"])),
        ("detection", "absent_labels", of_object(label="cat") | {"absent_labels": "zebra"}),
        ("object_vqa", "absent_labels", of_object(label="cat") | {"absent_labels": ["cow", ""]}),
    ],
)
def test_another_kind_of_value_is_malformed(name, field, record):
    with pytest.raises(Malformed) as found:
        make(name, record)
    assert found.value.cause == f"malformed {field}"


@pytest.mark.parametrize(
    ("name", "cause", "record"),
    [
        ("split_captioning", "no caption", {"alt_text": None}),
        ("split_captioning", "no caption", {"alt_text": []}),
        ("captioning", "no caption", {"captions": None}),
        ("captioning", "no caption", {"captions": {"en": None, "de": [None]}}),
        ("span_corruption", "no text", {"text": None}),
        ("vqa", "no question", {"questions": [{"question": None, "answer": "so"}, None]}),
        ("vqg", "no question", {"questions": [{"question": "why?"}]}),
        ("ocr", "no OCR text", {"ocr": [{"text": None}, {"text": "  "}, {"box": [0, 0, 1, 1]}]}),
        ("object_vqa", "no objects", {"objects": None, "absent_labels": None}),
        ("object_vqa", "no objects", {"objects": [{"label": None}]}),
        ("detection", "no objects", {"objects": []}),
        ("detection", "no boxes", {"objects": [{"label": "dog"}, {"label": "cat", "box": None}]}),
        ("detection", "no boxes", {"objects": [{"label": "dog", "box": [0.5, 0.1, 0.5, 0.9]}]}),
    ],
)
def test_what_is_null_is_missing_and_costs_nothing(name, cause, record, tokenizer):
    with pytest.raises(Skip) as found:
        make(name, record, tokenizer=tokenizer)
    assert (found.value.cause, found.value.defect) == (cause, False)


def test_blank_text_gives_way_to_the_next_that_states_something():
    for blank in ("", " \n", "\u200b\ufeff", "\x00", None):
        assert make("captioning", {"captions": {"en": blank, "de": "ein Hund"}}).target_text == "ein Hund"
        assert make("captioning", {"captions": {"en": [blank, "a dog"]}}).target_text == "a dog"
        two = [{"question": "why?", "answer": blank}, {"question": "how?", "answer": "so"}]
        assert make("vqa", {"questions": two}).input_text == "Answer in EN: how? <extra_id_0>"
    with pytest.raises(Skip, match="empty caption") as found:
        make("split_captioning", {"alt_text": "\u200b"})
    assert found.value.defect


def test_of_several_wordings_one_is_drawn(tokenizer):
    record = {
        "alt_text": ["one", "two"],
        "captions": {"en": ["one", "two"]},
        "text": ["one of the words", "two of the words"],
        "questions": [{"question": ["which?", "what?"], "answer": ["one", "two"]}],
    }
    for name in ("split_captioning", "captioning"):
        assert {make(name, record, seed).target_text for seed in range(30)} == {"one", "two"}
    asked = {(made.input_text, made.target_text) for made in (make("vqa", record, seed) for seed in range(60))}
    assert len(asked) == 4 and ("Answer in EN: what? <extra_id_0>", "two") in asked
    assert len({make("vqg", record, seed).input_text for seed in range(30)}) == 2
    assert len({make("span_corruption", record, seed, tokenizer).input_text.split()[0] for seed in range(30)}) > 1
    pair = np.random.default_rng(3), np.random.default_rng(3)
    objectives.load("captioning").make({"captions": {"en": "a"}}, pair[0], objectives.options("captioning", {}), None)
    pair[1].integers(1)  # the language alone was drawn
    assert pair[0].bit_generator.state == pair[1].bit_generator.state


def test_what_an_objective_does_not_use_spoils_nothing(tokenizer):
    rest = {
        "language": "en",
        "alt_text": 5,
        "captions": [5],
        "ocr": "EXIT",
        "questions": {"a": 1},
        "objects": [{"label": 7, "box": [3]}],
        "absent_labels": 5,
        "text": {"a": SURROGATE},
    }
    good = {
        "split_captioning": {"alt_text": "a dog"},
        "captioning": {"captions": {"en": "a dog", "de": 5}},
        "span_corruption": {"text": "some words that are good"},
        "ocr": {"ocr": [{"text": "EXIT"}, {"text": 5, "language": "de"}]},
        "vqa": {"questions": [{"question": "why?", "answer": "so"}, {"language": "de", "question": 5}]},
        "vqg": {"questions": [{"question": "why?", "answer": "so"}]},
    }
    for name, own in good.items():
        assert make(name, rest | own, tokenizer=tokenizer, languages=["en"]).target_text


def test_detection_of_things_without_boxes_does_not_call_them_absent():
    record = {"objects": [{"label": "dog", "box": [0, 0, 1, 1]}, {"label": "cat"}], "absent_labels": ["cat"]}
    for seed in range(9):
        example = make("detection", record, seed, labels=["cat"])
        assert (example.input_text, example.target_text) == ("detect dog", "0 0 999 999 dog")


@pytest.mark.parametrize(
    ("beside", "text", "found"),
    [
        ({"alt_text": None, "caption": "a cat"}, None, "a cat"),
        ({"alt_text": "", "caption": "a cat"}, b"a dog", "a cat"),
        ({"alt_text": [], "caption": None}, b"a dog", "a dog"),
        ({"alt_text": ["", None], "caption": ["a cat"]}, b"a dog", ["a cat"]),
        ({"caption": " "}, b"\xef\xbb\xbfa dog", "a dog"),
        ({"alt_text": 5, "caption": "a cat"}, b"a dog", 5),  # it states something, and is malformed
        ({}, "ein Bär".encode("latin-1"), "ein Bär".encode("latin-1")),
        ({"caption": ""}, b"", None),
        ({"caption": None}, None, None),
    ],
)
def test_the_alt_text_is_the_first_that_states_something(beside, text, found):
    record = fields.parse(json.dumps(beside).encode(), text)
    assert record.get("alt_text") == found
    if not isinstance(found, str | list):
        with pytest.raises(Skip) as skip:
            make("split_captioning", record)
        assert skip.value.cause == ("malformed alt_text" if found else "no caption")
        assert skip.value.defect == bool(found)


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"null", b'{"a": ', b'{"a": "\xff"}', b'{"a": ' + b"1" * 5000 + b"}", b"[" * DEEP + b"]" * DEEP],
    ids=["empty", "list", "null", "cut", "bytes", "digits", "deep"],
)
def test_whatever_parsing_raises_is_broken_json(content):
    with pytest.raises(Skip, match="broken JSON") as found:
        fields.parse(content, None)
    assert found.value.defect and len(found.value.detail) < 200


def test_what_is_shown_of_a_value_is_short_and_can_be_written():
    for value in (10**400, 1 << 60_000, "x" * 10**6, [[[["deep"] * 9] * 9] * 9] * 9, {"a": "\n\ud83d"}, None, True):
        assert len(fields.shown(value)) < 100 and fields.shown(value).encode().isascii()


def test_languages_have_one_spelling_in_records_prompts_and_filters():
    for codes in (("he", "iw"), ("in", "id"), ("ji", "yi"), ("jw", "jv"), ("en_us", "en-US")):
        for one, other in (codes, codes[::-1]):
            record = {"captions": {one: "…", "zz": "other"}, "alt_text": "…", "language": one}
            for name in ("captioning", "split_captioning"):
                example = make(name, record, languages=[other])
                assert example.language == languages.canonical(codes[1]) and example.target_text == "…"
                assert f"in {codes[1].upper()} at" in example.input_text
    assert make("captioning", {"captions": {"en-GB": "a dog"}}, languages=["en"]).language == "en-gb"
    with pytest.raises(Skip, match="no caption"):
        make("captioning", {"captions": {"en": "a dog", "en-GB": "a dog"}}, languages=["en-US"])
    for wanted, code in (("zh-Hans", "zh_Hans-CN"), ("zh", "zh-Hant-TW"), ("iw-IL", "he-IL-x")):
        assert languages.accepts([wanted], code) and not languages.accepts([code], wanted)
    assert not languages.accepts(["zh-Han"], "zh-Hans")
    unnamed = {"questions": [{"question": "why?", "answer": "so"}], "ocr": [{"text": "A"}]}
    for name in ("vqa", "vqg", "ocr"):
        assert make(name, unnamed, languages=["en"]).language == "en"  # which is the default


def test_captions_may_lie_in_a_field_of_each_language():
    record = (
        b'{"caption_de": "ein Hund", "caption_": "no", "caption_pt_BR": "um cachorro", "m": "{\\"t-ja\\": \\"x\\"}"}'
    )
    found = fields.parse(record, None, {"captions": "caption_*"})
    assert fields.captions(found, lambda code: True) == {"de": ["ein Hund"], "pt-br": ["um cachorro"]}
    assert fields.parse(record, None, {"captions": "m.t-*"})["captions"] == {"ja": "x"}
    assert "captions" not in fields.parse(record, None, {"captions": "text_*"})
    assert fields.holds({"a": None}, "a") and not fields.holds({"a": {"b": 1}}, "a.c")
    for name, place in (("alt_text", "text_*"), ("captions", "*_*"), ("captions", "a*.b")):
        with pytest.raises(ConfigurationError, match=r"has a \* that cannot be read"):
            fields.check_field_map("data.fields.webli", {name: place})
