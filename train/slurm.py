"""Jobs in Slurm's hands: the sbatch command of one, its submission, its state and its log. No shell is involved."""

import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from errors import ConfigurationError
from train.cluster import SubmitConfig

FORGOTTEN = "FORGOTTEN"  # by Slurm, some minutes after the job's end
SETTLED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL",
           "DEADLINE", FORGOTTEN)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One job, checked: its script is `slurm/<kind>.sbatch`, its arguments `words`; it makes or scores `makes`.

    `usable`: numbers of nodes that it can run on, most first, each with `tasks` ranks. `config`: the resolved
    configuration, as YAML.
    """

    kind: str
    words: tuple[str, ...]
    makes: Path
    usable: tuple[int, ...]
    tasks: int
    site: SubmitConfig
    config: str

    @property
    def title(self) -> str:
        """What it is and how large, e.g. "pretrain runs/x: 2 to 4 nodes x 8 ranks"."""
        least, most = self.usable[-1], self.usable[0]
        nodes = f"{most} node{'s' if most > 1 else ''}" if least == most else f"{least} to {most} nodes"
        return f"{self.kind} {self.makes}: {nodes} x {self.tasks} rank{'s' if self.tasks > 1 else ''}"

    @property
    def folder(self) -> Path:
        """Where snapshot and log lie: a run's own folder; a corpus' folder is renamed into place as a whole."""
        return self.makes.with_name(f"{self.makes.name}.job") if self.kind == "corpus" else self.makes

    def log(self, number: str) -> Path:
        return self.folder / f"slurm-{self.kind}-{number}.log"


def site_script(job: Job) -> str:
    """What the job's script sources: the site's set-up, the interpreter, and the nodes it may take."""
    cluster = job.site.cluster
    lines = ['export PYTHONPATH="$(dirname "${BASH_SOURCE[0]}")/code"']
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    lines += cluster.setup
    lines += [
        f"python=({shlex.join([*cluster.container, cluster.python or sys.executable, '-P'])})",
        f"srun=({shlex.join(['srun', *cluster.srun])})",
        f"mpi={shlex.quote(cluster.mpi)}",
        f"tasks={job.tasks} cpus={1 if job.kind == 'corpus' else cluster.cpus_per_task}",
        f"usable=({' '.join(map(str, job.usable))})",
    ]
    return "\n".join(lines) + "\n"


def sbatch_command(job: Job, snapshot: Path, after: str | None) -> list[str]:
    """The words of the sbatch command; `after`: the id of the job that must have succeeded."""
    cluster, least, most = job.site.cluster, job.usable[-1], job.usable[0]
    options: dict[str, object] = {
        "job-name": f"{job.kind}-{job.makes.name}",
        "partition": cluster.partition,
        "account": cluster.account,
        "time": cluster.time,
        "nodes": most if least == most else f"{least}-{most}",
        # A node is asked for as one task with all cores: given a number of tasks, Slurm takes no more nodes of a range
        # than these need.
        "cpus-per-task": job.tasks if job.kind == "corpus" else job.tasks * cluster.cpus_per_task,
        "gpus-per-node": min(cluster.gpus_per_node, job.tasks) if job.kind != "corpus" else None,
        "mem": cluster.memory,
        "signal": f"USR1@{cluster.signal_lead_s}" if job.kind == "pretrain" else None,
        "output": str(job.log("")).replace("%", "%%").removesuffix(".log") + "%j.log",
        "dependency": f"afterok:{after}" if after else None,
        "kill-on-invalid-dep": "yes" if after else None,
    }
    given = [f"--{name}={value}" for name, value in options.items() if value]
    script = snapshot / "code" / "slurm" / f"{job.kind}.sbatch"
    return ["sbatch", "--parsable", *given, *cluster.sbatch, str(script), *job.words]


def submit(command: list[str], snapshot: Path) -> str:
    """Hand a job to Slurm; returns its id. Raises ConfigurationError with what sbatch says."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_")) or k == "SLURM_CONF"}
    try:
        done = subprocess.run(
            command,
            env=environment | {"PALI_SITE": str((snapshot / "site.sh").absolute())},
            capture_output=True,
            encoding="utf-8",
            errors="replace",
        )
    except FileNotFoundError:
        raise ConfigurationError("There is no sbatch here; submit from a login node, or use --dry-run.") from None
    if done.returncode:
        raise ConfigurationError(f"Slurm refuses the job: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]


def state(number: str) -> str:
    """A job's state as Slurm names it, or FORGOTTEN; UNREACHABLE while Slurm does not answer."""
    done = subprocess.run(
        ["scontrol", "--oneliner", "show", "job", number], capture_output=True, encoding="utf-8", errors="replace"
    )
    found = re.search(r"JobState=(\w+)", done.stdout)
    if found:
        return found[1]
    return FORGOTTEN if "Invalid job id" in done.stderr else "UNREACHABLE"


def follow(number: str, log: Path, every_s: float = 2.0) -> str:
    """Print what comes into the log until the job has ended, over all its restarts; returns its last state."""
    read = 0
    while True:
        now = state(number)
        if log.exists():
            with log.open(errors="replace", encoding="utf-8") as opened:
                opened.seek(read)
                print(opened.read(), end="", flush=True)
                read = opened.tell()
        if now in SETTLED:
            return now
        time.sleep(every_s)
