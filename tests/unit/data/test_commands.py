"""The programs of `data`: a mistake is one sentence and exit code 2, a broken record is skipped and reported."""

import inspect
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.config_store import ConfigStore

from common.command_line import parse
from common.errors import ConfigurationError
from data import digest, objectives, tokenizer
from data.config import DataConfig
from data.corpus_text import corpus_texts
from data.error_budget import ErrorBudgetExceeded
from data.miniature.config import parse as parse_miniature
from data.miniature.corpus import make_corpus
from data.shards.writer import write_shard
from tests.unit.data.conftest import png, record


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["vocab_size=abc"], "vocab_size: Value 'abc' of type 'str' could not be converted to Integer"),
        (["vocab_size=10"], "vocab_size=10 leaves no piece to learn; set it above 359"),
        (["vocab_size=370"], "vocab_size=370 is too small for the characters of this text; set it to 4"),
        (
            ["vocab_sise=600"],
            "vocab_sise is not an option; known here: root, output, vocab_size, split",
        ),
        (["root"], "'root' is not of the form key=value"),
        (["root="], "root: "),
        (["root=[a"], "cannot be read"),
        (["root=/nowhere"], "no folder of shards in /nowhere: point root to a corpus"),
        (["split=trian"], "split='trian' is unknown; did you mean train?"),
        (["output=/proc/x/y"], "output=/proc/x/y cannot be written"),
        (["root=s3://bucket"], "no folder of shards in s3://bucket: point root to a corpus"),
        (
            ["sources={webli: webli}", "fields={webli: {alttext: T}}"],
            "fields.webli='alttext' is unknown; did you mean alt_text?",
        ),
    ],
)
def test_mistakes_of_the_tokenizer(corpus: Path, words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        tokenizer.main([f"root={corpus}", "vocab_size=600", *words])
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("data_parallel_size=0", "data_parallel_size=0 must be at least 1."),
        ("data_parallel_size=3", "data.num_streams=4 is not a multiple of data_parallel_size=3"),
        ("steps=5:2", "steps=5:2 must be first:end, such as 1:21 for steps 1 to 20"),
        ("steps=0:20", "steps=0:20 must be first:end, such as 1:21 for steps 1 to 20, with first at least 1."),
        ("steps=x", "steps=x must be first:end"),
        ("steps=-3:0", "steps=-3:0 must be first:end"),
        ("split=trian", "split='trian' is unknown; did you mean train?"),
        ("foo=1", "foo"),
        ("data.foo=1", "foo"),
        (
            "data.global_batch_size=x",
            "data.global_batch_size: Value 'x' of type 'str' could not be converted to Integer",
        ),
        ("run.seed=-1", "run.seed=-1 must be at least 0"),
        ("~phases", "phases is empty"),
        ("data.root=/nowhere", "data.tokenizer=/nowhere/tokenizer.model does not exist"),
        ("data=web", "data.root"),
        ("phases.minni.image_size=84", "phases.minni is not a setting; did you mean phases.mini?"),
        ("phases.mini.image_sise=84", "does not read phases.mini.image_sise; did you mean phases.mini.image_size?"),
        ("phases.mini.tensor=2", "data.digest does not read phases.mini.tensor; leave it out."),
        ("~mixture.ocrr", "mixture.ocrr does not exist; there is nothing to leave out."),
    ],
)
def test_mistakes_of_the_digest(corpus: Path, word: str, sentence: str) -> None:
    root = [] if word == "data=web" else [f"data.root={corpus}"]
    with pytest.raises(ConfigurationError) as error:
        digest.main([*root, word])
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("scale=abc", "scale: Value 'abc'"),
        ("scale=nan", "scale=nan is not finite"),
        ("foo=1", "foo is not an option; known here: folder, seed"),
        ("folder=[a", "cannot be read"),
        ("folder=/proc/x", "folder=/proc/x cannot be made"),
    ],
)
def test_mistakes_of_the_miniature(word: str, sentence: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        make_corpus(parse_miniature([word]))
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("module", ["data.tokenizer", "data.digest", "data.miniature"])
def test_printed_in_one_line(module: str, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-m", module, "foo=1"], cwd=root, capture_output=True, encoding="utf-8")
    assert done.returncode == 2
    assert done.stderr.startswith("Configuration: ") and len(done.stderr.splitlines()) == 1


def test_words_become_a_dataclass() -> None:
    assert parse(["root=a", "vocab_size=700"], tokenizer.Options) == tokenizer.Options("a", "a/tokenizer.model", 700)


def test_malformed_records_are_skipped_and_reported_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = [{"captions": ["a list"]}, {"ocr": [{"text": "a", "box": 3}]}, {"questions": 5}, {"objects": [{"label": 7}]}]
    samples = [(f"bad{number}", fields, png(number)) for number, fields in enumerate(bad)]
    write_shard(tmp_path / "webli" / "train-00000.tar", [*samples, ("good", record(1), png(9))])
    with caplog.at_level(logging.WARNING):
        assert "a green square" in list(corpus_texts(tmp_path))
    for number, cause in enumerate(("captions", "ocr.box", "questions", "objects.label")):
        assert f"webli: malformed {cause} in " in caplog.text and f"(record 'bad{number}': {cause} is " in caplog.text


def test_a_corpus_over_its_budget_trains_no_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = [(f"k{number}", {"alt_text": number} if number < 3 else record(number), None) for number in range(20)]
    write_shard(tmp_path / "webli" / "train-00000.tar", samples)
    words = [f"root={tmp_path}", "vocab_size=700", "error_budget_minimum=2", "error_budget=0.1"]
    with pytest.raises(ErrorBudgetExceeded, match=r"last malformed alt_text \(record 'k2': alt_text is int 2 where"):
        tokenizer.main(words)
    tokenizer.main([*words, "error_budget_minimum=3"])
    assert "100 of them sentinels" in capsys.readouterr().out


def test_options_are_checked_once_and_not_for_each_record(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual, checked = objectives.options, []
    monkeypatch.setattr(objectives, "options", lambda name, own: checked.append(name) or usual(name, own))
    assert any("Generate the alt_text in" in text for text in corpus_texts(corpus))
    assert len(checked) == len(set(checked))


def test_broken_records_are_forgiven_as_in_training() -> None:
    names = ("error_budget", "error_budget_minimum")
    training = {name: getattr(DataConfig(), name) for name in names}
    assert {name: getattr(tokenizer.Options(), name) for name in names} == training
    assert {name: inspect.signature(corpus_texts).parameters[name].default for name in names} == training
    assert tokenizer.Options().split == inspect.signature(corpus_texts).parameters["split"].default == "train"


def test_a_digest_leaves_nothing_in_hydras_store(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = {name: node for name, node in ConfigStore.instance().repo.items() if name != "run_schema.yaml"}
    monkeypatch.setattr(ConfigStore.instance(), "repo", dict(store))
    digest.open_stream([f"data.root={corpus}", "mixture=miniature"], "train")
    with pytest.raises(ConfigurationError):
        digest.open_stream([f"data.root={corpus}", "data.foo=1"], "train")
    assert ConfigStore.instance().repo == store


def test_a_digest_of_a_broken_source_stops_as_a_run_does(corpus: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "vq2a" / "train-00000.tar", [(f"k{n}", record(n), None) for n in range(20)])
    settings = [f"data.root={tmp_path}", f"data.tokenizer={corpus}/tokenizer.model", "data.error_budget_minimum=0",
                "~mixture", "mixture.vqa={source: vq2a, objective: vqa, weight: 1}"]  # fmt: skip
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-m", "data.digest", *settings], cwd=root, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 3
    assert "source vq2a is over its error budget" in done.stderr and "Traceback" not in done.stderr


def test_the_tokenizer_reads_sources_at_a_url_and_mapped_fields(tmp_path: Path) -> None:
    """Of texts in columns of img2dataset; a scheme of fsspec that needs no server."""
    records = [(f"k{n}", {"TEXT": f"zebra {n} crosses", "LANGUAGE": "en"}, png(n)) for n in range(20)]
    write_shard(tmp_path / "crawl" / "00000.tar", records)
    words = [
        f"root=file://{tmp_path}",
        "sources={crawl: 'crawl/{00000..00000}.tar'}",
        f"index_folder={tmp_path}/indices",
    ]
    words += ["vocab_size=600", f"output={tmp_path}/tokenizer.model"]
    tokenizer.main([*words, "fields={crawl: {alt_text: TEXT, language: LANGUAGE}}"])
    assert "▁zebra" in tokenizer.Tokenizer(tmp_path / "tokenizer.model").pieces()
    with pytest.raises(ConfigurationError, match="no tokenizer of vocab_size=600 can be trained on this text"):
        tokenizer.main(words)
