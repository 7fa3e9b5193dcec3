"""Settings of a corpus build.

    python -m data.corpus.build config=corpus.yaml
    mpirun -n 8 python -m data.corpus.build config=corpus.yaml folder=/data/corpus
    python -m data.corpus.build folder=corpus inputs.web.path=downloads/laion ocr.engine=tesseract

`config` names a YAML file of these settings; words of the command line come after it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from common.command_line import parse as parse_words
from common.errors import ConfigurationError
from common.values import PATH, above, at_least, at_most, one_of
from data import languages
from data.shards.paths import SPLITS

WEB_FORMATS = ("img2dataset", "table", "text", "mc4", "cc3m", "cc12m")
ENGINES = ("fasttext", "lingua")


@dataclass
class InputConfig:
    """Describe one folder of downloads."""

    path: str = field(default="", metadata=PATH)
    """File, folder or pattern (`/data/laion/*.tar`). Required."""
    format: str = "img2dataset"
    """img2dataset (tars), table (parquet, CSV, TSV or JSON Lines), text (JSON Lines of documents), a name of conf/task
    (`vqav2`), or another official format that docs/corpus.md lists. img2dataset by default."""
    source: str = ""
    """Source of the corpus that the records go to. The input's name by default."""
    split: str = "train"
    """Split that the records go to: train, validation or test."""
    columns: dict[str, str] = field(default_factory=dict)
    """Of a table: its columns by field: id, image (bytes or a file), alt_text, text, language, url."""
    images: str = ""
    """Folder of the images, relative to `path`. The folder of `path` by default."""
    image_name: str = ""
    """Name of an image below `images`, made of {image}, {image_id}, {row} or {url_sha256}. The format's by default."""
    files: list[str] = field(default_factory=list)
    """Of an official format: its files below `path`, in the order that docs/corpus.md gives."""
    task: dict[str, Any] = field(default_factory=dict)
    """Of a format of conf/task: other settings of data/tasks, such as `split` or `fields`."""
    ocr: str = ""
    """Of TextVQA and TextCaps: the file of OCR strings (`TextVQA_Rosetta_OCR_v0.2_train.json`), below `path`."""
    language: str = ""
    """Language of all texts. Empty by default: the data's own, else identified."""
    curated: bool | None = None
    """Skip the filters of web data: size, text, rules and similarity. Null by default: true for official formats."""
    negatives: int = 0
    """Absent labels drawn for a record of objects that names none. 0 by default: training draws them."""

    def __post_init__(self) -> None:
        one_of("split", self.split, SPLITS)
        at_least("", 0, negatives=self.negatives)
        if self.language and languages.canonical(self.language) is None:
            raise ConfigurationError(f"language={self.language!r} is no code of a language, such as en.")

    @property
    def is_curated(self) -> bool:
        """Return whether the filters of web data are skipped."""
        return self.format not in WEB_FORMATS if self.curated is None else self.curated


@dataclass
class ImageConfig:
    """Set the shapes and sizes of images that are kept."""

    min_side: int = 64
    """Pixels of the shorter side, at least. 64 by default: smaller ones are icons."""
    max_aspect: float = 3.0
    """Longer side by shorter side, at most. 3 by default, as DataComp: banners are not resized to a square."""
    max_megapixels: float = 64.0
    """Millions of pixels, at most, by the header. 64 by default, as data.max_megapixels."""
    max_mib: int = 64
    """MiB of the file, at most. 64 by default, as data.max_member_mib."""

    def __post_init__(self) -> None:
        at_least("image.", 1, min_side=self.min_side, max_aspect=self.max_aspect, max_mib=self.max_mib)
        above("image.", 0, max_megapixels=self.max_megapixels)


@dataclass
class TextConfig:
    """Set the texts that are kept."""

    min_words: int = 1
    """Words of an alt-text, at least; a character of an unspaced script is a word. 1 by default."""
    max_characters: int = 2_000
    """Characters of an alt-text, at most. 2000 by default: longer ones are keyword lists."""
    max_document_characters: int = 100_000
    """Characters of a document that are kept; the rest is cut, and counted. 100,000 by default."""
    max_texts: int = 10
    """Distinct texts of one image, over all rows with its bytes, at most. 10 by default: others are logos and spam."""
    boilerplate: list[str] = field(default_factory=list)
    """Regular expressions of alt-texts without content, beside those of data/corpus/steps/text.py."""

    def __post_init__(self) -> None:
        at_least("text.", 0, min_words=self.min_words)
        at_least("text.", 1, max_characters=self.max_characters, max_texts=self.max_texts)
        at_least("text.", 1, max_document_characters=self.max_document_characters)


@dataclass
class LanguageConfig:
    """Set how languages are identified."""

    engines: list[str] = field(default_factory=lambda: list(ENGINES))
    """fasttext, lingua, or both, whose votes are added. Both by default."""
    min_confidence: float = 0.0
    """Confidence, at least; a text below it is removed. 0 by default: all texts are kept."""
    keep: list[str] = field(default_factory=list)
    """Languages that are kept. Empty by default: all."""

    def __post_init__(self) -> None:
        for engine in self.engines:
            one_of("language.engines", engine, ENGINES)
        at_least("language.", 0, min_confidence=self.min_confidence)
        at_most("language.", 1, min_confidence=self.min_confidence)


@dataclass
class DuplicateConfig:
    """Set which rows are near-duplicates."""

    images: bool = True
    """Remove images that are near an earlier one. True by default."""
    texts: bool = True
    """Remove documents that are near an earlier one. True by default; alt-texts are not compared."""
    image_distance: int = 31
    """Bits of 256 by which near-duplicate images differ at most. 31 by default, PDQ's own threshold."""
    band_bits: int = 16
    """Bits of a bucket's key. 16 by default; 32 from some 10^8 images on, so that buckets stay small."""
    features: int = 48
    """Local features of an image, to find crops. 48 by default: 10 kB in `work/`. 0: only whole images are compared."""
    text_similarity: float = 0.8
    """Jaccard similarity of near-duplicate documents. 0.8 by default, as in C4's and RefinedWeb's successors."""
    evaluation: dict[str, str] = field(default_factory=dict, metadata=PATH)
    """Folders, tars or text files of evaluation sets by name: rows near one of theirs are removed."""
    partitions: int = 64
    """Parts that buckets are divided into. 64 by default; the most ranks that compare at a time."""

    def __post_init__(self) -> None:
        at_least("duplicates.", 1, partitions=self.partitions)
        one_of("duplicates.band_bits", str(self.band_bits), ("8", "16", "32"))
        at_least("duplicates.", 0, image_distance=self.image_distance, text_similarity=self.text_similarity)
        at_least("duplicates.", 0, features=self.features)
        at_most("duplicates.", 1, text_similarity=self.text_similarity)


@dataclass
class SimilarityConfig:
    """Set the selection by similarity of image and text."""

    scorer: str = ""
    """`module:Class` of a scorer, `clip` for CLIP and SigLIP by transformers, or `column` for the rows' own
    `similarity`. Empty by default: no selection."""
    weights: str | None = field(default=None, metadata=PATH)
    """Folder of weights of `clip`. Null by default: other scorers need none."""
    keep: float = 0.1
    """Share of the pairs that is kept, the most similar ones. 0.1 by default, as for WebLI."""
    by_language: bool = False
    """Keep the share of each language instead of the share of all. False by default, as for WebLI."""
    batch: int = 64
    """Pairs that are scored at a time."""

    def __post_init__(self) -> None:
        at_least("similarity.", 0, keep=self.keep)
        at_least("similarity.", 1, batch=self.batch)
        at_most("similarity.", 1, keep=self.keep)


@dataclass
class OcrConfig:
    """Set the reading of text in images."""

    engine: str = "none"
    """tesseract, rapidocr, `module:Class` of another, or none. None by default: OCR is the budget of a corpus."""
    languages: list[str] = field(default_factory=lambda: ["eng"])
    """Tesseract's packages: eng, rus, ara, ell, hin, chi_sim, ... English by default."""
    timeout_s: float = 20.0
    """Seconds for one image; the engine is ended and started again after it. 20 by default."""
    min_confidence: float = 0.5
    """Confidence of a text, at least. 0.5 by default."""

    def __post_init__(self) -> None:
        above("ocr.", 0, timeout_s=self.timeout_s)
        at_least("ocr.", 0, min_confidence=self.min_confidence)
        at_most("ocr.", 1, min_confidence=self.min_confidence)


@dataclass
class BuildConfig:
    """Build a corpus from downloads: filtered, deduplicated, read, carded."""

    folder: str = field(default="corpus", metadata=PATH)
    """Folder of the corpus. It is new, empty, or of the same build."""
    config: str | None = field(default=None, metadata=PATH)
    """YAML file of settings. Null by default: all come from the command line."""
    inputs: dict[str, InputConfig] = field(default_factory=dict)
    """Downloads by name. Required."""
    image: ImageConfig = field(default_factory=ImageConfig)
    """Shapes and sizes of images."""
    text: TextConfig = field(default_factory=TextConfig)
    """Lengths and contents of texts."""
    rules: list[str] = field(default_factory=list)
    """Rules `module:function` of a record and its image: a cause to remove it, or null. Built in: `pii`, `adult_words`.
    Empty by default: each language needs its own."""
    language: LanguageConfig = field(default_factory=LanguageConfig)
    """Identification of languages."""
    duplicates: DuplicateConfig = field(default_factory=DuplicateConfig)
    """Near-duplicates in the corpus and of evaluation sets."""
    similarity: SimilarityConfig = field(default_factory=SimilarityConfig)
    """Selection by similarity."""
    ocr: OcrConfig = field(default_factory=OcrConfig)
    """Text in images."""
    questions: str = ""
    """`rules`, or `module:function` of a model, to make questions and answers of English captions (VQ2A). Empty by
    default: none are made."""
    translations: dict[str, str] = field(default_factory=dict, metadata=PATH)
    """Tables of translations by language (TSV: text, translation), that add captions and questions."""
    part_rows: int = 10_000
    """Rows of a table that one rank reads at a time; a tar is one part. 10,000 by default: minutes of work."""
    shard_records: int = 10_000
    """Records of a shard. 10,000 by default, as img2dataset."""

    def __post_init__(self) -> None:
        at_least("", 1, part_rows=self.part_rows, shard_records=self.shard_records)


def parse(arguments: Sequence[str]) -> BuildConfig:
    """Read a YAML file and `key=value` words. Raises ConfigurationError for unknown keys and wrong values."""
    named = [word.partition("=")[2] for word in arguments if word.startswith("config=")]
    given = parse_words([*_from_file(named[-1] if named else ""), *arguments], BuildConfig)
    if not given.inputs:
        raise ConfigurationError("inputs is empty; name a folder of downloads, such as inputs.web.path=downloads.")
    for name, one in given.inputs.items():
        if not one.path:
            raise ConfigurationError(f"inputs.{name}.path is not given; name a file, a folder or a pattern.")
        if not name.isidentifier() or not (one.source or name).isidentifier():
            raise ConfigurationError(f"inputs.{name} must be named by letters, digits and _, as its source.")
    return given


def _from_file(path: str) -> list[str]:
    """Return the settings of a YAML file as `key=value` words."""
    if not path:
        return []
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigurationError(f"config={path} cannot be read as YAML ({type(error).__name__}).") from error
    if not isinstance(content, dict):
        raise ConfigurationError(f"config={path} holds no settings; write `key: value` lines.")
    return [f"{key!s}={_flow(value)}" for key, value in content.items()]


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
