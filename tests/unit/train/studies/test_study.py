"""A study: its runs pass the checks, lie in the folders of the plan, and are neither trained nor evaluated twice."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig

from common.errors import ConfigurationError, Interrupted, RunStopped
from data.labels import main as collect_labels
from data.miniature.config import MiniatureConfig
from data.miniature.corpus import make_corpus
from train import evaluate, pretrain
from train.entry import entry
from train.studies.plan import FOLDER_VARIABLE, Cell, StudySweep, read_study
from train.studies.processes import interrupt_on, run_side_by_side
from train.study import main, run_sweep, split


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(MiniatureConfig(folder=str(folder), scale=0.002, languages=["en", "de"], workers=1))
    collect_labels([f"root={folder}"])
    shutil.copy(tokenizer_path, folder / "tokenizer.model")
    return folder


@pytest.fixture(autouse=True)
def own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "study"))


def finish(cell: Cell, evaluated: bool = True) -> None:
    """Leave what a run leaves when it is done."""
    (cell.folder / "checkpoints" / f"step_{cell.steps:08d}").mkdir(parents=True)
    if evaluated:
        (cell.folder / "evaluation.json").write_text(json.dumps({"step": cell.steps}), encoding="utf-8")


@pytest.mark.parametrize("study", ["miniature", "web"])
def test_every_run_passes_the_checks(
    study: str, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the miniature study its towers alone: the other cells are those of the web's."""
    sweeps = read_study(study, tmp_path, 1)
    names = ["vits", "mt5s"] if study == "miniature" else list(sweeps)
    sources = ["webli", "cc3m_35l", "vq2a", "objects"] if study == "web" else []
    words = [f"data.root={corpus}", *(f"data.sources.{name}={name}" for name in sources)]
    own = [f"study={study}", f"folder={tmp_path / 'study'}", f"sweeps=[{','.join(names)}]", "--dry-run", "--"]
    main([*own, *words])
    printed = capsys.readouterr().out
    for name in names:
        runs = len(sweeps[name].cells())
        assert f"# {name}: {runs} runs of {sweeps[name].steps} steps, {runs} to train" in printed
    assert not (tmp_path / "study").exists()
    with pytest.raises(ConfigurationError, match=r"schedule\.warmup_steps"):
        main([*own, *words, "schedule.warmup_steps=-1"])


def composed_folders(monkeypatch: pytest.MonkeyPatch, name: str, words: list[str], reads: tuple[str, ...]) -> list[str]:
    """Return the folders of the runs that a command of these words starts."""
    found: list[str] = []

    def run(composed: DictConfig) -> None:
        found.append(str(Path(composed.run.folder)))

    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    entry(name, run, reads)
    return found


def test_runs_lie_in_the_folders_of_the_plan(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    sweeps = read_study(
        "miniature", tmp_path, 2, more=["data.sources.own=x", "mixture.span_corruption.options={input_length: 64}"]
    )
    assert [sweep.steps for sweep in sweeps.values()] == [300, 400, 700, 150, 300]
    assert read_study("miniature", tmp_path, 1, full=True)["cells"].steps == 3000
    for name, runs in (("mt5s", 4), ("cells", 26), ("second_phase", 4), ("scaling", 32)):
        cells = sweeps[name].cells()
        folders = {str(cell.folder) for cell in cells}
        assert len(folders) == len(cells) == runs
        if name in ("mt5s", "second_phase"):
            started = composed_folders(monkeypatch, "pretrain", sweeps[name].training(cells), pretrain.READS)
            assert sorted(started) == sorted(folders)
    cells = sweeps["cells"].cells()[:2]
    evaluated = composed_folders(monkeypatch, "evaluate", sweeps["cells"].evaluation(cells), evaluate.READS)
    assert evaluated == [str(cell.folder) for cell in cells]


def test_what_is_done_is_not_done_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both cells are trained and one is evaluated; then the other is evaluated; then nothing is left."""
    sweep = read_study("miniature", tmp_path, 1)["cells"]
    some = {"cell": ["full", "scratch", "english"]}
    sweep = StudySweep("cells", type(sweep.config)(over=some, steps=700), sweep.folder, (0,), 700)
    full, scratch, english = sweep.cells()
    finish(full)
    finish(scratch, evaluated=False)
    started: list[list[str]] = []

    def start(commands: list[list[str]], logs: list[Path], ranks: int, look: object) -> None:
        started.extend(
            [command[0], command[-2] if command[0] == "train.pretrain" else command[-1]] for command in commands
        )
        for cell in (english, scratch) if "train.evaluate" in commands[0] else ():
            if str(cell.folder) in str(commands):
                (cell.folder / "evaluation.json").write_text(json.dumps({"step": 700}), encoding="utf-8")
        if "train.pretrain" in commands[0]:
            finish(english, evaluated=False)

    monkeypatch.setattr("train.study.run_side_by_side", start)
    options, _ = split(["jobs=2"])
    run_sweep(sweep, options)
    assert started == [
        ["train.pretrain", "cell=english"],
        ["train.evaluate", f"run.folder='{scratch.folder}'"],
        ["train.evaluate", f"run.folder='{english.folder}'"],
    ]
    started.clear()
    run_sweep(sweep, options)
    assert not started
    half = Cell({}, full.folder, 1400)
    assert not half.trained and not half.evaluated  # a longer pass in the same folder goes on


def test_runs_are_dealt_to_sweeps_side_by_side(tmp_path: Path) -> None:
    sweep = read_study("miniature", tmp_path, 2)["scaling"]
    parts = sweep.share(sweep.cells(), 3)
    assert [len(part) for part in parts] == [16, 8, 8]
    assert sorted(str(cell) for part in parts for cell in part) == sorted(map(str, sweep.cells()))
    assert all(len({cell.values["vit"] for cell in part}) <= 2 for part in parts)
    assert sweep.share([], 2) == []
    alone = read_study("web", tmp_path, 2)["text_before"]
    assert alone.share(alone.cells(), 2) == [alone.cells()] and alone.cells()[0].folder == alone.folder


def test_a_sweep_that_fails_or_is_interrupted_names_its_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text("import sys\nprint('here')\nsys.exit(int(sys.argv[1]))\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("train.studies.processes.POLL_S", 0.01)
    looked: list[int] = []

    def run(code: int) -> Path:
        logs = [tmp_path / str(code) / f"trained_{part}.log" for part in range(2)]
        run_side_by_side([["ends", "0"], ["ends", str(code)]], logs, 1, lambda: looked.append(code))
        return logs[1]

    assert run(0).read_text(encoding="utf-8") == "here\n" and looked
    for code, error in ((75, Interrupted), (2, RunStopped)):
        with pytest.raises(error, match=f"{tmp_path}/{code}/trained_1.log"):
            run(code)


def test_a_signal_interrupts_the_sweeps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also SIGINT, which a job in the background of a shell ignores."""
    (tmp_path / "waits.py").write_text(
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(75)))\n"
        "print('ready', flush=True)\ntime.sleep(60)\n",
        encoding="utf-8",
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("train.studies.processes.POLL_S", 0.01)
    for number in (signal.SIGTERM, signal.SIGINT):
        log = tmp_path / f"{number}.log"

        def look(log: Path = log, number: int = number) -> None:
            if "ready" in log.read_text(encoding="utf-8"):
                os.kill(os.getpid(), number)

        before = signal.signal(number, signal.SIG_IGN)
        try:
            interrupt_on([number])
            with pytest.raises(KeyboardInterrupt):
                run_side_by_side([["waits"]], [log], 1, look)
        finally:
            signal.signal(number, before)
        assert log.read_text(encoding="utf-8") == "ready\nsaved\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["study=moon"], "study=moon is not a file of conf/study; choose one of miniature, web."),
        (
            ["sweeps=[moon]"],
            "sweeps=moon is not a sweep of the study; it has vits, mt5s, cells, second_phase, scaling.",
        ),
        (["jobs=0"], "jobs=0 must be at least 1."),
    ],
)
def test_mistakes(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        main(arguments)
    assert sentence in str(error.value)
