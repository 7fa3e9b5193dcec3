"""The job scripts: the site's file, the exit codes of ranks, a busy controller."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.code_snapshot import ROOT
from train.health import exit_note as note

Script = Callable[..., tuple[int, str, list[str]]]
STUB = '#!/bin/bash\necho "$(basename "$0") $*" >> "{log}"\n{body}\n'


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Run a script with stubs of Slurm's commands; return (exit code, its output, the commands that it calls)."""
    log, place = tmp_path / "calls", tmp_path / "bin"
    place.mkdir()

    def run(
        name: str = "pretrain", *words: str, srun: str = "exit 0", scontrol: str = "exit 0",
        restarts: int | None = None, **variables: str,
    ) -> tuple[int, str, list[str]]:  # fmt: skip
        log.write_text("", encoding="utf-8")
        for command, body in {"srun": srun, "scontrol": scontrol, "sleep": "exit 0", "python": "exit 0"}.items():
            (place / command).write_text(STUB.format(log=log, body=body), encoding="utf-8")
            (place / command).chmod(0o755)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PALI_"))}
        job = {
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_NTASKS_PER_NODE": "4",
            "PATH": f"{place}:/usr/bin:/bin",
        }
        if restarts is not None:
            job["SLURM_RESTART_COUNT"] = str(restarts)
        done = subprocess.run(
            ["bash", ROOT / "slurm" / f"{name}.sbatch", *words],
            cwd=tmp_path, env=inherited | job | variables, capture_output=True, encoding="utf-8", timeout=200,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, log.read_text(encoding="utf-8").splitlines()

    return run


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [(0, None, False), (1, None, True), (1, 2, True), (1, 3, False), (2, None, False), (2, 1, False), (3, None, False),
     (4, None, True), (4, 3, True), (4, 10, False), (75, None, True), (75, 500, True), (137, 3, True), (137, 10, False),
     (127, 10, False)],
)  # fmt: skip
def test_what_is_queued_again(code: int, restarts: int | None, again: bool, script: Script) -> None:
    ended, printed, calls = script(srun=f"exit {code}", restarts=restarts)
    assert [call.split()[0] for call in calls] == ["srun", "scontrol"][: 1 + again]
    assert ended == (0 if again else code)
    assert ("scontrol requeue 7" in calls) == again == ("the job is requeued" in printed)
    assert ("the job is not requeued again" in printed) == (not again and code not in (0, 2, 3))


def test_only_quick_ends_are_counted(script: Script, tmp_path: Path) -> None:
    """A run that trained for two minutes may have made progress; train/run/restarts.py counts those."""
    (tmp_path / "site.sh").write_text("SECONDS=120\n", encoding="utf-8")
    site = str(tmp_path / "site.sh")
    assert script(srun="exit 1", restarts=3, PALI_SITE=site)[2][-1] == "scontrol requeue 7"
    (tmp_path / "site.sh").write_text("SECONDS=100\n", encoding="utf-8")
    assert script(srun="exit 1", restarts=3, PALI_SITE=site)[0] == 1


def rank(code: int, sentence: str, peers: int) -> str:
    """A step in which one rank leaves a note, and its peers end with another code."""
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})"
    python = f"{path}; from train.health import exit_note; exit_note.leave({code}, {sentence!r})"
    return (
        f"SLURM_PROCID=5 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=8 {sys.executable} -c {python!r}\nexit {peers}".replace(
            "\\'", "'"
        )
    )


@pytest.mark.parametrize(("code", "peers"), [(3, 4), (3, 137), (2, 143), (3, 75)])
@pytest.mark.parametrize("name", ["pretrain", "evaluate"])
def test_what_one_rank_alone_has_ends_the_job(name: str, code: int, peers: int, script: Script) -> None:
    ended, printed, calls = script(name, srun=rank(code, "The disk is full.", peers))
    assert ended == code and len(calls) == 1
    assert f"The ranks ended with exit code {peers}, because one stopped the run with {code}: rank 5 on " in printed
    assert "The disk is full." in printed


@pytest.mark.parametrize("code", [1, 4, 75])
def test_what_passes_leaves_no_note(code: int, script: Script) -> None:
    _, _, calls = script(srun=rank(code, "Saved.", 4))
    assert calls[-1] == "scontrol requeue 7"


def test_a_note_of_an_earlier_start_counts_no_more(script: Script, tmp_path: Path) -> None:
    (tmp_path / ".note-7").write_text("3\nThe disk was full.\n", encoding="utf-8")
    _, printed, calls = script(srun="exit 4", restarts=1, SLURM_SUBMIT_DIR=str(tmp_path))
    assert calls[-1] == "scontrol requeue 7" and "was full" not in printed
    assert not (tmp_path / ".note-7").exists()


def test_a_rank_that_cannot_even_write_its_note(script: Script) -> None:
    ended, printed, calls = script(srun='rm "$PALI_NOTE"; exit 4')
    assert ended == 3 and len(calls) == 1 and "could not write why (is the disk full?)" in printed


def test_a_folder_that_takes_no_note_is_printed(script: Script, tmp_path: Path) -> None:
    _, printed, calls = script(srun="exit 4", SLURM_SUBMIT_DIR=str(tmp_path / "gone"))
    assert "gone cannot be written to: if one rank stops" in printed and calls[-1] == "scontrol requeue 7"


def test_scontrol_is_tried_again(script: Script, tmp_path: Path) -> None:
    third = f'[ $(grep -c scontrol "{tmp_path}/calls") -gt 2 ]'
    busy = third + ' || { echo "Unable to contact slurm controller" >&2; exit 1; }'
    ended, _, calls = script(srun="exit 75", scontrol=busy)
    assert ended == 0 and calls[1:] == [
        "scontrol requeue 7",
        "sleep 1",
        "scontrol requeue 7",
        "sleep 2",
        "scontrol requeue 7",
    ]
    ended, printed, calls = script(srun="exit 75", scontrol='echo "Unable to contact slurm controller" >&2; exit 1')
    assert ended == 75 and calls.count("scontrol requeue 7") == 10
    assert "did not queue the job again (Unable to contact slurm controller); submit it once more" in printed


def test_the_signal_that_follows_a_requeue_ends_no_scontrol(script: Script) -> None:
    assert script(srun="exit 75", scontrol="kill -TERM $PPID; exit 0")[0] == 0


@pytest.mark.parametrize("name", ["pretrain", "evaluate", "corpus"])
@pytest.mark.parametrize("site", ["", "python=(", "return 1\n", "false\n"])
def test_a_site_that_cannot_be_read_ends_the_job(site: str, name: str, script: Script, tmp_path: Path) -> None:
    """It would go on with whatever Python and code the node finds by itself."""
    path = tmp_path / "site.sh"
    if site:
        path.write_text(site, encoding="utf-8")
    for words, variables in (((), {"PALI_SITE": str(path)}), ((f"--site={path}",), {})):
        ended, printed, calls = script(name, *words, **variables)
        assert ended == 2 and calls == [] and f"The site's file ({path}) cannot be read, or ends with code" in printed


@pytest.mark.parametrize("name", ["pretrain", "evaluate", "corpus"])
def test_the_sites_commands_are_used(name: str, script: Script, tmp_path: Path) -> None:
    path = tmp_path / "a site.sh"
    path.write_text("python=(my 'own python') srun=(srun --mine)\n[ -n $UNSET ]\nset -e\n", encoding="utf-8")
    ended, _, calls = script(
        name, f"--site={path}", "run.name=a b", srun='[ "$SLURM_EXPORT_ENV" = ALL ] || exit 9; exit 3'
    )
    assert ended == 3 and calls[0].startswith("srun --mine --")
    assert calls[0].endswith("run.name=a b") and "--site" not in calls[0] and "my own python -m " in calls[0]


def test_evaluations_are_tried_again_three_times(script: Script) -> None:
    for code, restarts, again in (
        (75, 2, True),
        (75, 3, False),
        (4, None, False),
        (137, None, False),
        (0, None, False),
    ):
        ended, _, calls = script("evaluate", srun=f"exit {code}", restarts=restarts)
        assert (ended, len(calls)) == ((0, 2) if again else (code, 1))


def test_corpora_end_with_their_ranks_code(script: Script) -> None:
    assert script("corpus", "folder=c", srun="exit 3")[0] == 3
    ended, _, calls = script("corpus", "folder=c", "tokenizer.vocab_size=9")
    assert ended == 0 and calls[1] == "python -m data.tokenizer root=c output=c/tokenizer.model vocab_size=9"


def test_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first wins; long ones are cut between letters; a sweep takes its own back; torchrun gets one too."""
    file = tmp_path / "note"
    file.write_bytes(b" " * 4095 + b"\n")
    monkeypatch.setenv("PALI_NOTE", str(file))
    note.leave(3, "ü" * 5000)
    note.leave(2, "Later.")
    text = file.read_bytes()
    assert len(text) == 4096 and text.startswith(b"3\nrank 0 on ") and text.decode().rstrip().endswith("ü")
    note.withdraw()
    assert not file.read_text(encoding="utf-8").strip()
    note.leave(2, "Of the\nnext run.")
    assert file.read_text(encoding="utf-8").splitlines()[1].endswith(": Of the next run.")


def test_a_note_that_cannot_be_written_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes no room, and the script reads it as a stop."""

    def full(path: str, text: str) -> None:
        raise OSError(28, "No space left on device")

    file = tmp_path / "note"
    file.write_bytes(b" " * 4095 + b"\n")
    monkeypatch.setenv("PALI_NOTE", str(file))
    monkeypatch.setattr(note, "_write", full)
    note.leave(3, "The disk is full.")
    assert not file.exists()
