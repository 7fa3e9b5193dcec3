"""Every setting of every command: text stays as typed, numbers are numbers, paths may begin at a home folder."""

from dataclasses import dataclass, field, is_dataclass
from typing import Any

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from common.command_line import parse
from common.errors import ConfigurationError
from common.overrides import as_typed, check_choices, check_read
from common.values import PATH, expand_home, type_at, typed
from model.config import ModelConfig, MT5Config, ViTConfig
from parallel.config import ParallelConfig
from train import evaluate, pretrain, pretrain_vit
from train.config import Phase, RunConfig
from train.entry import CONF, TEXT


@dataclass
class Inner:
    name: str = "x"
    rate: float = 0.0


@dataclass
class Options:
    name: str = "x"
    note: str | None = None
    steps: int = 1
    rate: float = 1.0
    on: bool = False
    tags: list[str] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict, metadata=PATH)
    folder: str = field(default="runs", metadata=PATH)
    parts: list[Inner] = field(default_factory=list)


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("run.name=12e4567", "run.name='12e4567'"),
        ("run.name=71e9999", "run.name='71e9999'"),
        ("run.name=2024_11_25", "run.name='2024_11_25'"),
        ("run.name= 1_0 ", "run.name='1_0'"),
        ("run.name=true", "run.name='true'"),
        ("run.name=nan", "run.name='nan'"),
        ("run.name=1e5,007,x", "run.name='1e5',007,x"),  # a sweep; Hydra reads 007 as text
        ("run.folder=~/runs/x", "run.folder='~/runs/x'"),
        ("+data.sources.web=1e5", "+data.sources.web='1e5'"),
        ("cluster.environment.OMP=1e5", "cluster.environment.OMP='1e5'"),
        ("hydra.launcher.cluster.account=71", "hydra.launcher.cluster.account='71'"),
        ("run.name='007'", "run.name='007'"),
        ("tracker.notes=null", "tracker.notes=null"),
        ("run.name=[1]", "run.name=[1]"),
        ("run.steps=10", "run.steps=10"),
        ("nothing.like=10", "nothing.like=10"),
        ("--multirun", "--multirun"),
        ("run.name=(", "run.name=("),
        ("run.name={", "run.name={"),
        ("data.sources.web=/d/{split}-{00..11}.tar", "data.sources.web='/d/{split}-{00..11}.tar'"),
        ("+data.sources.web={a,b}/*.tar", "+data.sources.web='{a,b}/*.tar'"),
        ("data.sources={web: {split}.tar}", "data.sources={web: {split}.tar}"),
    ],
)
def test_hydra_reads_text_as_it_was_typed(word: str, read: str) -> None:
    assert as_typed([word], TEXT) == [read]


def test_numbers_of_thousands_of_digits_are_one_sentence() -> None:
    with pytest.raises(ConfigurationError, match=r"run\.name is a number of too many digits"):
        as_typed(["run.name=" + "9" * 5000], TEXT)


@pytest.mark.parametrize(
    ("plain", "key"),
    [
        ({"name": 7}, "name"),
        ({"name": float("inf")}, "name"),
        ({"name": True}, "name"),
        ({"note": 86400}, "note"),
        ({"tags": ["a", 1e5]}, "tags[1]"),
        ({"sources": {"web": 7}}, "sources.web"),
        ({"parts": [{"name": False}]}, "name"),
    ],
)
def test_a_number_where_text_is_meant_is_refused(plain: dict[str, Any], key: str) -> None:
    """From YAML, where nothing is left of what was typed: 007, on, 24:00:00."""
    with pytest.raises(ValidationError) as error:
        typed(Options, plain)
    assert str(error.value).startswith(f"{key} is text, but its value reads as the ")


def test_text_from_other_settings() -> None:
    assert typed(Options, {"name": "${steps}", "note": "of ${rate}"}).name == "1"


@pytest.mark.parametrize(
    ("plain", "printed"),
    [
        ({"rate": float("nan")}, "^rate=nan is not finite"),
        ({"rate": float("-inf")}, "^rate=-inf is not finite"),
        ({"rate": "nan"}, "^rate=nan is not finite"),
        ({"rate": 10**400}, "The integer has too many digits"),
        ({"rate": True}, "could not be converted to Float"),
        ({"parts": [{}, {"rate": float("inf")}]}, r"^parts\[1\].rate=inf"),
        ({"steps": 2**31}, "^steps=2147483648 must lie between"),
        ({"steps": -(10**30)}, r"^steps=-1000000000000000000… \(32 characters\)"),
        ({"steps": 1.0}, "could not be converted to Integer"),
        ({"steps": True}, "could not be converted to Integer"),
        ({"on": 2}, "not true or false"),
        ({"name": "a\0"}, "^name='a.*holds a NUL"),
        ({"name": "gr\udcf6"}, "^name=.*holds bytes that are not UTF-8"),
        ({"tags": ["\udcf6"]}, r"^tags\[0\]=.*not UTF-8"),
        ({"sources": {"\udcf6": "x"}}, "^sources=.*not UTF-8"),
        ({"folder": " "}, "^folder is empty"),
        ({"folder": "$HOME/x"}, r"^folder=\$HOME/x .*write \$\{oc.env:HOME\}"),
        ({"folder": "~no_such_user/x"}, "^folder=~no_such_user/x begins with a home folder"),
        ({"sources": {"web": ""}}, r"^sources\.web is empty"),
        ({"tags": "abc"}, "Invalid value assigned"),
        ({"sources": []}, "Cannot merge DictConfig with ListConfig"),
    ],
)
def test_impossible_values_are_one_sentence(plain: dict[str, Any], printed: str) -> None:
    with pytest.raises((ConfigurationError, OmegaConfBaseException), match=printed):
        typed(Options, plain)


def test_a_wrong_kind_is_named_by_its_whole_key() -> None:
    for plain, printed in (
        ({"rate": "x"}, r"^top\.rate: Value 'x' .* Float\.$"),
        ({"rates": 1}, r"^top\.rates: Key 'rates'"),
    ):
        with pytest.raises(ConfigurationError, match=printed):
            typed(Options, plain, "top")


def test_accepted_as_they_are() -> None:
    made = typed(Options, {"rate": 3, "steps": "5", "on": "yes", "note": None})
    assert (made.rate, made.steps, made.on, made.note) == (3.0, 5, True, None)


def test_home_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    made = typed(Options, {"folder": "~/runs", "sources": {"web": "~/web/{split}-*.tar"}, "name": "~/x"})
    assert (made.folder, made.sources, made.name) == ("/home/me/runs", {"web": "/home/me/web/{split}-*.tar"}, "~/x")
    assert expand_home("~") == "/home/me" and expand_home("a~/b") == "a~/b"


def test_every_folder_and_file_of_a_run_is_a_path() -> None:
    """By name, so that a new one is not forgotten."""
    words = ("folder", "root", "output", "initial", "vit", "mt5", "tokenizer", "sources", "python")
    kinds = {type_at(RunConfig, [group]) for group in OmegaConf.structured(RunConfig)} | {TEXT["cluster."], Phase}
    for kind in filter(is_dataclass, kinds):
        for one in kind.__dataclass_fields__.values():
            if one.name.endswith(words) and "bool" not in str(one.type):
                assert "path" in one.metadata, f"{kind.__name__}.{one.name}"


def test_words_of_programs_without_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert parse(["folder=2024_11_25", "name=12e4567", "note=on"], Options).folder == "2024_11_25"
    assert parse(["name=12e4567", "note=on", "tags=[a]"], Options).name == "12e4567"
    assert parse(["note=on", "folder=~/x"], Options) == Options(note="on", folder="/home/me/x")
    for word in ("tags=[007]", "steps=1e3", "rate=inf", "name=null", "steps=" + "9" * 5000):
        with pytest.raises(ConfigurationError) as error:
            parse([word], Options)
        assert "\n" not in str(error.value)


def test_keys_that_a_command_does_not_read() -> None:
    reads = ("data", "run.seed", "model=")
    check_read(
        ["data=web", "data.root=x", "+data.sources.a=b", "model=pali_3b", "-m", "hydra.launcher.nodes=2"], reads, "x"
    )
    check_read(["run.sed=1", "run.seed=1"], reads, "x", RunConfig)  # the first is for Hydra to refuse
    for word, key in (("run.seeds=1", "run.seeds"), ("model.z_loss=1", "model.z_loss"), ("~optimizer", "optimizer")):
        with pytest.raises(ConfigurationError, match=f"^x does not read {key}; leave it out .it reads data, run.seed"):
            check_read([word], reads, "x")


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # neither HOME nor an entry of the user
    with pytest.raises(ConfigurationError, match="cannot be found; write it in full"):
        expand_home("~/runs", "run.folder")


@pytest.mark.parametrize(
    ("reads", "word"),
    [
        (pretrain.READS, "classifier.head=map"),
        *((pretrain_vit.READS, word) for word in ("mt5=base", "task=coco")),
        *(
            (evaluate.READS, word)
            for word in ("optimizer.beta1=0.1", "schedule.peak=1", "run.steps=3", "weights.vit=x")
        ),
        *(
            (evaluate.READS, word)
            for word in ("evaluation.every_steps=0", "checkpoint.keep_last=1", "run.guard.window=3")
        ),
    ],
)
def test_settings_of_other_commands_are_refused(reads: tuple[str, ...], word: str) -> None:
    with pytest.raises(ConfigurationError, match="does not read"):
        check_read([word], reads, "x", RunConfig)


def test_settings_of_the_documented_commands_are_read() -> None:
    check_read(["experiment=demo_vit", "vit=nano,micro", "-m", "schedule.peak=1"], pretrain_vit.READS, "x", RunConfig)
    check_read(["run.folder=x", "evaluation.examples=8", "parallel=single"], evaluate.READS, "x", RunConfig)
    check_read(["experiment=demo", "run.steps=1", "weights.vit=x", "model=pali_3b"], pretrain.READS, "x", RunConfig)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        *((ViTConfig, name) for name in ("depth", "width", "mlp_dim", "patch_size")),
        *((MT5Config, name) for name in ("num_encoder_layers", "num_decoder_layers", "d_model", "d_ff", "vocab_size")),
        (ModelConfig, "image_size"),
        (ParallelConfig, "timeout_s"),
    ],
)
def test_sizes_that_would_take_hours_to_check_are_refused(kind: type, setting: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{setting}=2147483647 must be at most"):
        kind(**{setting: 2**31 - 1})


@pytest.mark.parametrize(
    "word", ["vit=7", "parallel=null", "phases={a: 1}", "+mt5=12e4567", "mixture=[paper,1]", "hydra=7"]
)
def test_a_choice_that_is_no_text_is_refused_before_hydra(word: str) -> None:
    with pytest.raises(ConfigurationError, match=r"is not a file of conf/\w+; (choose one of|leave it out)"):
        check_choices([word], CONF)


@pytest.mark.parametrize(
    "word", ["vit=mini", "vit=nope", "mt5=[base]", "vit=mini,nano", "~tracker", "vit.depth=7", "x"]
)
def test_a_choice_that_is_text_is_left_to_hydra(word: str) -> None:
    check_choices([word], CONF)
