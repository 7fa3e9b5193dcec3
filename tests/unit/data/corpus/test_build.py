"""A corpus of every kind of input: its counts, its bytes for any ranks and after kills, and its refusals."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from common.errors import ConfigurationError, RunStopped
from data.corpus import build
from data.corpus.config import parse
from data.corpus.stages.plan import Plan
from data.corpus.stages.work import own_tasks
from data.corpus.stages.write import Shard
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
        "boiler-plate text": 1, "empty text": 1, "text too long": 1, "no image": 1, "image of too many pixels": 1,
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
    assert text["notes"] == {"document cut": 1}
    assert web["notes"]["question made"] > 0


def test_shards_are_read_by_training(made: Path) -> None:
    source = ShardSource("web", str(made / "web"), "train", Ledger(0.0, 1))
    card = json.loads((made / "card.json").read_text(encoding="utf-8"))
    assert len(source) == card["sources"]["web"]["kept"]
    record = source[0]
    assert record.image is not None and record.fields["alt_text"].startswith("a brown dog")
    assert record.fields["language"] == "en" and record.fields["id"]
    documents = ShardSource("text", str(made / "text"), "train", Ledger(0.0, 1))
    assert "Die Katze sitzt am Fenster und sieht hinaus." in [documents[n].fields["text"] for n in range(3)]
    sizes = [count(path) for path in sorted((made / "web").glob("*.tar"))]
    assert sizes == [5] * (len(source) // 5) + [len(source) % 5] * bool(len(source) % 5)


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory, annotated_words: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("annotated") / "corpus"
    make(folder, annotated_words)
    return folder


def test_selected_and_annotated(annotated: Path) -> None:
    card = json.loads((annotated / "card.json").read_text(encoding="utf-8"))
    web, objects = card["sources"]["web"], card["sources"]["objects"]
    assert web["rows"] == 8 and web["kept"] == 6 and web["dropped"] == {"similarity below the threshold": 2}
    notes = web["notes"]
    assert notes["image read by OCR"] + notes["OCR engine hung"] + notes["OCR engine crashed"] == 6
    assert notes["OCR engine hung"] == notes["OCR engine crashed"] == 1
    assert notes["question made"] and notes["translation added"] and objects["notes"]["absent label drawn"] == 8
    assert web["languages"]["captions"].keys() == {"en", "de", "fr"}
    source = ShardSource("web", str(annotated / "web"), "train", Ledger(0.0, 1))
    records = [source[n].fields for n in range(len(source))]
    (read,) = [one for one in records if one["id"] == "0"]
    assert read["ocr"][0]["text"].startswith("EXIT") and read["captions"]["de"] == [f"de: {read['alt_text']}"]


def ranks(number: int, folder: Path, words: list[str]) -> "subprocess.Popen[str]":
    """Start a build by ranks of MPI, as a group of processes of its own."""
    mpirun = str(Path(sys.executable).parent / "mpirun")
    command = [mpirun, "-n", str(number), sys.executable, "-m", "data.corpus.build", f"folder={folder}", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, encoding="utf-8", start_new_session=True)


def ends_well(started: "subprocess.Popen[str]", number: int) -> None:
    printed, errors = started.communicate(timeout=200)
    assert started.returncode == 0, printed + errors
    assert f"by {number} ranks" in printed


@pytest.mark.parametrize("number", [2, 4])
def test_bytes_do_not_depend_on_the_ranks(
    annotated: Path, annotated_words: list[str], tmp_path: Path, number: int
) -> None:
    ends_well(ranks(number, tmp_path / "corpus", annotated_words), number)
    assert content(tmp_path / "corpus") == content(annotated)


def processes(folder: Path) -> dict[int, str]:
    """Return the processes of a build, with the rank of each, or an empty text of mpirun and its helpers."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"folder={folder}\0" in (process / "cmdline").read_text("utf-8", errors="replace"):
                own = dict(
                    one.partition("=")[::2]
                    for one in (process / "environ").read_text("utf-8", errors="replace").split("\0")
                )
                found[int(process.name)] = own.get("PMI_RANK", "")
    return found


def stopped_when(pattern: str, job: "subprocess.Popen[str]", folder: Path) -> dict[int, str]:
    """Wait until a file of the build is there, stop its processes where they are, and return them."""
    end = time.monotonic() + 100
    while not list(folder.glob(pattern)):
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    found = processes(folder)
    for process in found:
        os.kill(process, signal.SIGSTOP)
    return found


def test_a_killed_rank_and_a_killed_job_continue_with_other_numbers_of_ranks(
    made: Path, words: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "corpus"
    job = ranks(2, folder, words)
    for process, rank in stopped_when("work/rows/0*", job, folder).items():
        os.kill(process, signal.SIGKILL if rank == "1" else signal.SIGCONT)
    job.communicate(timeout=100)
    assert job.returncode != 0 and not (folder / "card.json").exists()
    job = ranks(3, folder, words)
    killed = stopped_when("work/edges/0*", job, folder)
    assert sorted(filter(None, killed.values())) == ["0", "1", "2"]
    for process in killed:
        os.kill(process, signal.SIGKILL)
    job.communicate(timeout=100)
    assert not (folder / "card.json").exists() and list((folder / "work").iterdir())
    ends_well(ranks(4, folder, words), 4)
    assert content(folder) == content(made)


def test_a_rank_takes_what_the_others_have_not_begun(tmp_path: Path) -> None:
    """Tasks 0, 3 and 6 are the share of rank 0, which is slow: it begins one."""
    paths = [tmp_path / str(n) for n in range(8)]
    paths[5].touch()
    claims = tmp_path / "claims"
    claims.mkdir()
    slow, fast, late = (own_tasks(OfMany(rank, 3), "read", paths, claims) for rank in range(3))
    assert next(slow) == 0 and list(fast) == [1, 4, 7, 2, 3, 6]
    assert list(late) == list(slow) == []


class OfMany(Ranks):
    """A rank of several in one process, which no collective is called of."""

    def __init__(self, rank: int, size: int) -> None:
        self.world, self.rank, self.size = object(), rank, size  # type: ignore[assignment]


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


def test_an_input_that_changes_while_it_is_read_ends_the_build(
    downloads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "laion"
    shutil.copytree(downloads / "laion", own)
    shards, tar = build.write.shards, own / "00000.tar"

    def changed_before_the_shards(plan: Plan) -> list[Shard]:
        with tarfile.open(tar) as whole, tarfile.open(own / "other.tar", "w") as shorter:
            for member in whole.getmembers()[6:]:  # the first two samples are gone
                shorter.addfile(member, whole.extractfile(member))
        (own / "other.tar").replace(tar)
        return shards(plan)

    monkeypatch.setattr(build.write, "shards", changed_before_the_shards)
    settings = [f"inputs.web.path={tar}", "language.engines=[]"]
    with pytest.raises(RunStopped, match=r"00000\.tar changed while the corpus was built \(row 0\); start again with"):
        make(tmp_path / "corpus", settings)
    assert not (tmp_path / "corpus" / "card.json").exists() and not list((tmp_path / "corpus").rglob("train-*.tar"))


def mount(*options: str) -> bool:
    return subprocess.run(["mount", "-t", "tmpfs", *options], capture_output=True).returncode == 0


def test_a_full_disk_is_one_sentence_and_the_build_continues(made: Path, words: list[str], tmp_path: Path) -> None:
    """The disk is full in each stage in turn; with more room, the same command continues."""
    folder = tmp_path / "disk" / "corpus"
    folder.mkdir(parents=True)
    if not shutil.which("mount") or not mount("-o", "size=16k", "tmpfs", str(folder.parent)):
        pytest.skip("no file system of a small size can be mounted: needs root")
    sentences = set()
    try:
        for size in (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 4096):
            assert mount("-o", f"remount,size={size}k", "tmpfs", str(folder.parent))
            try:
                make(folder, words)
                break
            except (RunStopped, ConfigurationError) as error:
                sentences.add(re.sub(r"/\S*/", "", str(error)))
        assert content(folder) == content(made)
    finally:
        subprocess.run(["umount", "--lazy", folder.parent], check=True)  # an index may still be mapped
    expected = re.compile(r"[\w.-]+ cannot be written \(no space left\); make room and start the same command again\.")
    assert len(sentences) > 3 and not [one for one in sentences if ".partial" in one or not expected.fullmatch(one)]


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
