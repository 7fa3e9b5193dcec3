"""A mistake in the configuration is one sentence and exit code 2."""

import errno
import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import ConfigurationError, RunStopped, StorageFailed
from train import GARBAGE_THRESHOLD
from train.entry import CONF, entry, folder_name, in_one_sentence, without_injected


def outcome(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *arguments: str
) -> tuple[int, str]:
    """Exit code and what was printed, of a program that only reads its configuration."""
    from train.settings.compose import to_run_config

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as end:
        entry("pretrain", lambda composed: print(to_run_config(composed).run) or sys.exit(0))  # type: ignore[func-returns-value]
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.err if end.value.code else captured.out


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [
        ("run.stepz=3", "run.stepz is not a setting; did you mean run.steps?"),
        ("optimizr=adamw", "did you mean optimizer"),
        ("run.steps=many", "run.steps: Value 'many' of type 'str' could not be converted to Integer"),
        ("run.steps=0", "run.steps=0 must be at least 1."),
        ("run.precision=fp8", "run.precision='fp8' is unknown; choose fp32 or bf16."),
        ("model=pali_9b", "model=pali_9b does not exist; did you mean pali_5b? choose one of"),
        ("schedule.name=rsqr", "schedule.name='rsqr' is unknown; did you mean rsqrt?"),
        ("phases.mini.learning_rate_factor=-1", "phases.mini.learning_rate_factor=-1.0 must be greater than 0."),
        ("evaluation.split=train", "evaluation.split='train' is unknown"),
        ("run.steps", "'run.steps' cannot be read as key=value"),
        ("~phases", "phases is empty"),
        ("+run.stpes=5", "run.stpes is not a setting; did you mean run.steps?"),
        ("phases.mini.frezee=[a]", "phases.mini.frezee is not a setting; did you mean phases.mini.freeze?"),
        ("phases.x={frezee: [a]}", "phases.x.frezee is not a setting; did you mean phases.x.freeze?"),
        ("phases.mino.freeze=[a]", "phases.mino is not a setting; did you mean phases.mini?"),
        ("mixture.orc.weight=0", "mixture.orc is not a setting; did you mean mixture.ocr?"),
        ("mixture.orc={weight: 0}", "mixture.orc.source is not given; did you mean mixture.ocr?"),
        ("phases.mini.tensor=2", "phases.mini.tensor cannot differ between phases, as process groups are made once"),
        ("mixture.ocr.wieght=2", "mixture.ocr.wieght is not a setting; did you mean mixture.ocr.weight?"),
    ],
)
def test_mistakes(
    argument: str, sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    code, printed = outcome(capsys, monkeypatch, tmp_path, argument)
    assert code == 2
    assert sentence in printed
    assert printed.startswith("Configuration: ") and printed.count("\n") == 1


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nGPU 0")])
def test_too_little_memory_is_one_sentence_outside_of_steps_too(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Building, loading and evaluating take memory; the rank that lacks it prints it itself."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)

    def fails() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        in_one_sentence(fails)
    printed = capsys.readouterr().err
    assert end.value.code == 3 and printed.count("\n") == 1 and printed.startswith("Out of memory (")


def test_other_errors_of_the_program_stay_tracebacks() -> None:
    def fails() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        in_one_sentence(fails)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (StorageFailed("/data/x.tar: no answer."), 75, "/data/x.tar: no answer.\n"),
        (OSError(errno.EIO, os.strerror(errno.EIO), "/x/metrics"), 75, "/x/metrics: Input/output error; start aga"),
        (OSError(errno.ESTALE, "a socket of no file"), None, ""),
    ],
)
def test_storage_that_fails_is_one_sentence_and_the_code_that_is_queued_again(
    error: Exception, code: int | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit if code else OSError) as end:
        in_one_sentence(fail)
    assert code is None or end.value.code == code  # type: ignore[union-attr]
    assert capsys.readouterr().err.startswith(message)


def test_injected_ranks_are_dropped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert without_injected(["--local_rank=1", "a=b", "--local-rank", "2", "c=d"]) == ["a=b", "c=d"]
    code, printed = outcome(capsys, monkeypatch, tmp_path, "--local_rank=1", "run.steps=7")
    assert code == 0 and "steps=7" in printed


def test_other_ranks_keep_quiet(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n1"}.items():
        monkeypatch.setenv(name, value)
    assert outcome(capsys, monkeypatch, tmp_path, "run.steps=0") == (2, "")


def test_each_run_of_a_sweep_has_a_folder_named_by_its_overrides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program", "-m", "run.steps=1,2", "run.name=sweep"])
    entry("pretrain", lambda composed: seen.append((composed.run.folder, composed.run.name)))
    assert seen == [(f"runs/sweep/run.steps={n}", f"sweep/run.steps={n}") for n in (1, 2)]


def test_garbage_is_searched_for_rarely_until_a_command_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = "import gc, train; print(train.GARBAGE_THRESHOLD[0] < gc.get_threshold()[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=CONF.parent, capture_output=True, encoding="utf-8")
    assert done.stdout == "True\n", done.stderr
    seen: list[tuple[int, ...]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program"])
    gc.set_threshold(50_000)
    entry("pretrain", lambda composed: seen.append(gc.get_threshold()))
    assert seen == [GARBAGE_THRESHOLD]


def test_folder_names_are_short_and_flat() -> None:
    assert folder_name("data.root=/a/b,run.steps=1") == "data.root=_a_b,run.steps=1"
    assert len(folder_name("x" * 400)) == 150
    assert folder_name("x" * 400) != folder_name("x" * 401)


def test_a_run_that_stops_itself_exits_with_three(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stops(_: object) -> None:
        raise RunStopped("The run stopped.")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as end:
        entry("pretrain", stops)
    assert end.value.code == 3
    assert capsys.readouterr().err == "The run stopped.\n"


@pytest.mark.parametrize(("cause", "code"), [(errno.EACCES, 2), (errno.ENOSPC, 3)])
def test_what_the_users_disk_refuses_is_one_sentence(
    cause: int, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused(_: object) -> None:
        raise OSError(cause, os.strerror(cause), "some/where")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit) as end:
        entry("pretrain", refused)
    assert end.value.code == code
    assert capsys.readouterr().err == f"some/where: {os.strerror(cause)}; correct that, or choose another path.\n"


@pytest.mark.parametrize(
    ("module", "argument", "sentence"),
    [
        ("train.pretrain", "parallel.tensor=3", "4 processes cannot be divided into parallel.tensor=3"),
        ("train.pretrain", "run.folder=/dev/null/run", "Not a directory; correct that, or choose another path."),
        ("train.pretrain", "data.root=nowhere", "no train shards at nowhere/"),
        ("train.evaluate", "run.folder=nowhere", "run.folder=nowhere holds no run (no config.yaml); train one first."),
    ],
)
def test_the_entry_points_themselves(
    module: str, argument: str, sentence: str, tmp_path: Path, tokenizer_path: Path
) -> None:
    """Before any process group: with a world that nobody else joins, a start would wait."""
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "4", "PYTHONPATH": str(CONF.parent)}
    tokenizer = [f"data.tokenizer={tokenizer_path}"] if module == "train.pretrain" else []
    done = subprocess.run(
        [sys.executable, "-m", module, argument, *tokenizer],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert sentence in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()), "a run that is refused leaves nothing"


def test_our_warnings_are_sentences_and_others_state_where_they_come_from() -> None:
    code = (
        "import warnings; from common.errors import Notice; from train.entry import entry;"
        "entry('pretrain', lambda _: [warnings.warn('Ours.', Notice), warnings.warn('Theirs.', RuntimeWarning)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CONF.parent, capture_output=True, encoding="utf-8", timeout=120
    )
    assert done.stderr.splitlines() == ["Warning: Ours.", "<string>:1: RuntimeWarning: Theirs."], done.stderr


def test_a_mistake_is_a_value_error() -> None:
    assert issubclass(ConfigurationError, ValueError)
