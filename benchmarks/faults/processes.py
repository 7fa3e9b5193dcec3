"""Faults of processes: killed, stopped, started twice."""

import random
import time

import psutil

from benchmarks.faults.job import Job
from benchmarks.faults.trial import Trial

KILLS = 10


def kill_rank(trial: Trial) -> None:
    """Kill one rank."""
    trial.strikes()
    trial.job.rank(1).kill()


def kill_launcher(trial: Trial) -> None:
    """Kill the launcher, and wait until its orphaned ranks end by themselves."""
    ranks = [trial.job.rank(rank) for rank in (0, 1)]
    trial.undo.callback(lambda: [process.kill() for process in ranks if process.is_running()])
    trial.strikes()
    trial.job.launchers[0].kill()
    psutil.wait_procs(ranks, timeout=120)
    trial.reported = not any(process.is_running() for process in ranks)


def kill_node(trial: Trial) -> None:
    """Kill one of two launchers and its ranks, as a lost node does."""
    trial.strikes()
    trial.job.kill(node=1)


def stop_rank(trial: Trial) -> None:
    """Suspend one rank."""
    trial.strikes()
    trial.job.rank(1).suspend()


def start_twice(trial: Trial) -> None:
    """Start the same command beside the running job; the second must be refused."""
    second = Job(trial.job.folder, trial.job.logs / "second", trial.job.settings)
    ranks = [trial.job.rank(rank) for rank in (0, 1)]
    for process in ranks:  # else the first job would end before the second has started
        process.suspend()
    trial.strikes()
    second.start()
    second.until(second.ended, even_if_ended=True)
    for process in ranks:
        process.resume()
    trial.reported = bool(second.logged("is in use by process")) and all(second.codes())


def kill_in_checkpoints(trial: Trial) -> None:
    """Kill the job KILLS times at a random moment of writing a checkpoint; each must leave the last one whole."""
    draw, job = random.Random(0), trial.job
    longest = _checkpoint_seconds(job)
    for number in range(KILLS):
        if number:
            job.start()
        before = job.partial()
        job.until(lambda known=before: job.partial() - known)
        time.sleep(draw.uniform(0, longest))
        trial.strikes()
        job.kill()
        if job.intact() is None:
            raise RuntimeError(f"kill {number + 1} of {KILLS} left a damaged checkpoint as the latest")
    trial.reported = True


def _checkpoint_seconds(job: Job) -> float:
    job.until(lambda: list(job.checkpoints().glob("*.partial")))
    began = time.monotonic()
    job.until(lambda: (job.checkpoints() / "latest").exists())
    return time.monotonic() - began
