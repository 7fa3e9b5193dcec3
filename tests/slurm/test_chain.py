"""Jobs that wait for each other, and corpora made by MPI ranks of several nodes."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from data.corpus import build
from data.miniature import official
from data.ranks import Ranks
from slurm.code_snapshot import ROOT
from tests.slurm.cluster import Cluster, call, wait_for
from tests.slurm.conftest import CORPUS, SETTINGS, curve, same_curve
from tests.unit.data.corpus.conftest import write_tars
from train.submit import follow, main, plan, requests, submit

Curve = list[tuple[int, float, float]]


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*.tar") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_corpus_two_trainings_and_scores(
    slurm: Cluster, corpus: Path, straight: Curve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One command; four ranks on two nodes make the bytes that one process makes, and the rest builds on them."""
    monkeypatch.chdir(tmp_path)
    words = ["cluster=cpu", "cluster.tasks_per_node=1", "submit.ranks=4",
             "corpus", "folder=c", *CORPUS, "tokenizer.vocab_size=1024",
             "pretrain", *SETTINGS, "data.root=c", "run.steps=2", "run.folder=one",
             "pretrain", *SETTINGS, "data.root=c", "run.steps=1", "run.folder=two", "run.initial=one",
             "evaluate", "run.folder=two", "evaluation.examples=2", "evaluation.max_new_tokens=2"]  # fmt: skip
    submitted = submit(plan(requests(words)))
    assert submitted[0][0].title == "corpus c: 2 nodes x 2 ranks"
    follow(submitted)  # exits unless all end well
    assert "made in" in capsys.readouterr().out
    assert digests(Path("c")) == digests(corpus)
    same_curve(curve(Path("one")), straight[:2])
    assert json.loads(Path("two/evaluation.json").read_text(encoding="utf-8"))["step"] == 1


def test_a_corpus_of_downloads_by_srun(slurm: Cluster, tmp_path: Path) -> None:
    """Ranks on two nodes make the bytes that one process makes; they exchange addresses that Slurm reads whole."""
    write_tars(tmp_path / "downloads")
    words = [f"inputs.web.path={tmp_path / 'downloads'}", "language.engines=[fasttext]", "shard_records=4"]
    build.build(build.parse([f"folder={tmp_path / 'one'}", *words]), Ranks())
    start = ["env", "MPIR_CVAR_DEBUG_SUMMARY=1", "srun", "--mpi=pmi2", "--nodes=2", "--ntasks-per-node=1"]
    command = [sys.executable, "-m", "data.corpus.build", f"folder={tmp_path / 'two'}", *words]
    printed = call(*start, f"--chdir={ROOT}", *command)
    assert "by 2 ranks" in printed and "FI_VERSION" in printed and "UCX netmod" not in printed
    assert digests(tmp_path / "two") == digests(tmp_path / "one") and len(digests(tmp_path / "one")) > 2


def test_resolutions_then_a_task_and_an_evaluation_beside_it(
    slurm: Cluster, corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One command: two resolutions of pretraining, a fine-tuning, and an evaluation of each of its checkpoints."""
    monkeypatch.chdir(tmp_path)
    official.main(official.Options(str(corpus), "official", records=2, train_records=8))
    task = ["task=coco", "task.root=official", "task.image_size=84", "task.max_new_tokens=2"]
    words = ["cluster=cpu", "cluster.tasks_per_node=1",
             "pretrain", *SETTINGS, f"data.root={corpus}", "run.steps=1", "run.folder=low", "phases.mini.image_size=56",
             "pretrain", *SETTINGS, f"data.root={corpus}", "run.steps=1", "run.folder=high", "run.initial=low@1",
             "finetune", *task, "run.initial=high", "run.folder=coco", "tracker=none", "run.precision=fp32",
             "task.recipe.batch_size=4", "task.recipe.steps=2", "evaluation.every_steps=1", "evaluation.task_items=2",
             "evaluation.steps=1", "evaluation.samples=0", "checkpoint.keep_every=1",
             "evaluate", "run.folder=coco", *task, "evaluation.follow=true", "evaluation.follow_s=300"]  # fmt: skip
    jobs = plan(requests(words))
    assert [job.follows for job in jobs] == [False, False, False, True]
    follow(submit(jobs))
    scored = sorted(Path("coco/tasks/coco").glob("step_*/evaluation.json"))
    assert [json.loads(file.read_text(encoding="utf-8"))["step"] for file in scored] == [1, 2]
    assert [step for step, *_ in curve(Path("coco"))] == [1, 2]


def test_a_broken_link_cancels_what_hangs_on_it(
    slurm: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine", encoding="utf-8")
    words = ["corpus", "folder=thesis", *CORPUS, "pretrain", *SETTINGS, "data.root=thesis", "run.folder=run"]
    (corpus, number), (_, waiting) = submit(plan(requests(["cluster=cpu", *words])))
    found, printed = wait_for(number), corpus.log(number).read_text(encoding="utf-8")
    assert found["JobState"] == "FAILED" and printed.count("thesis exists and is no miniature corpus") == 1, printed
    assert wait_for(waiting)["JobState"] == "CANCELLED"
    assert (tmp_path / "thesis" / "chapter.tex").exists()


def test_followers_learn_how_it_ended(
    slurm: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit) as end:
        main(["--follow", "cluster=cpu", "submit.ranks=1", "corpus", "folder=thesis", *CORPUS])
    printed = capsys.readouterr()
    assert end.value.code == 1 and "is no miniature corpus" in printed.out and "ended: FAILED" in printed.err


def test_mpi_that_does_not_see_its_step_is_one_sentence(slurm: Cluster, tmp_path: Path) -> None:
    """srun without --mpi makes every rank a world of its own: four would write the same corpus."""
    done = subprocess.run(
        ["srun", "--mpi=none", "--ntasks=4", "--nodes=2", sys.executable, "-m", "data.miniature", "folder=c"],
        cwd=ROOT, capture_output=True, encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.returncode == 2 and "MPI's size is 1 in a world of 4 processes: srun and the MPI library" in done.stderr
    assert done.stderr.count("MPI's size") == 1 and not (ROOT / "c").exists()
