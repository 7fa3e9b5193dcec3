"""`-m hydra/launcher=slurm`: a sweep as one array of jobs, each of several ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from omegaconf import OmegaConf

from tests.slurm.cluster import Cluster, call, show
from tests.slurm.conftest import SETTINGS, STEPS, curve, same_curve, stopped_after

ROOT = Path(__file__).parents[2]
Curve = list[tuple[int, float, float]]


class Sweep:
    """The command of a user, in the background; its runs are in `runs/lab`."""

    def __init__(self, home: Path, corpus: Path, *words: str) -> None:
        self.folder = home / "runs" / "lab"
        site = ["hydra/launcher=slurm", "cluster@hydra.launcher.cluster=cpu", "hydra.launcher.cpus_per_task=1"]
        launcher = [*site, "hydra.launcher.poll_s=0.5", "run.name=lab"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "train.pretrain", "-m", *SETTINGS, *launcher, f"data.root={corpus}", *words],
            cwd=home, env=os.environ | {"PYTHONPATH": str(ROOT)}, encoding="utf-8",
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    @property
    def array(self) -> str:
        """Slurm's id of it; waits until there is one."""
        file = self.folder / ".submitit" / "array"
        until(lambda: file.exists() or self.process.poll() is not None)
        return file.read_text(encoding="utf-8")

    def run(self, key: str, value: object) -> Path:
        """The folder of the run with this setting (long names of folders end in a digest); waits until there is one."""

        def found() -> list[Path]:
            configs = {path.parent: OmegaConf.load(path) for path in self.folder.glob("*/config.yaml")}
            return [folder for folder, config in configs.items() if OmegaConf.select(config, key) == value]

        until(lambda: found() or self.process.poll() is not None)
        (folder,) = found()
        return folder

    def end(self) -> tuple[int, str]:
        """Exit code, and all that was printed."""
        printed, _ = self.process.communicate(timeout=400)
        return self.process.returncode, printed


def until(condition: object, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.02)


def is_pending(number: signal.Signals, process: int) -> bool:
    """Whether a process that hangs will find this signal when it goes on."""
    status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    (mask,) = (line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_one_array_of_jobs_with_several_ranks(slurm: Cluster, corpus: Path, straight: Curve, tmp_path: Path) -> None:
    """2 x 2 ranks, one run at a time; the run of the settings has the curve of one process."""
    limits = ["hydra.launcher.nodes=2", "hydra.launcher.tasks_per_node=2", "hydra.launcher.array_parallelism=1"]
    sweep = Sweep(tmp_path, corpus, "schedule.peak=1e-2,2e-2", "parallel.tensor=2", "tracker=wandb", *limits)
    until(lambda: len(call("squeue", "--noheader", "--array", "--jobs", sweep.array).splitlines()) == 2)
    assert "ArrayTaskThrottle=1" in call("scontrol", "show", "job", sweep.array)
    most = 0
    while sweep.process.poll() is None:
        running = call("squeue", "--noheader", "--states=running", "--format=%i %D %C", "--user", "root").splitlines()
        most = max(most, len(running))
        time.sleep(0.2)
    code, printed = sweep.end()
    assert code == 0, printed
    assert f"Slurm job {sweep.array}: 2 runs, 4 ranks each, at most 1 at a time" in printed
    assert most == 1
    one, two = (sweep.run("schedule.peak", peak) for peak in (1e-2, 2e-2))
    same_curve(curve(one), straight)
    assert len(curve(two)) == STEPS
    for folder in (one, two):
        assert OmegaConf.load(folder / "config.yaml").tracker.group == "lab"
        assert list((folder / "wandb").glob("offline-run-*"))
    logs = sorted(path.name for path in (sweep.folder / ".submitit").glob("*_log.out"))
    assert logs == [f"{sweep.array}_{run}_{rank}_log.out" for run in range(2) for rank in range(4)]


def test_a_failing_run_and_an_interrupted_one(slurm: Cluster, corpus: Path, straight: Curve, tmp_path: Path) -> None:
    """One run has no finite loss and fails; another is signaled, saves, is queued again, and goes on."""
    words = ["schedule.peak=1e-2,1e30", "run.guard.max_in_a_row=1", "hydra.launcher.tasks_per_node=2"]
    sweep = Sweep(tmp_path, corpus, *words)
    array, run = sweep.array, sweep.run("schedule.peak", 1e-2)
    with stopped_after(2, run, show(f"{array}_0")["JobId"]) as ranks:
        call("scancel", "--signal=USR1", f"{array}_0")
        until(lambda: all(is_pending(signal.SIGUSR1, process) for process in ranks))
        own = [Path(f"/proc/{process}/environ").read_bytes().split(b"\0") for process in ranks]
        assert all(f"PYTHONPATH={run.parent}/submitted/".encode() in b"\n".join(each) for each in own)
        again = subprocess.run(
            sweep.process.args,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            capture_output=True,
            encoding="utf-8",
        )
    code, printed = sweep.end()
    assert code == 3
    assert "1 of 2 runs failed, and the same command tries them again: " in printed
    assert (
        "schedule.peak=1e+30" in printed and f"(exit code 3, {sweep.folder}/.submitit/{array}_1_0_log.out)" in printed
    )
    same_curve(curve(run), straight)
    log = (sweep.folder / ".submitit" / f"{array}_0_0_log.out").read_text(encoding="utf-8")
    assert "Interrupted after step" in log and "resumed after step" in log
    assert again.returncode == 2 and f"Slurm job {array} is at this sweep already" in again.stderr


def test_a_sweep_that_is_ended_from_outside(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    """Without accounting, Slurm soon has no record of a job that was canceled; the command ends all the same."""
    sweep = Sweep(tmp_path, corpus, "vit=nano,micro", "run.steps=1000")
    until(lambda: list(sweep.folder.glob("*/metrics.jsonl")))
    call("scancel", sweep.array)
    code, printed = sweep.end()
    assert code == 1 and "2 of 2 runs failed" in printed and printed.count("ended from outside") == 2


def test_what_slurm_refuses_is_one_sentence(slurm: Cluster, corpus: Path, tmp_path: Path) -> None:
    code, printed = Sweep(tmp_path, corpus, "vit=nano,micro", "hydra.launcher.partition=nowhere").end()
    assert code == 2
    *by_sbatch, last = printed.splitlines()  # submitit prints the output of sbatch itself
    assert last.startswith("Configuration: Slurm refused the sweep (") and "invalid partition" in last
    assert all(line.startswith("sbatch: ") for line in by_sbatch)
