"""Run a sweep as one Slurm array of jobs: `python -m train.pretrain -m hydra/launcher=slurm vit=base,large …`.

Hydra imports every module of the namespace `hydra_plugins` at its start, of all commands, and registers the launchers
in it. So this file imports `train` only inside its methods, and is empty of launchers without the extra `slurm`.

Four things differ from hydra-submitit-launcher 1.2.0 with submitit 1.5.4:
1. Signals are the run's own (`train/health/signals.py`): submitit requeues at once, before anything is saved. A run
   that was interrupted and saved exits with 75, and the job's script has Slurm queue it again.
2. A run that fails ends its job with the run's exit code; Hydra would turn it into a value, and the job into a success.
   slurm/job.sh then decides whether the job is queued again, as for jobs of train.submit.
3. Code and configuration are those of the submission, from a snapshot, also in a job that is queued again days later.
4. The end of a job is read from squeue: submitit calls sacct, and without accounting waits for ever for a killed job.
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

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn
from omegaconf import DictConfig, OmegaConf, open_dict

from common.errors import EXIT_INTERRUPTED, ConfigurationError, Interrupted
from common.files import write_text
from common.launcher import PAUSES_S, is_of_controller
from common.values import typed
from slurm.cluster import ClusterConfig
from slurm.code_snapshot import take
from slurm.job import PYTHONPATH, TRAINING, gpu_option, slower

try:
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf, SlurmQueueConf
    from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher
except ModuleNotFoundError:  # no extra `slurm`: an import error here would make Hydra warn at every start
    BaseQueueConf = SlurmQueueConf = SlurmLauncher = object

SIGNAL = "USR1"  # at `signal_delay_s` before the time limit
EARLY = (signal.SIGUSR1, signal.SIGTERM)
RUNNING = "array"  # file: the id of the sweep's newest job


@dataclass
class SlurmArrayConf(SlurmQueueConf):
    """Extend `submitit_slurm` by the site (conf/cluster), whose values replace null here.

    `wait`: until the runs end, reading squeue every `poll_s` seconds. `srun_args`: further options of srun.
    """

    _target_: str = "hydra_plugins.slurm_array.SlurmArrayLauncher"
    submitit_folder: str = "${hydra.sweep.dir}/.submitit"
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    tasks_per_node: int | None = None  # type: ignore[assignment]
    timeout_min: int | None = None  # type: ignore[assignment]
    signal_delay_s: int | None = None  # type: ignore[assignment]
    wait: bool = True
    poll_s: float = 10.0
    srun_args: list[str] = field(default_factory=list)


class SlurmArrayLauncher(SlurmLauncher):
    """Check every run, submit them as one array, wait, and report the runs that failed."""

    def __init__(self, cluster: DictConfig, wait: bool, poll_s: float, **params: Any) -> None:
        from train.entry import CONF

        super().__init__(**params)
        self.wait, self.poll_s = wait, poll_s
        site = typed(ClusterConfig, OmegaConf.to_container(cluster), "cluster")
        self.params: dict[str, Any] = with_site(vars(self)["params"], site)
        self.python = [*site.container, site.python or sys.executable, "-P"]  # -P: not what lies in the current folder
        self.conf = str(CONF)

    def __call__(self, *arguments: Any) -> JobReturn:
        """Run one rank of one run, as a task of a job; end the process if the run fails or is interrupted."""
        from train.entry import register

        Plugins.instance()  # fills Hydra's registry of configuration sources, which the loader below reads
        register()
        self._use_own_configuration()
        for number in EARLY:
            signal.signal(number, _leave)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        done = super().__call__(*arguments)
        if done.return_value:
            sys.exit(done.return_value)
        return JobReturn(overrides=done.overrides)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Submit the runs, and wait for them if `wait` is set.

        Raises ConfigurationError before anything is submitted, FailedRuns when all have ended and some failed.
        """
        names = self._check(job_overrides)
        folder = Path(self.params["submitit_folder"]).absolute()
        self._check_not_running(folder)
        jobs = self._submit(folder, self._snapshot(), job_overrides, initial_job_idx)
        array = _array_id(jobs[0])
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
        """Return the runs' names; raise ConfigurationError if one of them cannot work."""
        if shutil.which("sbatch") is None:
            raise ConfigurationError("hydra/launcher=slurm finds no sbatch here; leave it out to train run after run.")
        for key in ("nodes", "tasks_per_node", "array_parallelism", "timeout_min"):
            if self.params[key] is not None and self.params[key] < 1:
                raise ConfigurationError(f"hydra.launcher.{key}={self.params[key]} must be at least 1.")
        from train.sweep import check_own_folder, join_sweep

        assert self.hydra_context is not None and self.config is not None
        runs: list[DictConfig] = []
        folders: set[str] = set()
        for overrides in job_overrides:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            join_sweep(composed, composed.hydra.job.override_dirname)
            check_own_folder(composed.run.folder, folders)
            runs.append(composed)
        names = []
        for composed in runs:
            name = composed.hydra.job.override_dirname or composed.run.folder
            if composed.hydra.job.config_name in TRAINING:  # an evaluation reads its settings from its run's folder
                with open_dict(composed):
                    del composed["hydra"]
                self._check_run(name, composed)
            names.append(name)
        return names

    def _use_own_configuration(self) -> None:
        """Compose from the snapshot's `conf`, where the submission had the checkout's."""
        from train.entry import CONF

        assert self.hydra_context is not None
        search_path = self.hydra_context.config_loader.get_search_path()
        for element in search_path.get_path():
            if element.path.removeprefix("file://") == self.conf:
                element.path = str(CONF)
        self.hydra_context.config_loader = ConfigLoaderImpl(search_path)

    def _snapshot(self) -> Path:
        """Keep the code beside the runs, with what a job's script sources: only its owner reads a site's keys."""
        assert self.config is not None
        lines = [PYTHONPATH, *(self.params["setup"] or [])]
        return take(Path(self.config.hydra.sweep.dir), {"site.sh": "\n".join(lines) + "\n"}).absolute()

    def _check_run(self, name: str, composed: DictConfig) -> None:
        from train.checks import check, check_training_data
        from train.settings.compose import to_run_config

        wrong = None
        try:
            config = to_run_config(composed)
            check(config, self._ranks)
            check_training_data(config)
        except ConfigurationError as error:
            wrong = error
        if wrong is not None:  # outside `except`, or `__context__` would make entry.sentence report the inner error
            raise ConfigurationError(
                f"{name}, with {self._ranks} ranks (hydra.launcher.nodes x tasks_per_node): {wrong}"
            )

    def _check_not_running(self, folder: Path) -> None:
        """Raise ConfigurationError where another job of this sweep is queued: both would write to the same runs."""
        earlier = folder / RUNNING
        if earlier.exists() and _queued(array := earlier.read_text(encoding="utf-8")):
            raise ConfigurationError(
                f"Slurm job {array} is at this sweep already; wait for it, end it with `scancel {array}`, or choose "
                "another run.name."
            )

    def _submit(self, folder: Path, snapshot: Path, job_overrides: Sequence[Sequence[str]], first: int) -> list[Any]:
        os.environ["SUBMITIT_PREEMPT_SIGNAL"] = SIGNAL  # read when submitit is imported, here and in the jobs
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError

        common = set(OmegaConf.structured(BaseQueueConf)) - {"submitit_folder"}
        own = {"submitit_folder", "max_num_timeout", "setup"}
        parameters = {
            k if k in common else f"slurm_{k}": v for k, v in self.params.items() if k not in own and v is not None
        }
        executor = submitit.AutoExecutor(folder=folder, cluster="slurm", slurm_python=shlex.join(self.python))
        before, after = _frame(folder, snapshot)
        executor.update_parameters(**parameters, slurm_setup=before, slurm_teardown=after)
        numbers = range(first, first + len(job_overrides))
        for pause in (*PAUSES_S, None):
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
                message = " ".join(str(error).split())
                if not is_of_controller(message):
                    raise ConfigurationError(f"Slurm refused the sweep ({message}).") from error
                if pause is None or "timed out" in message:
                    raise Interrupted(
                        f"Slurm did not answer in time ({message}); look with `squeue --me` whether it took the sweep, "
                        "and submit it again if not."
                    ) from error
                time.sleep(pause)
            finally:
                for file in (
                    *folder.glob("*.pkl"),
                    *folder.glob("*.sh"),
                ):  # they may hold keys
                    file.chmod(0o600)
        raise AssertionError("the last pause is None")

    def _wait(self, array: str) -> None:
        pause = self.poll_s
        try:
            while _queued(array):
                time.sleep(pause)
                pause = slower(pause)
        except KeyboardInterrupt:
            print(f"Slurm job {array} goes on; `scancel {array}` ends it.", file=sys.stderr)
            sys.exit(130)

    def _report(self, folder: Path, jobs: list[Any], names: list[str]) -> None:
        from train.sweep import FailedRuns

        failed, first = {}, 0
        for index, (name, job) in enumerate(zip(names, jobs, strict=True)):
            ended = folder / f"{_array_id(job)}_{index}.exit"
            code = int(ended.read_text(encoding="utf-8")) if ended.exists() else None
            if code != 0:
                how = "ended from outside" if code is None else f"exit code {code}"
                failed[name] = f"{how}, {job.task(0).paths.stdout}"
                first = first or code or 1
        if failed:
            raise FailedRuns(failed, len(names), first)


def with_site(params: dict[str, Any], site: ClusterConfig) -> dict[str, Any]:
    """Return the launcher's settings, with the site's where they are null, and the site's own lines and options."""
    same = {
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "constraint": site.constraint,
        "exclude": site.exclude,
        "tasks_per_node": site.ranks_per_node,
        "gpus_per_node": site.gpus_per_node or None,
        "cpus_per_task": site.cpus_per_task,
        "signal_delay_s": site.signal_lead_s,
    }
    filled = params | {key: value for key, value in same.items() if value is not None and params.get(key) is None}
    if filled.get("gpus_per_node") and filled.get("gres") is None:
        asked = gpu_option(site, filled["gpus_per_node"])
        filled |= {"gpus_per_node": asked.get("gpus-per-node")} | ({"gres": asked["gres"]} if "gres" in asked else {})
    exports = [f"export {name}={shlex.quote(value)}" for name, value in site.environment.items()]
    filled["setup"] = [*exports, *site.setup, *(params["setup"] or [])]
    filled["srun_args"] = [*site.srun, *params["srun_args"]]
    more: dict[str, Any] = {"time": site.time} if params["timeout_min"] is None else {}
    more |= {name: value for name in ("reservation", "nodelist") if (value := getattr(site, name)) is not None}
    if site.memory is not None and params["mem_gb"] is None:
        more["mem"] = site.memory
    for option in site.sbatch:
        if not option.startswith("--"):
            raise ConfigurationError(
                f"cluster.sbatch: {option!r} cannot be an option of a sweep; write options long and in one word, as in "
                "--qos=long."
            )
        name, given, value = option.lstrip("-").partition("=")
        more[name] = value if given else True
    filled["additional_parameters"] = more | params["additional_parameters"]
    return filled


def _frame(folder: Path, snapshot: Path) -> tuple[list[str], list[str]]:
    """Return the lines of the job's script before and after srun; slurm/job.sh decides about restarts.

    The exit code of the run is written to a file, which the sweep's command reads.
    """
    own, shared = shlex.quote(str(folder)), shlex.quote(str(snapshot / "code" / "slurm" / "job.sh"))
    file = f'{own}/"${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}_${{SLURM_ARRAY_TASK_ID:-0}}.exit"'
    return [
        f"rm -f {file}",
        f"PALI_SITE={shlex.quote(str(snapshot / 'site.sh'))}",
        f'source {shared} || {{ echo "The snapshot "{shared}" is gone; submit the sweep again." >&2; exit 2; }}',
        f"expect_note {own}",
    ], [
        "judge $? && again=yes",
        f'echo "$code" > {file}',
        '[ -n "${again-}" ] || exit "$code"',
        "queue_again",
    ]


def _leave(number: int, frame: FrameType | None) -> None:
    """End the process at once: while no step runs there is nothing to save."""
    sys.exit(EXIT_INTERRUPTED)


def _array_id(job: Any) -> str:
    return str(job.job_id).split("_")[0]


def _queued(job: str) -> bool:
    """Return whether any run of the array waits or runs; true while the controller does not answer."""
    asked = subprocess.run(
        ["squeue", "--noheader", "--jobs", job], capture_output=True, encoding="utf-8", errors="replace"
    )
    return bool(asked.stdout.strip()) or (asked.returncode != 0 and "Invalid job id" not in asked.stderr)


if SlurmLauncher is not object:  # else `hydra/launcher=slurm` is answered with the extra to install (train/entry.py)
    ConfigStore.instance().store(group="hydra/launcher", name="slurm_array", node=SlurmArrayConf, provider="train")
