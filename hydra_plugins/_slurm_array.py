"""A sweep as one Slurm array of multi-rank jobs: `python -m train.pretrain -m hydra/launcher=slurm vit=base,large …`.

Hydra takes launchers from the namespace `hydra_plugins` alone, hence this file's place; the underscore hides it from
Hydra's scanner, which would warn at every start where submitit is not installed. `train/entry.py` registers it.

Three things differ from hydra-submitit-launcher 1.2.0 with submitit 1.5.4:
1. Signals are the run's own (`train/interrupt.py`): submitit requeues at once, before anything is saved. A run that was
   interrupted and saved exits with 75, and the job's script has Slurm queue it again.
2. A run that fails ends its job with the run's exit code; Hydra would turn it into a value, and the job into a success.
3. The end of a job is learnt from squeue: submitit asks sacct, and without accounting waits for ever for a killed job.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf, SlurmQueueConf
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
from omegaconf import DictConfig, OmegaConf, open_dict

from errors import ConfigurationError
from files import write_text
from train import entry
from train.checks import check
from train.cluster import ClusterConfig
from train.config import to_run_config
from train.sweep import FailedRuns, become_one_of
from values import typed

SIGNAL = "USR1"  # at `signal_delay_s` before the time limit
EARLY = (signal.SIGUSR1, signal.SIGTERM)
RUNNING = "array"  # file: the id of the sweep's newest job


@dataclass
class SlurmArrayConf(SlurmQueueConf):
    """`submitit_slurm`, and the site (conf/cluster), which gives what is null here.

    `wait` for the runs to end, asking squeue every `poll_s` seconds; `srun_args` are further options of srun.
    """

    _target_: str = "hydra_plugins._slurm_array.SlurmArrayLauncher"
    submitit_folder: str = "${hydra.sweep.dir}/.submitit"
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tasks_per_node: int | None = None  # type: ignore[assignment]
    timeout_min: int | None = None  # type: ignore[assignment]
    signal_delay_s: int | None = None  # type: ignore[assignment]
    wait: bool = True
    poll_s: float = 10.0
    srun_args: list[str] = field(default_factory=list)


class SlurmArrayLauncher(SlurmLauncher):
    """Checks every run, submits them as one array, waits, and tells which failed."""

    def __init__(self, cluster: DictConfig, wait: bool, poll_s: float, **params: Any) -> None:
        super().__init__(**params)
        self.wait, self.poll_s = wait, poll_s
        site = typed(ClusterConfig, OmegaConf.to_container(cluster), "cluster")
        self.params: dict[str, Any] = with_site(vars(self)["params"], site)
        self.python = [*site.container, site.python or sys.executable]

    def __call__(self, *arguments: Any) -> JobReturn:
        """One task of a job: one rank of one run. Ends the process if the run fails or is interrupted."""
        entry.register()
        for number in EARLY:
            signal.signal(number, _leave)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        done = super().__call__(*arguments)
        if done.return_value:
            sys.exit(done.return_value)
        return JobReturn(overrides=done.overrides)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Raises ConfigurationError before anything is submitted, FailedRuns when all have ended and some failed."""
        names = self._check(job_overrides)
        folder = Path(self.params["submitit_folder"]).absolute()
        self._check_not_running(folder)
        jobs = self._submit(folder, job_overrides, initial_job_idx)
        array = _array_of(jobs[0])
        write_text(folder / RUNNING, array)
        print(
            f"Slurm job {array}: {len(jobs)} runs, {self._ranks} ranks each, at most "
            f"{self.params['array_parallelism']} at a time; their logs are in {folder}, `scancel {array}` ends them.",
            flush=True,
        )
        if self.wait:
            self._wait(array)
            self._report(folder, jobs, names)
        return []

    @property
    def _ranks(self) -> int:
        return int(self.params["nodes"] * self.params["tasks_per_node"])

    def _check(self, job_overrides: Sequence[Sequence[str]]) -> list[str]:
        """The runs' names, if all of them can work."""
        if shutil.which("sbatch") is None:
            raise ConfigurationError("hydra/launcher=slurm finds no sbatch here; leave it out to train run after run.")
        for key in ("nodes", "tasks_per_node", "array_parallelism", "timeout_min"):
            if self.params[key] is not None and self.params[key] < 1:
                raise ConfigurationError(f"hydra.launcher.{key}={self.params[key]} must be at least 1.")
        assert self.hydra_context is not None and self.config is not None
        names = []
        for overrides in job_overrides:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            name = composed.hydra.job.override_dirname
            become_one_of(composed, name)
            if composed.hydra.job.config_name == "pretrain":  # what an evaluation is told lies with its run
                with open_dict(composed):
                    del composed["hydra"]
                self._check_run(name, composed)
            names.append(name)
        return names

    def _check_run(self, name: str, composed: DictConfig) -> None:
        wrong = None
        try:
            check(to_run_config(composed), self._ranks)
        except ConfigurationError as error:
            wrong = error
        if wrong is not None:  # not inside the handler: of a chain of errors the first is the one that is told
            raise ConfigurationError(
                f"{name}, with {self._ranks} ranks (hydra.launcher.nodes x tasks_per_node): {wrong}"
            )

    def _check_not_running(self, folder: Path) -> None:
        """Two jobs may not write into the same runs."""
        earlier = folder / RUNNING
        if earlier.exists() and _queued(array := earlier.read_text(encoding="utf-8")):
            raise ConfigurationError(
                f"Slurm job {array} is at this sweep already; wait for it, end it with `scancel {array}`, or choose "
                "another run.name."
            )

    def _submit(self, folder: Path, job_overrides: Sequence[Sequence[str]], first: int) -> list[Any]:
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = SIGNAL  # read when submitit is imported, here and in the jobs
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        common = set(OmegaConf.structured(BaseQueueConf)) - {"submitit_folder"}
        own = {"submitit_folder", "max_num_timeout"}
        parameters = {
            k if k in common else f"slurm_{k}": v for k, v in self.params.items() if k not in own and v is not None
        }
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_python=shlex.join(self.python))
        before, after = _frame(folder)
        parameters["slurm_setup"] = [*before, *(self.params["setup"] or [])]
        executor.update_parameters(**parameters, slurm_teardown=after)
        numbers = range(first, first + len(job_overrides))
        try:
            return executor.map_array(
                self,
                [list(overrides) for overrides in job_overrides],
                ["hydra.sweep.dir" for _ in numbers],
                list(numbers),
                [f"job_id_for_{number}" for number in numbers],
                [Singleton.get_state() for _ in numbers],
            )
        except (FailedJobError, FailedSubmissionError) as error:
            raise ConfigurationError(f"Slurm refused the sweep ({' '.join(str(error).split())}).") from error

    def _wait(self, array: str) -> None:
        try:
            while _queued(array):
                time.sleep(self.poll_s)
        except KeyboardInterrupt:
            print(f"Slurm job {array} goes on; `scancel {array}` ends it.", file=sys.stderr)
            sys.exit(130)

    def _report(self, folder: Path, jobs: list[Any], names: list[str]) -> None:
        failed, first = {}, 0
        for index, (name, job) in enumerate(zip(names, jobs, strict=True)):
            ended = folder / f"{_array_of(job)}_{index}.exit"
            code = int(ended.read_text(encoding="utf-8")) if ended.exists() else None
            if code != 0:
                how = "ended from outside" if code is None else f"exit code {code}"
                failed[name] = f"{how}, {job.task(0).paths.stdout}"
                first = first or code or 1
        if failed:
            raise FailedRuns(failed, len(names), first)


def with_site(params: dict[str, Any], site: ClusterConfig) -> dict[str, Any]:
    """The launcher's settings, with the site's where they are null, and the site's own lines and options."""
    same = {
        "partition": site.partition,
        "account": site.account,
        "tasks_per_node": site.ranks_per_node,
        "gpus_per_node": site.gpus_per_node or None,
        "cpus_per_task": site.cpus_per_task,
        "signal_delay_s": site.signal_lead_s,
    }
    filled = params | {key: value for key, value in same.items() if params[key] is None}
    exports = [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    filled["setup"] = [*exports, *site.setup, *(params["setup"] or [])]
    filled["srun_args"] = [*site.srun, *params["srun_args"]]
    more: dict[str, Any] = {"time": site.time} if params["timeout_min"] is None else {}
    if site.memory is not None and params["mem_gb"] is None:
        more["mem"] = site.memory
    for option in site.sbatch:
        name, given, value = option.lstrip("-").partition("=")
        more[name] = value if given else True
    filled["additional_parameters"] = more | params["additional_parameters"]
    return filled


def _frame(folder: Path) -> tuple[list[str], list[str]]:
    """The lines of the job's script before and after srun: how the run ended is kept, and it may be queued again.

    Bash's status of srun is the highest exit code of its tasks. 0, 2 and 3: to start the run again would change
    nothing. All else goes on from the last checkpoint, as in slurm/pretrain.sbatch: a signal (75), a hang (4), a rank
    that was killed (from 128), one that lost its peers (1; soon and for the fourth time, it is something else).
    """
    file = f'{shlex.quote(str(folder))}/"${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}_${{SLURM_ARRAY_TASK_ID:-0}}.exit"'
    return [f"rm -f {file}"], [
        "code=$?",
        f'echo "$code" > {file}',
        'case "$code" in 0 | 2 | 3) exit "$code" ;; esac',
        '[ "$code" = 1 ] && [ "$SECONDS" -lt 120 ] && [ "${SLURM_RESTART_COUNT:-0}" -ge 3 ] && exit 1',
        'exec scontrol requeue "$SLURM_JOB_ID"',
    ]


def _leave(number: int, frame: FrameType | None) -> None:
    """While no step runs there is nothing to save."""
    sys.exit(entry.EXIT_INTERRUPTED)


def _array_of(job: Any) -> str:
    return str(job.job_id).split("_")[0]


def _queued(job: str) -> bool:
    """Whether any run of the array still waits or runs; a controller that does not answer is asked again later."""
    asked = subprocess.run(
        ["squeue", "--noheader", "--jobs", job], capture_output=True, encoding="utf-8", errors="replace"
    )
    return bool(asked.stdout.strip()) or (asked.returncode != 0 and "Invalid job id" not in asked.stderr)


ConfigStore.instance().store(group="hydra/launcher", name="slurm_array", node=SlurmArrayConf, provider="train")
Plugins.instance().register(SlurmArrayLauncher)
