"""Encode text with a SentencePiece model whose sentinels are at mT5's ids; train one.

    python -m data.tokenizer root=runs/corpus
    python -m data.tokenizer root=runs/corpus vocab_size=8192
    python -m data.tokenizer root=/data/shards output=tokenizer.model split=validation

Training reads all text of one split of the sources below `root`.
"""

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as protocol

from common.errors import ConfigurationError, ReadingStopped
from common.files import write_bytes, writes
from common.values import PATH, at_least, at_most, one_of
from data.objectives.base import SENTINEL
from data.shards.paths import SPLITS
from data.storage import not_permitted, read_file
from data.tokenizer_files import as_model

PAD, EOS, UNKNOWN = 0, 1, 2
NUM_SENTINELS = 100
CLOSING = f" {SENTINEL}"
SMALLEST = 3 + 256 + NUM_SENTINELS  # pad, eos, unk, bytes, sentinels


class Tokenizer:
    """Convert text to ids and back with a SentencePiece `.model` of mT5's form, or a T5's (`data.tokenizer_files`).

    Raises ConfigurationError if the file is no such model, if pad, eos, unk are not 0, 1, 2, or if the last 100 pieces
    are not <extra_id_99> … <extra_id_0> (mT5's 250000 … 250099). A sentinel, or another user-defined piece, that is
    spelled in a text of the data, before or after normalization, is encoded as characters: only the <extra_id_0> at
    the end of a prompt is a sentinel.
    """

    has_ids_of_any_text = True

    def __init__(self, path: str | Path):
        self.path = str(path)
        model = _read_model(self.path)
        try:
            model = as_model(Path(path), model)
            processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            processor.id_to_piece(list(range(processor.vocab_size())))  # raises if a piece is damaged
        except Exception as error:  # protobuf and sentencepiece raise almost anything for corrupt bytes
            kind = "tokenizer.json of a T5" if str(path).endswith(".json") else "SentencePiece model"
            raise _refusal(path, f"is no {kind}, or a damaged one") from error
        special = (processor.pad_id(), processor.eos_id(), processor.unk_id())
        if special != (PAD, EOS, UNKNOWN):
            raise ConfigurationError(f"{path} has pad, eos, unk = {special}: mT5's are {PAD}, {EOS}, {UNKNOWN}.")
        self.vocab_size = int(processor.vocab_size())
        for number in range(NUM_SENTINELS):
            # The piece has the word-begin mark in mT5's own model.
            piece = processor.id_to_piece(max(self.sentinel(number), 0)).lstrip("▁")
            if piece != f"<extra_id_{number}>":
                raise ConfigurationError(
                    f"{path} has {piece!r} at id {self.sentinel(number)} where mT5 has <extra_id_{number}>: "
                    f"the last {NUM_SENTINELS} pieces must be the sentinels, <extra_id_0> last."
                )
        self.model: bytes = model  # as SentencePiece reads it, whatever the file is
        closing = processor.encode(f"a{CLOSING}")[len(processor.encode("a")) :]
        # The space before the sentinel is a piece of its own in some models, part of the sentinel's piece in others.
        self.closing = closing if closing[-1:] == [self.sentinel(0)] else [self.sentinel(0)]
        self._processor = _of_characters(model)

    def pieces(self) -> list[str]:
        """Return the pieces in order of their ids; two tokenizers with equal pieces have equal ids."""
        found: list[str] = self._processor.id_to_piece(list(range(self.vocab_size)))
        return found

    def vocabulary(self) -> str:
        """Return the SHA-256 (hex) of the pieces before the sentinels, which is the same in every file format."""
        return hashlib.sha256("\n".join(self.pieces()[:-NUM_SENTINELS]).encode()).hexdigest()

    def sentinel(self, number: int) -> int:
        """Return the id of <extra_id_`number`>."""
        return self.vocab_size - 1 - number

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text of the data, without EOS."""
        return list(self._processor.encode(text))

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt, without EOS; an <extra_id_0> at its end is the sentinel."""
        if not text.endswith(CLOSING):
            return self.encode(text)
        return [*self._processor.encode(text.removesuffix(CLOSING)), *self.closing]

    def encode_input(self, text: str, closed: bool) -> list[int]:
        """Return the ids of an example's input, without EOS; `closed`: it ends with the sentinel."""
        return self.encode_prompt(text) if closed else self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text before the first EOS; padding, and ids beyond the vocabulary, are left out."""
        kept = []
        for token in ids:
            if token == EOS:
                break
            if token != PAD and token < self.vocab_size:
                kept.append(int(token))
        return str(self._processor.decode(kept))


def _read_model(path: str) -> bytes:
    """Return the content of a model's file; raise ConfigurationError if there is none, StorageFailed as `read_file`."""
    try:
        model = read_file(path)
    except PermissionError as error:
        raise not_permitted(path) from error
    except FileNotFoundError as error:
        raise _refusal(path, "does not exist") from error
    except (OSError, ValueError) as error:  # a folder, a name too long or with a NUL in it
        raise _refusal(path, "is no file") from error
    if not model:
        raise _refusal(path, "is empty")
    return model


def _refusal(path: str | Path, what: str) -> ConfigurationError:
    return ConfigurationError(
        f"data.tokenizer={path} {what}: give mT5's, or train one (python -m data.tokenizer root=<corpus>; "
        "python -m data.miniature makes a corpus)."
    )


def _of_characters(model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Return a processor of the model that never produces sentinels or other user-defined pieces."""
    proto = protocol.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model)
    sentinels = len(proto.pieces) - NUM_SENTINELS
    for number, piece in enumerate(proto.pieces):
        if piece.type == proto.SentencePiece.USER_DEFINED or number >= sentinels:
            piece.type = proto.SentencePiece.UNUSED
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def checksum(path: str | Path) -> str:
    """Return the SHA-256 (hex) of a tokenizer's file, as `sha256sum` prints it."""
    return hashlib.sha256(read_file(str(path))).hexdigest()


def train_tokenizer(texts: Iterable[str], path: str | Path, vocab_size: int) -> Tokenizer:
    """Train a SentencePiece unigram model on the texts and write it to `path`; the same texts give the same bytes.

    vocab_size counts all pieces: pad, eos, unk, 256 bytes (so no text is out of vocabulary), the pieces learned, and
    the 100 sentinels at the end. It is an upper bound: a small corpus yields fewer pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_in_two_forms(texts),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size - NUM_SENTINELS,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9999,
            pad_id=PAD,
            eos_id=EOS,
            unk_id=UNKNOWN,
            bos_id=-1,
            max_sentence_length=1 << 20,
            num_threads=1,  # more threads would change the order of floating-point sums, and so the pieces
            minloglevel=2,
        )
    except ReadingStopped:
        raise
    except RuntimeError as error:
        if few := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            least = int(few[1]) + NUM_SENTINELS
            raise ConfigurationError(
                f"vocab_size={vocab_size} is too small for the characters of this text; set it to {least} or more."
            ) from error
        raise ConfigurationError(
            f"no tokenizer of vocab_size={vocab_size} can be trained on this text: {str(error).rstrip('.')}; add text, "
            "or choose another vocab_size."
        ) from error
    proto = protocol.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model.getvalue())
    for number in reversed(range(NUM_SENTINELS)):
        proto.pieces.add(piece=f"<extra_id_{number}>", score=0.0, type=proto.SentencePiece.USER_DEFINED)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, proto.SerializeToString(deterministic=True))
    return Tokenizer(path)


def _in_two_forms(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts, and each new word once more with a comma.

    SentencePiece proposes only pieces that occur in two different words: without this, "Generate" would be split in
    small pieces, although every other prompt begins with it.
    """
    seen: set[str] = set()
    for text in texts:
        yield text
        fresh = set(text.split()) - seen
        if fresh:
            seen |= fresh
            yield " ".join(f"{word}," for word in sorted(fresh))


@dataclass
class Options:
    """Hold the options of `python -m data.tokenizer key=value …`."""

    root: str = field(default="runs/corpus", metadata=PATH)
    """Corpus whose text is read: a folder of sources."""
    output: str = field(default="${root}/tokenizer.model", metadata=PATH)
    """File of the trained model."""
    vocab_size: int = 4096
    """Most pieces, with 3 special ones, 256 bytes and 100 sentinels. The default suits the demo; mT5 has 250,112."""
    split: str = "train"
    """Split whose text is read: train, validation or test."""
    error_budget: float = 0.01
    """Fraction of a source's records that may be broken; beyond it, and `error_budget_minimum`, the command stops."""
    error_budget_minimum: int = 16
    """Broken records of a source that never stop the command, so that a small source is not judged by one record."""
    sources: dict[str, str] = field(default_factory=dict, metadata=PATH)
    """Location by name of a source, as `data.sources`. Empty by default: each folder of `root` that holds tars. Where
    `root` is a URL, they must be named."""
    fields: dict[str, dict[str, str]] = field(default_factory=dict)
    """Names of fields by source, as `data.fields`. Empty by default."""
    records: int | None = None
    """Records of each source that are read at most, evenly spread. Null by default: all."""
    index_folder: str | None = field(default=None, metadata=PATH)
    """Folder of the indices, as `data.index_folder`. Null by default: beside the tars."""

    def __post_init__(self) -> None:
        if self.vocab_size <= SMALLEST:
            raise ConfigurationError(f"vocab_size={self.vocab_size} leaves no piece to learn; set it above {SMALLEST}.")
        one_of("split", self.split, SPLITS)
        at_least("", 0, error_budget=self.error_budget, error_budget_minimum=self.error_budget_minimum)
        at_most("", 1, error_budget=self.error_budget)
        if self.records is not None:
            at_least("", 1, records=self.records)


def main(arguments: Sequence[str]) -> None:
    """Train on all text of the training shards below `root` (see Options)."""
    from common.command_line import parse
    from data.corpus_text import corpus_texts
    from data.fields import check_field_map

    options = parse(arguments, Options)
    for source, own in options.fields.items():
        check_field_map(f"fields.{source}", own)
    texts = corpus_texts(
        options.root, options.split, options.error_budget, options.error_budget_minimum, options.sources,
        options.fields, options.index_folder, options.records,
    )  # fmt: skip
    with writes(f"output={options.output}"):
        tokenizer = train_tokenizer(texts, options.output, options.vocab_size)
    print(f"{options.output}: {tokenizer.vocab_size} pieces, {NUM_SENTINELS} of them sentinels")


if __name__ == "__main__":
    from common.command_line import run_command

    run_command(main)
