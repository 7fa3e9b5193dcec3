"""The tokenizer has mT5's special ids, loses no text, and is trained the same way twice."""

import unicodedata
from pathlib import Path

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as protocol
from tokenizers import Tokenizer as HFTokenizer

from common.errors import ConfigurationError
from data import tokenizer as module
from data.corpus_text import corpus_texts
from data.tokenizer import CLOSING, EOS, Tokenizer, train_tokenizer
from data.tokenizer_json import tokenizer_json


def test_sentinels_are_the_last_pieces_and_the_first_is_last(tokenizer):
    assert tokenizer.sentinel(0) == tokenizer.vocab_size - 1
    assert tokenizer.sentinel(99) == tokenizer.vocab_size - 100
    ids = tokenizer.encode_prompt("Answer in EN: What is it? <extra_id_0>")
    assert ids[-1] == tokenizer.sentinel(0) and not {0, 1, 2} & set(ids)


def test_text_comes_back(tokenizer):
    for text in ("a red circle", "Quelle est la forme ?", "红色的圆形在中间", "unseen: ß ☃ 𝄞", "544 331 879 667 dog"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


SPELLED = [
    "<extra_id_0>",
    "see <extra_id_0> and <extra_id_99>, number 5",
    "a question <extra_id_0>",
    "fullwidth ＜extra_id_7＞",
    "</s> <pad> <unk> <s>",
    "▁<extra_id_0>",
]


@pytest.mark.parametrize("text", SPELLED)
def test_what_a_text_spells_is_encoded_as_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    controls = {0, 1, 2, *(tokenizer.sentinel(number) for number in range(100))}
    assert ids and not controls & set(ids)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFKC", text).replace("▁", " ").strip()
    prompt = tokenizer.encode_prompt(f"Answer in EN: {text} <extra_id_0>")
    assert prompt[-1] == tokenizer.sentinel(0) and not controls & set(prompt[:-1])


@pytest.mark.parametrize("pieces", ["as trained", "as mT5's"])
def test_a_prompt_has_the_ids_that_the_whole_model_gives_it(tokenizer, tmp_path, pieces):
    proto = protocol.ModelProto()
    proto.ParseFromString(Path(tokenizer.path).read_bytes())
    if pieces == "as mT5's":
        for piece in proto.pieces[-100:]:
            piece.piece = f"▁{piece.piece}"
    (tmp_path / "t.model").write_bytes(proto.SerializeToString())
    whole = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t.model"))
    for text in (
        "Generate the alt_text in DE at 0: <extra_id_0>",
        "Answer in EN: What  is it? <extra_id_0>",
        "detect a",
    ):
        assert Tokenizer(tmp_path / "t.model").encode_prompt(text) == whole.encode(text)


def test_other_pieces_that_a_model_defines_are_no_text_either(tokenizer, tmp_path):
    proto = protocol.ModelProto()
    proto.ParseFromString(Path(tokenizer.path).read_bytes())
    proto.pieces[400].piece, proto.pieces[400].type = "<sep>", proto.SentencePiece.USER_DEFINED
    (tmp_path / "t.model").write_bytes(proto.SerializeToString())
    opened = Tokenizer(tmp_path / "t.model")
    assert 400 not in opened.encode("one <sep> two") and opened.decode(opened.encode("a <sep>")) == "a <sep>"


def test_a_tokenizer_can_be_trained_on_texts_that_spell_sentinels(tmp_path):
    texts = [" ".join(f"<extra_id_{number % 7}></s><pad>" for _ in range(number % 5)) for number in range(300)]
    trained = train_tokenizer(texts, tmp_path / "t.model", 600)
    assert trained.decode(trained.encode("<extra_id_3></s>")) == "<extra_id_3></s>"
    assert trained.encode_prompt("a <extra_id_0>")[-1] == trained.sentinel(0)


def test_decoding_stops_at_eos_and_drops_what_is_no_piece(tokenizer):
    ids = tokenizer.encode("a red circle")
    beyond = [tokenizer.vocab_size, tokenizer.vocab_size + 5]  # a padded vocabulary has such ids
    assert tokenizer.decode([0, *ids, *beyond, 1, *ids]) == "a red circle"
    last = tokenizer.vocab_size - 1
    assert tokenizer.decode([*ids, last]) == "a red circle<extra_id_0>"


def test_training_is_deterministic(corpus, tmp_path):
    for name in ("one", "two"):
        train_tokenizer(corpus_texts(corpus), tmp_path / name, 600)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_the_command_trains_on_a_corpus(corpus, tmp_path, capsys):
    module.main([f"root={corpus}", f"output={tmp_path}/t.model", "vocab_size=600"])
    assert "100 of them sentinels" in capsys.readouterr().out
    assert 400 < Tokenizer(tmp_path / "t.model").vocab_size <= 600
    with pytest.raises(ConfigurationError, match="vocab_sise"):
        module.main(["vocab_sise=600"])


def test_a_model_without_sentinels_is_refused(tmp_path):
    texts = [f"some words {number} to train on" for number in range(50)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(tmp_path / "plain"), vocab_size=120, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, byte_fallback=False, minloglevel=2,
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="where mT5 has <extra_id_0>"):
        Tokenizer(tmp_path / "plain.model")
    with pytest.raises(ConfigurationError, match="does not exist"):
        Tokenizer(tmp_path / "absent.model")


@pytest.mark.parametrize("kind", ["folder", "empty", "text", "no UTF-8", "cut", "long name", "NUL", "no name"])
def test_a_file_that_is_no_whole_model_is_refused_in_one_sentence(tokenizer, tmp_path, kind):
    whole = Path(tokenizer.path).read_bytes()
    path = tmp_path / "foreign.model"
    at = whole.index("▁".encode())  # of a piece that no text of a prompt needs
    content = {
        "empty": b"",
        "text": b"hello " * 100,
        "no UTF-8": whole[:at] + b"\xff" + whole[at + 1 :],
        "cut": whole[:-9],
    }
    if kind in content:
        path.write_bytes(content[kind])
    name = {"folder": tmp_path, "long name": tmp_path / ("x" * 300), "NUL": "x\0", "no name": ""}.get(kind, path)
    with pytest.raises(ConfigurationError, match=r"^data\.tokenizer=(?s:.)* (is|does) (?s:.)*\.$"):
        Tokenizer(name)


def test_transformers_reads_the_same_ids_from_the_model(corpus, tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "spiece.model").write_bytes((corpus / "tokenizer.model").read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "t5"}', encoding="utf-8")
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=0)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.convert_tokens_to_ids("<extra_id_0>") == tokenizer.sentinel(0)
    for text in ("a red circle", "Generate the alt_text in DE at 0:", "  Quelle est  la forme ?", "10 500 999 dog"):
        assert theirs(text).input_ids == [*tokenizer.encode(text), 1]


TEXTS = [
    "a red circle",
    "二匹の犬が走っている",
    "ﬁne  ｆｕｌｌ width",
    "  two  spaces",
    "😀 emoji",
    "tab\tx\ny",
    "A▁B",
    "",
]


@pytest.mark.parametrize("pieces", ["as trained", "as mT5's"])
def test_tokenizer_json_gives_the_same_ids(tokenizer, tmp_path, pieces):
    """Read by Hugging Face's tokenizers, without SentencePiece; prompts end in a sentinel."""
    if pieces == "as mT5's":
        proto = protocol.ModelProto()
        proto.ParseFromString(Path(tokenizer.path).read_bytes())
        for piece in proto.pieces[-100:]:
            piece.piece = f"▁{piece.piece}"
        (tmp_path / "t.model").write_bytes(proto.SerializeToString())
        tokenizer = Tokenizer(tmp_path / "t.model")
    (tmp_path / "tokenizer.json").write_text(tokenizer_json(tokenizer), encoding="utf-8")
    theirs = HFTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in TEXTS:
        assert theirs.encode(text).ids == [*tokenizer.encode(text), EOS], text
        assert theirs.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text)), text
    for text in filter(None, TEXTS):
        assert theirs.encode(text + CLOSING).ids == [*tokenizer.encode_prompt(text + CLOSING), EOS], text
