"""The tokenizers of Hugging Face folders give the ids of transformers: spiece.model with added sentinels, and JSON."""

import json
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2 as protocol
from transformers import AutoTokenizer, T5Tokenizer

from common.errors import ConfigurationError
from data.tokenizer import Tokenizer, train_tokenizer
from data.tokenizer_files import find_tokenizer
from train.export import write_tokenizer

TEXTS = ["a red square", "  two   blue circles ", "naïve Größe", "xyz 日本", "Photo of <extra_id_0>"]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5's folder as the published ones are: its SentencePiece model ends before the sentinels."""
    folder = tmp_path_factory.mktemp("t5")
    train_tokenizer(["a red square and two blue circles", "Photo of Größe, naïve"] * 10, folder / "spiece.model", 400)
    proto = protocol.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString((folder / "spiece.model").read_bytes())
    del proto.pieces[-100:]
    (folder / "spiece.model").write_bytes(proto.SerializeToString())
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return folder


def test_both_forms_have_the_ids_of_transformers(t5: Path, tmp_path: Path) -> None:
    theirs = T5Tokenizer.from_pretrained(t5)
    theirs.save_pretrained(tmp_path)
    found = find_tokenizer(tmp_path)
    assert found is not None and found.name == "tokenizer.json"
    model, plain = Tokenizer(t5 / "spiece.model"), Tokenizer(found)
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False).input_ids
        assert plain.encode_prompt(text) == ids, text
        if "日" not in text:  # the toy's model spells unknown characters in bytes, transformers 5 does not
            assert model.encode_prompt(text) == ids, text
    assert model.sentinel(0) == theirs.convert_tokens_to_ids("<extra_id_0>") == plain.vocab_size - 1


def test_a_folder_without_tokenizer_and_other_kinds(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None and find_tokenizer(tmp_path / "model.safetensors") is None
    for content in ('{"model": {"type": "BPE", "vocab": {}}}', "{", "[]", '{"model": {"vocab": []}}'):
        (tmp_path / "tokenizer.json").write_text(content, "utf-8")
        with pytest.raises(ConfigurationError, match=r"is no tokenizer\.json of a T5, or a damaged one"):
            Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("kind", ["t5", "own"])
def test_json_alone_goes_out_in_both_forms(kind: str, t5: Path, tmp_path: Path) -> None:
    """The space before a sentinel is a part of it in a T5's tokenizer, and a piece of its own in one trained here."""
    if kind == "t5":
        T5Tokenizer.from_pretrained(t5).save_pretrained(tmp_path / "in")
    else:
        (tmp_path / "in").mkdir()
        own = train_tokenizer(["a red square and two blue circles", "naïve Größe"] * 10, tmp_path / "own.model", 400)
        write_tokenizer(tmp_path / "in", own)
    tokenizer = Tokenizer(tmp_path / "in" / "tokenizer.json")
    assert len(tokenizer.closing) == (1 if kind == "t5" else 2)
    (tmp_path / "out").mkdir()
    write_tokenizer(tmp_path / "out", tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [*TEXTS[:3], "a red square <extra_id_0>"]
    for text in texts if kind == "t5" else map(str.rstrip, texts):  # see `tokenizer_json`
        ids = tokenizer.encode_prompt(text)
        assert Tokenizer(tmp_path / "out" / "tokenizer.model").encode_prompt(text) == ids, text
        assert theirs(text, add_special_tokens=False).input_ids == ids, text
