"""A corpus of every kind of input: its counts, its bytes for any ranks and after kills, and its refusals."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from common.errors import ConfigurationError, RunStopped
from data.corpus import build
from data.corpus.config import parse
from data.error_budget import Ledger
from data.ranks import Ranks
from data.shards.source import ShardSource

ROOT = Path(__file__).parents[4]


def make(folder: Path, words: list[str], *more: str) -> str:
    return build.build(parse([f"folder={folder}", *words, *more]), Ranks())


def content(folder: Path) -> dict[str, bytes]:
    """All files but the indices, which hold times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix in (".tar", ".json", ".html")
    }


def count(path: Path) -> int:
    with tarfile.open(path) as tar:
        return sum(name.endswith(".json") for name in tar.getnames())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("made") / "corpus"
    make(folder, words)
    return folder


def test_counts_add_up_and_name_each_cause(made: Path) -> None:
    card = json.loads((made / "card.json").read_text(encoding="utf-8"))
    web, tables, text = (card["sources"][name] for name in ("web", "tables", "text"))
    for own in (web, tables, text, card["total"]):
        assert own["rows"] == own["kept"] + sum(own["dropped"].values())
    assert web["dropped"] == {
        "near-duplicate image": 1, "image too small": 1, "image too long": 1, "unreadable image": 1,
        "boiler-plate text": 1, "empty text": 1, "text too long": 1, "no image": 1,
        "near-duplicate of evaluation set coco": 1,
    }  # fmt: skip
    assert web["defects"] == {"truncated tar": 1}
    assert tables["dropped"] == {
        "id twice": 1, "missing image file": 1, "row with another number of columns": 1, "broken JSON": 1,
        "malformed alt_text": 1,
    }  # fmt: skip
    assert tables["defects"] == {"unreadable parquet file": 1}
    assert text["dropped"] == {"near-duplicate document": 1, "empty text": 1}
    assert web["languages"]["alt_text"].keys() >= {"en", "de", "ru"}
    assert text["languages"]["text"] == {"de": 3}  # of the file's name
    assert web["notes"]["question made"] > 0


def test_shards_are_read_by_training(made: Path) -> None:
    source = ShardSource("web", str(made / "web"), "train", Ledger(0.0, 1))
    card = json.loads((made / "card.json").read_text(encoding="utf-8"))
    assert len(source) == card["sources"]["web"]["kept"]
    record = source[0]
    assert record.image is not None and record.fields["alt_text"].startswith("a brown dog")
    assert record.fields["language"] == "en" and record.fields["id"]
    sizes = [count(path) for path in sorted((made / "web").glob("*.tar"))]
    assert sizes == [5] * (len(source) // 5) + [len(source) % 5] * bool(len(source) % 5)


@pytest.mark.parametrize("number", [2, 4])
def test_bytes_do_not_depend_on_the_ranks(made: Path, words: list[str], tmp_path: Path, number: int) -> None:
    mpirun = Path(sys.executable).parent / "mpirun"
    command = [
        str(mpirun),
        "-n",
        str(number),
        sys.executable,
        "-m",
        "data.corpus.build",
        f"folder={tmp_path / 'corpus'}",
    ]
    done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, encoding="utf-8", timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"by {number} ranks" in done.stdout
    assert content(tmp_path / "corpus") == content(made)


def killed_at(replacement: int, folder: Path, words: list[str]) -> bool:
    """Build in a child process that kills itself before its n-th file gets its name; return whether it was killed."""
    child = os.fork()
    if child == 0:
        calls = 0
        replace = os.replace

        def counting(source: str, target: str) -> None:
            nonlocal calls
            calls += 1
            if calls == replacement:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = counting  # type: ignore[assignment]
        try:
            make(folder, words)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return os.WIFSIGNALED(status)


def test_killed_at_any_file_it_continues_to_the_same_bytes(made: Path, words: list[str], tmp_path: Path) -> None:
    kills = 0
    while killed_at(2 + kills, tmp_path / "corpus", words):
        kills += 1
        assert kills < 200
    assert kills > 5
    assert content(tmp_path / "corpus") == content(made)
    assert not list((tmp_path / "corpus").rglob("*.partial"))


def test_the_same_command_again_leaves_the_corpus_as_it_is(
    made: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*.tar")}
    assert build.main([f"folder={made}", *words]) == 0
    assert "is there already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in made.rglob("*.tar")}


def test_a_folder_of_another_build_is_refused(made: Path, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"other settings \(image.min_side\)"):
        make(made, words, "image.min_side=32")
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"holds notes.txt"):
        make(tmp_path, words)
    assert [path.name for path in tmp_path.iterdir() if path.name != ".lock"] == ["notes.txt"]


def test_inputs_that_changed_are_named(downloads: Path, words: list[str], tmp_path: Path) -> None:
    own = tmp_path / "laion"
    shutil.copytree(downloads / "laion", own)
    settings = [f"inputs.web.path={own}", "language.engines=[]"]
    assert killed_at(6, tmp_path / "corpus", settings)
    with open(own / "00000.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(ConfigurationError, match=r"other inputs: .*00000.tar changed"):
        make(tmp_path / "corpus", settings)


def test_a_full_disk_is_one_sentence_and_the_build_continues(
    made: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "rows")

    monkeypatch.setattr(build.read, "read_part", full)
    with pytest.raises(RunStopped, match=r"no space left.*make room"):
        make(tmp_path / "corpus", words)
    monkeypatch.undo()
    make(tmp_path / "corpus", words)
    assert content(tmp_path / "corpus") == content(made)


def test_two_builds_do_not_share_a_folder(words: list[str], tmp_path: Path) -> None:
    held = build.lock(tmp_path / "corpus")
    with pytest.raises(ConfigurationError, match="in use by another build"):
        make(tmp_path / "corpus", words)
    held.release()


def test_a_mistake_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text("inputs: [", encoding="utf-8")
    for words, expected in (
        ([], "inputs is empty"),
        ([f"config={tmp_path}/settings.yaml"], "cannot be read as YAML"),
        (["inputs.web.path=/nowhere"], "inputs.web.path=/nowhere has no such file"),
        (["inputs.web.format=webdata", "inputs.web.path=/nowhere"], "inputs.web.format='webdata' is unknown"),
        ([f"inputs.web.path={tmp_path}", "rules=[nothing]"], "rules='nothing' cannot be loaded"),
    ):
        assert build.main([f"folder={tmp_path}/corpus", *words]) == 2
        assert expected in capsys.readouterr().err
