"""Read the tokenizer of a Hugging Face folder as a SentencePiece model: `tokenizer.json`, or `spiece.model` of a T5.

T5's SentencePiece model ends before the sentinels, which transformers adds: `<extra_id_0>` has the largest id.
"""

import base64
import json
import re
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as protocol

MODELS = ("tokenizer.model", "spiece.model", "sentencepiece.model", "tokenizer.json")
SENTINELS = 100  # of T5; umT5 has 300, mT5 has them among its pieces
EXTRA = re.compile(r"<extra_id_\d+>")


def find_tokenizer(path: Path) -> Path | None:
    """Return the tokenizer's file in a folder, None where there is none."""
    found = (path / name for name in MODELS if (path / name).is_file())
    return next(found, None) if path.is_dir() else None


def as_model(path: Path, content: bytes) -> bytes:
    """Return the SentencePiece model in a tokenizer's file, with the sentinels that its folder adds.

    Raises ValueError for a `tokenizer.json` of another kind.
    """
    if path.suffix == ".json":
        return _from_json(json.loads(content))
    added = _num_sentinels(path)
    if not added:
        return content
    proto: Any = protocol.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(content)
    if EXTRA.search(proto.pieces[-1].piece):
        return content
    for number in reversed(range(added)):
        _add_sentinel(proto, number)
    return bytes(proto.SerializeToString())


def _num_sentinels(model: Path) -> int:
    """Return how many sentinels the tokenizer_config.json beside a SentencePiece model adds."""
    try:
        config = json.loads((model.parent / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    if not isinstance(config, dict):
        return 0
    names = [str(name) for name in config.get("additional_special_tokens") or ()]
    given = config.get("extra_ids")
    is_t5 = "T5" in str(config.get("tokenizer_class"))
    return len([name for name in names if EXTRA.search(name)]) or (SENTINELS if given is None and is_t5 else given or 0)


def _add_sentinel(proto: Any, number: int) -> None:
    # With the mark of a space in the piece, as in mT5's model -> "… <extra_id_0>" has no piece of the space alone.
    proto.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0, type=proto.SentencePiece.USER_DEFINED)


def _from_json(content: Any) -> bytes:
    model = content["model"]
    if model.get("type", "Unigram") != "Unigram" or "vocab" not in model:
        raise ValueError(f"it is a {model.get('type')} model, not a Unigram model as T5's")
    proto: Any = protocol.ModelProto()  # type: ignore[attr-defined]
    kinds, unknown = proto.SentencePiece, model["unk_id"]
    pieces = [(str(piece), float(score)) for piece, score in model["vocab"]]
    special = {each["content"] for each in content.get("added_tokens", ()) if each.get("special")}
    mark = "" if _space_is_own_piece(content) else "▁"
    for number, (piece, score) in enumerate(pieces):
        kind = kinds.NORMAL
        if number == unknown:
            kind = kinds.UNKNOWN
        elif EXTRA.search(piece):
            kind = kinds.USER_DEFINED
        elif piece in special:
            kind = kinds.CONTROL
        elif model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            kind = kinds.BYTE
        marked = f"{mark}{piece}" if kind == kinds.USER_DEFINED and piece.startswith("<") else piece
        proto.pieces.add(piece=marked, score=score, type=kind)
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    for each in sorted(content.get("added_tokens", ()), key=lambda token: token["id"]):
        if each["content"] in ids:
            continue
        if each["id"] != len(proto.pieces):
            raise ValueError(f"its token {each['content']} has the id {each['id']}, not {len(proto.pieces)}")
        proto.pieces.add(piece=f"{mark}{each['content']}", score=0.0, type=kinds.USER_DEFINED)
    trainer = proto.trainer_spec
    trainer.model_type, trainer.vocab_size = trainer.UNIGRAM, len(proto.pieces)
    trainer.pad_id, trainer.eos_id, trainer.unk_id, trainer.bos_id = ids["<pad>"], ids["</s>"], unknown, -1
    trainer.pad_piece, trainer.eos_piece, trainer.unk_piece = "<pad>", "</s>", pieces[unknown][0]
    trainer.byte_fallback = bool(model.get("byte_fallback"))
    if charsmap := _charsmap(content.get("normalizer")):
        proto.normalizer_spec.precompiled_charsmap = base64.b64decode(charsmap)
    return bytes(proto.SerializeToString())


def _space_is_own_piece(content: Any) -> bool:
    """Return whether the space before a sentinel is a piece of its own: no step of the file drops or joins it."""
    dropped = any(each.get("strip_right") for each in _normalizers(content.get("normalizer")))
    joined = any(each.get("lstrip") for each in content.get("added_tokens", ()) if EXTRA.search(each["content"]))
    return (content.get("pre_tokenizer") or {}).get("type") == "Metaspace" and not dropped and not joined


def _charsmap(normalizer: Any) -> str | None:
    """Return the map of characters in a normalizer, which may be a sequence of some."""
    maps = (each["precompiled_charsmap"] for each in _normalizers(normalizer) if each["type"] == "Precompiled")
    return next(filter(None, maps), None)


def _normalizers(normalizer: Any) -> list[Any]:
    """Return the steps of a normalizer."""
    if not normalizer:
        return []
    if normalizer["type"] == "Sequence":
        return [step for each in normalizer["normalizers"] for step in _normalizers(each)]
    return [normalizer]
