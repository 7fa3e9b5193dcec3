"""Submit a job to Slurm, and read its state and its log. No shell is involved."""

import os
import re
import shlex
import subprocess
import sys
import time
from codecs import getincrementaldecoder
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import ConfigurationError, Interrupted
from common.launcher import PAUSES_S, is_of_controller
from slurm.cluster import ClusterConfig, SubmitConfig

TRAINING = (
    "pretrain_vit",
    "pretrain",
    "finetune",
)  # kinds of jobs that save at a signal; pretrain.sbatch is the script of all
FORGOTTEN = "FORGOTTEN"  # Slurm drops a job some minutes after its end
SETTLED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL",
           "DEADLINE", FORGOTTEN)  # fmt: skip


PYTHONPATH = 'export PYTHONPATH="${BASH_SOURCE[0]%/*}/code"'  # in a script beside the snapshot's code
MOST_PAUSE_S = 60.0  # longest pause between two calls of Slurm's commands while waiting
NAMES_GPUS = re.compile(r"-G|--gpus|--gres\b.*\bgpu|--tres-per")  # options of sbatch that request GPUs
SECRET = re.compile(
    r"""(?ix)(\b\w*(?:key|token(?!iz)|secret|passw|credential|netrc)\w*=)(?:'[^']*'|"[^"]*"|[^\s'";)])+"""
)


@dataclass(frozen=True)
class Job:
    """Hold a checked job: its script is `slurm/<script>`, its arguments are `words`."""

    kind: str
    words: tuple[str, ...]
    makes: Path
    """The folder that the job makes, or the folder of the run that it scores."""
    usable: tuple[int, ...]
    """Numbers of nodes that it can run on, most first."""
    tasks: int
    """Ranks on each node."""
    site: SubmitConfig
    config: str
    """The resolved configuration, as YAML."""
    follows: bool = False
    """Whether it begins with the job before it, whose checkpoints it scores, and not after its end."""

    @property
    def title(self) -> str:
        """Kind, folder and size, e.g. "pretrain runs/x: 2 to 4 nodes x 8 ranks"."""
        least, most = self.usable[-1], self.usable[0]
        nodes = f"{most} node{'s' if most > 1 else ''}" if least == most else f"{least} to {most} nodes"
        return f"{self.kind} {self.makes}: {nodes} x {self.tasks} rank{'s' if self.tasks > 1 else ''}"

    @property
    def script(self) -> str:
        """Name of the script in `slurm/`."""
        return f"{'pretrain' if self.kind in TRAINING else self.kind}.sbatch"

    @property
    def folder(self) -> Path:
        """Folder of snapshot and log: the run's own; beside that of a corpus, which is renamed at its end."""
        return self.makes.with_name(f"{self.makes.name}.job") if self.kind == "corpus" else self.makes

    def log(self, number: str) -> Path:
        """Return the log of the job with this id."""
        return self.folder / f"slurm-{self.kind}-{number}.log"


def site_script(job: Job) -> str:
    """Return the file that the job's script sources: the site's set-up, the interpreter, the numbers of nodes."""
    cluster = job.site.cluster
    lines = [
        *set_up(cluster),
        f"python=({shlex.join([*cluster.container, cluster.python or sys.executable, '-P'])})",
        f"srun=({shlex.join(['srun', *cluster.srun])})",
        f"mpi={shlex.quote(cluster.mpi)}",
        f"tasks={job.tasks} cpus={1 if job.kind == 'corpus' else cluster.cpus_per_task}",
        f"usable=({' '.join(map(str, job.usable))})",
    ]
    return "\n".join(lines) + "\n"


def set_up(cluster: ClusterConfig) -> list[str]:
    """Return the first shell lines of a job: PYTHONPATH of the snapshot's code, and the site's own lines."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    return [PYTHONPATH, *exports, *cluster.setup]


def masked(text: str) -> str:
    """Return shell lines with `***` for the values of variables that are named like keys and passwords."""
    return SECRET.sub(r"\1***", text)


def sbatch_command(job: Job, snapshot: Path, after: str | None) -> list[str]:
    """Return the words of the sbatch command; `after`: the id of a job that must succeed first."""
    cluster, least, most = job.site.cluster, job.usable[-1], job.usable[0]
    options: dict[str, object] = {
        "job-name": f"{job.kind}-{job.makes.name}",
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "reservation": cluster.reservation,
        "constraint": cluster.constraint,
        "nodelist": cluster.nodelist,
        "exclude": cluster.exclude,
        "time": cluster.time,
        "nodes": most if least == most else f"{least}-{most}",
        # One task with all cores for each node: given a number of tasks, Slurm would allocate only as
        # many nodes of a range as these tasks fill.
        "cpus-per-task": job.tasks if job.kind == "corpus" else job.tasks * cluster.cpus_per_task,
        **(gpu_option(cluster, min(cluster.gpus_per_node, job.tasks)) if job.kind != "corpus" else {}),
        "mem": cluster.memory,
        "signal": f"USR1@{cluster.signal_lead_s}" if job.kind in TRAINING else None,
        "output": str(job.log("")).replace("%", "%%").removesuffix(".log") + "%j.log",
        "dependency": f"{'after' if job.follows else 'afterok'}:{after}" if after else None,
        "kill-on-invalid-dep": "yes" if after else None,
    }
    given = [f"--{name}={value}" for name, value in options.items() if value]
    script = snapshot / "code" / "slurm" / job.script
    # Also as a word, because some sites start jobs without the environment of the submission.
    site = f"--site={(snapshot / 'site.sh').absolute()}"
    command = [f"--command={job.kind}"] if job.kind in TRAINING and job.kind != "pretrain" else []
    return ["sbatch", "--parsable", *given, *cluster.sbatch, str(script), site, *command, *job.words]


def gpu_option(cluster: ClusterConfig, gpus: int) -> dict[str, object]:
    """Return sbatch's option for so many GPUs a node; none where the site's own options request them."""
    if not gpus or cluster.gres == "none" or any(NAMES_GPUS.match(option) for option in cluster.sbatch):
        return {}
    return {"gres": f"{cluster.gres}:{gpus}"} if cluster.gres else {"gpus-per-node": gpus}


def submit(command: list[str], snapshot: Path) -> str:
    """Submit a job to Slurm; return its id.

    Raises ConfigurationError with sbatch's message, and Interrupted where Slurm does not answer for two minutes.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_")) or k == "SLURM_CONF"}
    environment["PALI_SITE"] = str((snapshot / "site.sh").absolute())
    for pause in (*PAUSES_S, None):
        try:
            done = call(command, environment)
        except FileNotFoundError:
            raise ConfigurationError("There is no sbatch here; submit from a login node, or use --dry-run.") from None
        if not done.returncode:
            return done.stdout.strip().split(";")[0]
        message = " ".join(done.stderr.split())
        if not is_of_controller(message):
            raise ConfigurationError(f"Slurm refuses the job: {message}")
        if pause is None:
            break
        time.sleep(pause)
        if accepted := accepted_in_silence(str(snapshot)):
            return accepted
    raise Interrupted(f"Slurm does not answer ({message}); submit again when it does.")


def accepted_in_silence(snapshot: str) -> str | None:
    """Return the newest job of this snapshot: Slurm may accept a job although its answer comes too late."""
    with suppress(FileNotFoundError):
        done = call(["squeue", "--noheader", "--format=%A %o", "--user", str(os.getuid())])
        numbers = [line.split()[0] for line in done.stdout.splitlines() if f"{snapshot}/" in line]
        return max(numbers, key=int, default=None)
    return None


def call(command: Sequence[str], environment: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Run one of Slurm's commands; return its exit code and output."""
    return subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", errors="replace")


def state(number: str) -> str:
    """Return a job's state as Slurm names it, or FORGOTTEN; UNREACHABLE while Slurm does not answer."""
    done = call(["scontrol", "--oneliner", "show", "job", number])
    found = re.search(r"JobState=(\w+)", done.stdout)
    if found:
        return found[1]
    return _accounted(number) if "Invalid job id" in done.stderr else "UNREACHABLE"


def _accounted(number: str) -> str:
    """Return the last state of a job in Slurm's accounts, where the site keeps them."""
    with suppress(FileNotFoundError):
        done = call(["sacct", "--noheader", "--parsable2", "--allocations", "--format=State", "--jobs", number])
        states = done.stdout.split()
        if done.returncode == 0 and states and states[-1] in SETTLED:
            return states[-1]
    return FORGOTTEN


def follow(number: str, log: Path, every_s: float = 2.0) -> str:
    """Print the log until the job has ended, over all its restarts; return its last state.

    The state is read every `every_s` seconds at first, then less often, to spare the controller of a large site.
    """
    read, decoder, pause = 0, getincrementaldecoder("utf-8")("replace"), every_s
    while True:
        now = state(number)
        if log.exists():
            with log.open("rb") as opened:
                opened.seek(read)
                print(decoder.decode(opened.read()), end="", flush=True)
                read = opened.tell()
        if now in SETTLED:
            return now
        time.sleep(pause)
        pause = slower(pause)


def slower(pause: float) -> float:
    """Return the seconds of the next pause after one of `pause` seconds."""
    return max(pause, min(MOST_PAUSE_S, pause * 1.25))
