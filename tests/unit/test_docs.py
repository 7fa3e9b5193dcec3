"""Every command block of the docs runs, or is composed where a mark gives the reason not to run it.

Marks, in a comment above a block: `run with: KEY=VALUE … (REASON)` adds overrides to each command, and
`checked only: REASON` composes their configurations and looks for their files.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from PIL import Image
from transformers import MT5Config as HFMT5Config
from transformers import MT5ForConditionalGeneration, SiglipVisionConfig, SiglipVisionModel

from common.errors import ConfigurationError
from common.overrides import check_read
from data.corpus_text import corpus_texts
from data.labels import main as collect_labels
from data.miniature.config import MiniatureConfig
from data.miniature.corpus import make_corpus
from data.tokenizer import Tokenizer, train_tokenizer
from train import evaluate, finetune, pretrain, pretrain_vit
from train.checks import check
from train.config import RunConfig
from train.entry import register
from train.settings.compose import to_run_config
from train.settings.saved_run import overridden
from train.submit import composed, requests

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]  # fmt: skip
BLOCK = re.compile(r"(?:<!-- (?P<mark>run with|checked only): (?P<text>[^\n]*?) -->\n)?```bash\n(?P<code>.*?)```", re.S)
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")
TRAINING = {
    "train.pretrain": pretrain.READS,
    "train.finetune": finetune.READS,
    "train.pretrain_vit": pretrain_vit.READS,
    "train.evaluate": evaluate.READS,
}
SMALL = ["data.global_batch_size=4", "parallel.micro_batch_size=2", "run.steps=1", "schedule.warmup_steps=0",
         "evaluation.every_steps=0", "tracker=none"]  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A command block: the line at which it begins, its mark, the mark's text, and its commands."""

    place: str
    mark: str
    text: str
    commands: tuple[str, ...]

    @property
    def page(self) -> str:
        return self.place.partition(":")[0]


def blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            place = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, found.start('code')) + 1}"
            lines = found["code"].replace("\\\n", " ").splitlines()
            commands = tuple(line for line in lines if line.split("#")[0].strip())
            yield Block(place, found["mark"] or "run", found["text"] or "", commands)


BLOCKS = list(blocks())
RUN = [block for block in BLOCKS if block.mark != "checked only"]
CHECKED = [block for block in BLOCKS if block.mark == "checked only"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a user's folder: a corpus, a run of one step, an image, and a folder of captioned images."""
    home = tmp_path_factory.mktemp("home")
    corpus = home / "runs" / "corpus"
    make_corpus(MiniatureConfig(folder=str(corpus), scale=0.002, languages=["en", "de"], workers=1))
    train_tokenizer(corpus_texts(corpus, "train"), corpus / "tokenizer.model", 1024)
    collect_labels([f"root={corpus}"])
    Image.new("RGB", (64, 64), "red").save(home / "photo.jpg")
    (home / "photos").mkdir()
    for number in range(12):
        Image.new("RGB", (32, 32), (number * 20, 0, 0)).save(home / "photos" / f"{number}.jpg")
        (home / "photos" / f"{number}.txt").write_text(f"a red square of brightness {number}", encoding="utf-8")
    make_public_folders(home, corpus / "tokenizer.model")
    execute(f"python -m train.pretrain run.name=demo {' '.join(SMALL)}", home)
    return home


def make_public_folders(home: Path, tokenizer: Path) -> None:
    """Make tiny folders of the classes of public backbones, with a head to leave out and a tokenizer."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**sizes, image_size=64, patch_size=16)
    SiglipVisionModel(vision).save_pretrained(home / "siglip2-base")
    text = {"d_model": 32, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2}
    text["vocab_size"] = -(-Tokenizer(tokenizer).vocab_size // 128) * 128
    MT5ForConditionalGeneration(HFMT5Config(**text)).save_pretrained(home / "mt5-base", max_shard_size="100KB")
    shutil.copy(tokenizer, home / "mt5-base" / "spiece.model")


def execute(command: str, home: Path) -> None:
    """Run a command in the user's folder, with this project's modules and this Python."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(
        command, shell=True, cwd=home, env=environment, capture_output=True, encoding="utf-8", timeout=300
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.mark.parametrize("page", sorted({block.page for block in RUN}))
def test_the_blocks_of_a_page_run(page: str, home: Path) -> None:
    """One after another, as a reader runs them: a block may read what an earlier one of its page wrote."""
    for block in [block for block in RUN if block.page == page]:
        overrides = block.text.partition("(")[0].strip()
        assert (block.mark == "run") or (overrides and "(" in block.text), f"{block.place}: overrides (reason)"
        for command in block.commands:
            plain = command.split(" #")[0].strip()
            execute(f"{plain} {overrides}", home)


@pytest.mark.parametrize("block", CHECKED, ids=[block.place for block in CHECKED])
def test_a_block_that_is_not_run_is_composed(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert block.text, f"{block.place}: give the reason"
    monkeypatch.chdir(tmp_path)
    register()
    for command in block.commands:
        for part in re.split(r"&&|\|", command.split(" #")[0]):
            check_command(shlex.split(part))


def check_command(words: list[str]) -> None:
    """Check a command without running it: its configuration, or the existence of its program and files."""
    words = [word for word in words if word != "…"]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program = words[0]
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{word}:", makefile, re.M) for word in words[1:] if "=" not in word), words
    elif program == "bash":
        assert (ROOT / words[1]).is_file(), words
    elif "-m" in words:
        at = words.index("-m")
        check_module(words[at + 1], words[at + 2 :], ranks(words[:at]))
    else:
        found = shutil.which(program, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        assert found or program in ("source", "srun", "sbatch", "scancel", "squeue", "torchrun", "mpirun", "hf"), words


def ranks(launcher: list[str]) -> int | None:
    """Return the number of ranks that a launcher starts, or None where the command leaves it open."""
    if launcher[0] == "python":
        return 1
    options = {key: int(n) for key, n in pairwise(launcher) if n.isdecimal()}
    number = options.get("--nproc_per_node", options.get("--ntasks", options.get("-n")))
    return number and number * options.get("--nnodes", 1)


def check_module(module: str, arguments: list[str], world_size: int | None) -> None:
    if module == "pytest":
        assert all((ROOT / word).exists() for word in arguments if "/" in word), arguments
    elif module == "train.submit":
        for request in requests(arguments):
            composed("submit", [re.sub("^cluster=site$", "cluster=default", word) for word in request.settings])
            if request.kind != "corpus":
                check_module(f"train.{request.kind}", request.words, None)
    elif module in TRAINING:
        multirun = {"-m", "--multirun"} & set(arguments)
        overrides = [word for word in arguments if word not in ("-m", "--multirun", "--dry-run")]
        check_run(module, [first(word) for word in overrides] if multirun else overrides, world_size)
    else:
        assert find_spec(module), module


def first(override: str) -> str:
    """Return an override with the first of the values that a sweep gives it."""
    parsed = OverridesParser.create().parse_override(override)
    return (
        f"{override.split('=')[0]}={next(iter(parsed.sweep_string_iterator()))}"
        if parsed.is_sweep_override()
        else override
    )


def check_run(module: str, overrides: list[str], world_size: int | None) -> None:
    """Compose a run's configuration, and check its layout where the number of ranks is given."""
    name = module.removeprefix("train.")
    check_read(overrides, TRAINING[module], module, RunConfig)
    own = composed(name, overrides)
    if name == "evaluate":
        overridden(composed("pretrain", []), own, overrides)
        return
    if name == "finetune" and own.vit.width is None:  # sizes and tokenizer of a run that is not there
        toy = composed("pretrain", [])
        own.vit, own.mt5, own.data.tokenizer = toy.vit, toy.mt5, "tokenizer.model"
    config = to_run_config(own, weights=False)
    if world_size is not None and name == "pretrain":
        check(config, world_size, expected=[Path(config.data.root), Path(config.run.initial or "runs")], weights=False)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_to_files(page: Path) -> None:
    targets = LINK.findall(page.read_text(encoding="utf-8"))
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120
    assert not [line for line in lines if len(line) > 120 and not line.startswith("|")]


def test_a_command_that_is_wrong_is_found() -> None:
    register()
    for words in (["make", "nothing"], ["python", "-m", "train.nothing"]):
        with pytest.raises((AssertionError, ModuleNotFoundError)):
            check_command(words)
    with pytest.raises((ConfigurationError, HydraException)):
        check_command(["python", "-m", "train.pretrain", "experiment=paper_4b"])


def test_recipes_of_extending_work(tmp_path: Path) -> None:
    """Follow docs/extending.md in a copy of the rooms that it changes: its code blocks are complete."""
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.S)
    objective, objective_test, optimizer, optimizer_test, metric, scorer, metric_test = code
    for room in ("common", "conf", "data", "evaluation", "model", "parallel", "tests"):
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__", "*.csv", "slurm"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def change(file: str, old: str, new: str) -> None:
        path = tmp_path / file
        text = path.read_text(encoding="utf-8")
        assert old in text, (file, old)
        path.write_text(text.replace(old, new, 1), encoding="utf-8")

    def append(file: str, text: str) -> None:
        with (tmp_path / file).open("a", encoding="utf-8") as opened:
            opened.write(f"\n\n{text}")

    append("data/objectives/length.py", objective)
    change("data/objectives/__init__.py", '    "task",\n', '    "task",\n    "length",\n')
    change("data/objectives/__init__.py", "FIELDS = {\n", 'FIELDS = {\n    "length": "captions",\n')
    change(
        "tests/unit/data/objectives/test_objectives.py",
        '        "task",\n',
        '        "task",\n        "length",\n',
    )
    append("tests/unit/data/objectives/test_objectives.py", objective_test)
    append("parallel/optimizer/sgd.py", optimizer)
    change("parallel/config.py", '"adamw": "AdamW"', '"adamw": "AdamW", "sgd": "SGD"')
    append("tests/unit/parallel/optimizer/test_sgd.py", optimizer_test)
    append("evaluation/text_scores.py", metric)
    change("evaluation/score.py", "SCORERS:", f"{scorer}\n\nSCORERS:")
    change("evaluation/score.py", "import edit_distance", "import edit_distance, first_word")
    change("evaluation/score.py", '"captioning": _text', '"captioning": _caption')
    append("tests/unit/evaluation/test_text_scores.py", metric_test)
    files = ["data/objectives/test_objectives.py", "parallel/optimizer/test_sgd.py", "evaluation/test_text_scores.py"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(f"tests/unit/{file}" for file in files)]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout[-3000:]
