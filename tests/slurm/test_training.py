"""Runs that Slurm starts, interrupts and starts again give the curve of one process that nothing happens to."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slurm.job import Job
from tests.slurm.cluster import Cluster, call, show, wait_for
from tests.slurm.conftest import SETTINGS, curve, same_curve, stopped_after
from train.entry import register
from train.submit import plan, requests, submit

Curve = list[tuple[int, float, float]]
Submit = Callable[..., tuple[Job, str]]


@pytest.fixture
def train(slurm: Cluster, corpus: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Submit:
    """Submits the run of the settings, with more words, as a user would; returns the job and its id."""
    monkeypatch.chdir(tmp_path)
    register()

    def submitted(*words: str) -> tuple[Job, str]:
        (one,) = submit(plan(requests(["cluster=cpu", *SETTINGS, f"data.root={corpus}", "run.folder=run", *words])))
        return one

    return submitted


def ends_well(job: Job, number: str, restarts: int = 0) -> str:
    """Waits for the job's end; returns what is in its log."""
    found, printed = wait_for(number), job.log(number).read_text(encoding="utf-8")
    assert found["JobState"] == "COMPLETED" and int(found["Restarts"]) == restarts, f"{found}\n{printed}"
    return printed


@pytest.mark.parametrize(
    ("nodes", "layout"),
    [
        (2, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.zero_stage=1"]),
        (4, ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true", "parallel.zero_stage=3",
             "submit.data_parallel=2"]),
    ],
    ids=["tensor2-pipeline2-zero1", "tensor2-pipeline2-data2-zero3"],
)  # fmt: skip
def test_nodes_of_two_ranks(nodes: int, layout: list[str], train: Submit, straight: Curve) -> None:
    job, number = train(*layout, "run.steps=3", "schedule.warmup_steps=2")
    assert job.title == f"pretrain run: {nodes} nodes x 2 ranks"
    ends_well(job, number)
    same_curve(curve(Path("run")), straight[:3])


def test_a_signal_that_one_rank_receives(train: Submit, straight: Curve) -> None:
    job, number = train("submit.data_parallel=2", "cluster.tasks_per_node=1")
    with stopped_after(2, Path("run"), number) as ranks:
        os.kill(ranks[1], signal.SIGUSR1)
    printed = ends_well(job, number, restarts=1)
    assert "it is saved, and the same command goes on" in printed and "exit code 75; the job is requeued" in printed, (
        printed
    )
    same_curve(curve(Path("run")), straight)


def test_preemption_by_a_more_urgent_job(train: Submit, straight: Curve, tmp_path: Path) -> None:
    job, number = train("submit.data_parallel=2", "cluster.tasks_per_node=1")
    with stopped_after(2, Path("run"), number):  # Slurm lets them go on, with SIGCONT, to receive its SIGTERM
        urgent = call("sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--exclusive", "--wrap=true").strip()
        wait_for(urgent, "RUNNING", "COMPLETED")
    printed = ends_well(job, number, restarts=1)
    assert wait_for(urgent)["JobState"] == "COMPLETED"
    assert "it is saved, and the same command goes on" in printed, printed
    same_curve(curve(Path("run")), straight)


def test_a_node_lost_in_the_middle_of_a_step(slurm: Cluster, train: Submit, straight: Curve) -> None:
    """The job goes on where it was with the nodes that are left: one of two."""
    elastic = ["submit.data_parallel=2", "submit.min_data_parallel=1", "cluster.tasks_per_node=1"]
    job, number = train(*elastic, "cluster.sbatch=['--exclude=n1,n2']")
    assert job.title == "pretrain run: 1 to 2 nodes x 1 rank"
    with stopped_after(5, Path("run"), number):  # the checkpoint of step 2 is whole before that of step 4 begins
        slurm.kill_node("n4")
    try:
        printed = ends_well(job, number, restarts=1)
        assert show(number)["NumNodes"] == "1" and "resumed after step" in printed, printed
    finally:
        slurm.start_node("n4")
    same_curve(curve(Path("run")), straight)


def test_a_killed_rank(train: Submit, straight: Curve) -> None:
    job, number = train("submit.data_parallel=2", "cluster.tasks_per_node=1")
    with stopped_after(5, Path("run"), number) as ranks:
        os.kill(ranks[1], signal.SIGKILL)
    assert "resumed after step" in ends_well(job, number, restarts=1)
    same_curve(curve(Path("run")), straight)


def test_a_killed_rank_and_a_run_that_comes_no_further(train: Submit) -> None:
    """Its peers end, the job is started again, and as nothing was saved since, and it may not try again, it stops."""
    job, number = train(
        "submit.data_parallel=2", "cluster.tasks_per_node=1", "checkpoint.every_steps=1000",
        "run.restarts_without_progress=0",
    )  # fmt: skip
    with stopped_after(1, Path("run"), number) as ranks:
        os.kill(ranks[1], signal.SIGKILL)
    found, printed = wait_for(number, "FAILED"), job.log(number).read_text(encoding="utf-8")
    assert found["Restarts"] == "1" and found["ExitCode"] == "3:0", f"{found}\n{printed}"
    assert (
        printed.count("the job is requeued") == 1 and "without saving anything after step 0, so it stops" in printed
    ), printed


def test_a_canceled_job_stays_canceled(train: Submit) -> None:
    job, number = train()
    wait_for(number, "RUNNING")
    time.sleep(1)
    call("scancel", number)
    found = wait_for(number)
    assert found["JobState"] == "CANCELLED" and "requeued" not in job.log(number).read_text(encoding="utf-8")
