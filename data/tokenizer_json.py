"""Write a SentencePiece tokenizer as Hugging Face's `tokenizer.json`, which needs no SentencePiece to be read."""

import base64
import json
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as protocol

from data.tokenizer import EOS, NUM_SENTINELS, PAD, UNKNOWN, Tokenizer

MARK = "▁"  # SentencePiece's mark of a space


def tokenizer_json(tokenizer: Tokenizer) -> str:
    """Return the text of a `tokenizer.json`; its ids equal those of the tokenizer, with EOS at the end.

    Two differences stay: a sentinel that is spelled within a text is a sentinel there, and characters here; and where
    the space before a sentinel is a piece of its own, a space at the end of a text is one there too.
    """
    spaced = len(tokenizer.closing) > 1
    proto = protocol.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.model)
    normalizers: list[dict[str, Any]] = []
    if proto.normalizer_spec.precompiled_charsmap:
        charsmap = base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if proto.normalizer_spec.remove_extra_whitespaces:
        normalizers += [
            {"type": "Strip", "strip_left": True, "strip_right": not spaced},
            {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
        ]
    first = "always" if proto.normalizer_spec.add_dummy_prefix else "never"
    space = {"type": "Metaspace", "replacement": MARK, "prepend_scheme": first, "split": False}
    end = {"SpecialToken": {"id": proto.pieces[EOS].piece, "type_id": 0}}
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(proto, number, not spaced) for number in _special(proto)],
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": space,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [sequence, end],
            "pair": [sequence, end, {"Sequence": {"id": "B", "type_id": 0}}, end],
            "special_tokens": {
                proto.pieces[EOS].piece: {
                    "id": proto.pieces[EOS].piece,
                    "ids": [EOS],
                    "tokens": [proto.pieces[EOS].piece],
                }
            },
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "ByteFallback"},
                {"type": "Metaspace", "replacement": MARK, "prepend_scheme": first, "split": False},
            ],
        },
        "model": {
            "type": "Unigram",
            "unk_id": UNKNOWN,
            "vocab": [[_text(proto, number), piece.score] for number, piece in enumerate(proto.pieces)],
            "byte_fallback": bool(proto.trainer_spec.byte_fallback),
        },
    }
    return json.dumps(content, ensure_ascii=False)


def tokenizer_config() -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "padding_side": "right",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def _special(proto: Any) -> list[int]:
    first = len(proto.pieces) - NUM_SENTINELS
    return [PAD, EOS, UNKNOWN, *range(first, len(proto.pieces))]


def _added(proto: Any, number: int, lstrip: bool) -> dict[str, Any]:
    return {
        "id": number,
        "content": _text(proto, number),
        "single_word": False,
        "lstrip": lstrip,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _text(proto: Any, number: int) -> str:
    """Return a piece's text; a sentinel's is without the mark of a space that it has in mT5's own model."""
    piece = str(proto.pieces[number].piece)
    return piece.lstrip(MARK) if number >= len(proto.pieces) - NUM_SENTINELS else piece
