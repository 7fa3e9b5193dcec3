"""Sweeps: a failed run is reported and stops no other; a Slurm array is checked before it is submitted."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from common.errors import ConfigurationError, Interrupted, RunStopped
from train.entry import CONF, entry
from train.sweep import FailedRuns, Sweep

Sweeping = Callable[..., tuple[int, str, list[int]]]


@pytest.fixture
def sweeping(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sweeping:
    """Sweep run.steps over 1, 2, 3, where run 2 raises; return (exit code, stderr, the runs that ended well)."""

    def sweep(error: BaseException | None, *arguments: str) -> tuple[int, str, list[int]]:
        ended: list[int] = []

        def main(composed: DictConfig) -> None:
            if composed.run.steps == 2 and error is not None:
                raise error
            ended.append(composed.run.steps)

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["program", "-m", "run.steps=1,2,3", *arguments])
        code = 0
        try:
            entry("pretrain", main)
        except SystemExit as end:
            code = int(end.code or 0)
        return code, capsys.readouterr().err, ended

    return sweep


def test_a_task_names_the_values_of_its_sweep(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By default the paper's search space; the command line replaces a list, and does not sweep the list itself."""

    def tried(*words: str) -> list[tuple[float, int]]:
        found: list[tuple[float, int]] = []

        def main(composed: DictConfig) -> None:
            found.append((composed.schedule.peak, composed.data.global_batch_size))

        monkeypatch.setattr(sys, "argv", ["program", "-m", "sweep=task", "task=okvqa", *words])
        entry("finetune", main)
        return found

    monkeypatch.chdir(tmp_path)
    assert tried() == [(rate, size) for rate in (1e-5, 3e-5, 1e-4) for size in (128, 256, 512)]
    assert tried("task.recipe.learning_rate=1e-3,1e-2", "task.recipe.batch_size=4") == [(1e-3, 4), (1e-2, 4)]
    with pytest.raises(SystemExit) as end:
        tried("task.recipe.sweep.learning_rate=1e-3,1e-2")
    assert end.value.code == 2 and "write task.recipe.learning_rate=1e-3,1e-2, which" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "reported"),
    [
        (ConfigurationError("This cannot be."), 2, "Configuration: This cannot be."),
        (RunStopped("The loss is lost."), 3, "The loss is lost."),
        (ZeroDivisionError("a bug"), 1, "ZeroDivisionError: a bug"),
    ],
)
def test_one_failure_costs_no_other_run(error: Exception, code: int, reported: str, sweeping: Sweeping) -> None:
    found, printed, ended = sweeping(error)
    assert (found, ended) == (code, [1, 3])
    assert reported in printed
    summary = f"1 of 3 runs failed, and the same command tries them again: run.steps=2 (exit code {code})."
    assert printed.splitlines()[-1] == summary
    assert ("Traceback" in printed) == (code == 1)


@pytest.mark.parametrize(
    ("words", "runs"), [(["run.name=x,y", "run.folder=one"], 3), (["run.name=x,y"], 6), (["run.seed=1,1"], 3)]
)
def test_two_runs_never_share_a_folder(words: list[str], runs: int, sweeping: Sweeping) -> None:
    code, printed, ended = sweeping(None, *words)
    assert len(ended) == runs
    assert code == (2 if runs == 3 else 0) and ("is the folder of two runs of this sweep" in printed) == (runs == 3)


def test_a_run_returns_its_exit_code() -> None:
    sweep = Sweep()
    assert sweep.run("well", lambda: None) == 0
    sweep.check()
    assert [sweep.run(name, lambda code=code: sys.exit(code)) for name, code in (("a", 3), ("b", 2))] == [3, 2]  # type: ignore[misc]
    with pytest.raises(FailedRuns, match=r"^2 of 3 runs failed, .*: a \(exit code 3\); b \(exit code 2\)\.$") as failed:
        sweep.check()
    assert failed.value.code == 3


def test_a_signal_ends_the_whole_sweep(sweeping: Sweeping) -> None:
    assert sweeping(Interrupted("Saved.")) == (75, "Saved.\n", [1])


@pytest.mark.parametrize(
    "error",
    [
        RunStopped("My shard is gone.", alone=True),
        ZeroDivisionError("a bug"),
        OSError(28, "No space left on device", "x"),
        MemoryError(),
    ],
)
def test_what_one_rank_alone_has_ends_the_sweep(
    error: Exception, sweeping: Sweeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other ranks wait in a collective of the run that failed here."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    code, printed, ended = sweeping(error)
    assert (code, ended) == (1 if isinstance(error, ZeroDivisionError) else 3, [1])
    assert (str(error.args[-1]) if error.args else "Out of memory") in printed


def test_what_all_ranks_know_does_not(sweeping: Sweeping, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    code, _, ended = sweeping(RunStopped("The loss is lost."))
    assert (code, ended) == (3, [1, 3])


@pytest.mark.parametrize("wrong", ["run.stepz=3", "vit=mimi", "run.seed=0,many"])
def test_a_wrong_key_stops_the_sweep_before_its_first_run(wrong: str, sweeping: Sweeping) -> None:
    code, printed, ended = sweeping(None, wrong)
    assert (code, ended) == (2, [])
    assert printed.startswith("Configuration: ") and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "group"), [((), "pretrain"), (("run.name=joint",), "joint"), (("tracker.group=mine",), "mine")]
)
def test_the_runs_of_a_sweep_share_a_group(
    arguments: tuple[str, ...], group: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    groups = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program", "-m", "run.steps=1,2", *arguments])
    entry("pretrain", lambda composed: groups.append(composed.tracker.group))
    assert groups == [group, group]


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return a file that exists once sbatch was called; a refused sweep must not call it."""
    pytest.importorskip("submitit")
    trace, sbatch = tmp_path / "submitted", tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/sh\ntouch {trace}\nexit 1\n", encoding="utf-8")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    return trace


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("hydra.launcher.nodes=0",), "hydra.launcher.nodes=0 must be at least 1."),
        (("hydra.launcher.array_parallelism=0",), "hydra.launcher.array_parallelism=0 must be at least 1."),
        (("hydra.launcher.partitoin=x",), "partitoin"),
        (("run.name=x,y", "run.folder=one", "data.root=x"), "is the folder of two runs of this sweep"),
        (("parallel.tensor=1,3", "hydra.launcher.tasks_per_node=2"), "tasks_per_node): "),
    ],
)
def test_a_slurm_array_is_checked_before_it_is_submitted(
    arguments: tuple[str, ...], sentence: str, submitted: Path, sweeping: Sweeping, tokenizer_path: Path
) -> None:
    code, printed, _ = sweeping(None, "hydra/launcher=slurm", f"data.tokenizer={tokenizer_path}", *arguments)
    assert code == 2
    assert printed.startswith("Configuration: ") and sentence in printed and printed.count("\n") == 1
    assert not submitted.exists()


def command(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {folder}/calls\n{body}\n', encoding="utf-8")
    (folder / name).chmod(0o755)


def test_a_sweep_runs_the_code_of_its_submission_by_the_rule_of_all_jobs(
    submitted: Path, sweeping: Sweeping, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = submitted.parent / "bin"
    command(place, "sbatch", f'cp "${{@: -1}}" {tmp_path}/job.sh; echo "Submitted batch job 77"')
    command(place, "squeue", "exit 0")
    words = ["hydra/launcher=slurm", "cluster@hydra.launcher.cluster=gres", "experiment=equivalence", "data.root=data",
             "+hydra.launcher.cluster.environment.WANDB_API_KEY=secret", f"data.tokenizer={tokenizer_path}",
             "hydra.launcher.tasks_per_node=1", "hydra.launcher.cluster.setup=[set -e]"]  # fmt: skip
    code, printed, _ = sweeping(None, *words)
    assert code == 2 and "no train shards at data/" in printed and not (tmp_path / "job.sh").exists()

    for source in ("webli", "cc3m_35l", "vq2a", "objects", "text"):
        (tmp_path / "data" / source).mkdir(parents=True)
        (tmp_path / "data" / source / "train-00000.tar").touch()
    code, printed, _ = sweeping(None, *words)
    assert code == 1 and printed.count("ended from outside") == 3, printed
    folder = tmp_path / "runs" / "equivalence"
    (snapshot,) = (folder / "submitted").iterdir()
    assert (snapshot / "code" / "train" / "pretrain.py").exists()
    text = (tmp_path / "job.sh").read_text(encoding="utf-8")
    assert "--gres=gpu:a100:4" in text and "--qos=long" in text and "gpus-per-node" not in text
    assert "secret" not in text and "secret" in (snapshot / "site.sh").read_text(encoding="utf-8")
    assert " -P -u -m submitit.core._submit " in text
    for private in (*(folder / ".submitit").glob("*.sh"), *(folder / ".submitit").glob("*.pkl"), snapshot / "site.sh"):
        assert private.stat().st_mode & 0o077 == 0, private

    from submitit.core.utils import DelayedSubmission

    launcher = DelayedSubmission.load(folder / ".submitit" / "77_0_submitted.pkl").function
    monkeypatch.setattr("train.entry.CONF", snapshot / "code" / "conf")  # as the job finds it
    launcher._use_own_configuration()
    searched = str(launcher.hydra_context.config_loader.get_search_path())
    assert str(snapshot / "code" / "conf") in searched and str(CONF) not in searched

    command(place, "scontrol", "exit 0")
    for srun, ended, again in (
        ("exit 0", 0, False), ("exit 3", 3, False), ("exit 75", 0, True), ("rm $PALI_NOTE; exit 4", 3, False),
        (f'[ "$PYTHONPATH" = {snapshot}/code ] && [ "$WANDB_API_KEY" = secret ] && exit 2', 2, False),
    ):  # fmt: skip
        command(place, "srun", srun)
        (place / "calls").write_text("", encoding="utf-8")
        monkeypatch.setenv("SLURM_JOB_ID", "78")
        done = subprocess.run(["bash", tmp_path / "job.sh"], cwd=tmp_path, capture_output=True, encoding="utf-8")
        assert done.returncode == ended, (srun, done)
        assert ("scontrol requeue 78" in (place / "calls").read_text(encoding="utf-8")) == again
        left = (folder / ".submitit" / "78_0.exit").read_text(encoding="utf-8").strip()
        assert left == ("75" if again else str(ended))


def test_without_slurm(sweeping: Sweeping, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", str(tmp_path))
    code, printed, _ = sweeping(None, "hydra/launcher=slurm")
    assert code == 2 and "hydra/launcher=slurm finds no sbatch here" in printed


WITHOUT_THE_EXTRA = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("submitit", "hydra_plugins.hydra_submitit_launcher")):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
from train.entry import entry
entry("pretrain", lambda composed: print("trained"))
"""


@pytest.mark.parametrize(
    ("words", "code", "printed"),
    [
        (["hydra.run.dir=."], 0, ""),
        (["-m", "hydra/launcher=slurm", "run.steps=1,2"], 2,
         "Configuration: hydra/launcher=slurm needs the extra `slurm`: pip install '.[slurm]'.\n"),
    ],
)  # fmt: skip
def test_without_the_extra(words: list[str], code: int, printed: str, tmp_path: Path) -> None:
    """Hydra finds the launcher by itself; where submitit is missing, nothing is printed until it is requested."""
    command = [sys.executable, "-c", WITHOUT_THE_EXTRA, *words]
    environment = os.environ | {"PYTHONPATH": str(CONF.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr, done.stdout) == (code, printed, "" if code else "trained\n")


def test_the_site_gives_what_the_launcher_does_not_state() -> None:
    pytest.importorskip("submitit")
    from hydra_plugins.slurm_array import with_site
    from slurm.cluster import ClusterConfig

    site = ClusterConfig(
        partition="gpu", account="lab", time="2-00", signal_lead_s=600, gpus_per_node=4, cpus_per_task=8, memory="0",
        setup=["module load cuda"], environment={"NCCL_DEBUG": "two words"}, sbatch=["--exclusive", "--qos=long"],
        srun=["--cpu-bind=cores"],
    )  # fmt: skip
    null = dict.fromkeys(
        ("partition", "account", "tasks_per_node", "gpus_per_node", "cpus_per_task", "signal_delay_s", "timeout_min",
         "mem_gb")
    )  # fmt: skip
    printed = {"setup": ["own line"], "srun_args": ["--wait=300"], "additional_parameters": {"qos": "short"}}
    filled = with_site(null | printed, site)
    assert filled == {
        "partition": "gpu", "account": "lab", "tasks_per_node": 4, "gpus_per_node": 4, "cpus_per_task": 8,
        "signal_delay_s": 600, "timeout_min": None, "mem_gb": None,
        "setup": ["export NCCL_DEBUG='two words'", "module load cuda", "own line"],
        "srun_args": ["--cpu-bind=cores", "--wait=300"],
        "additional_parameters": {"time": "2-00", "mem": "0", "exclusive": True, "qos": "short"},
    }  # fmt: skip
    own = with_site(null | printed | {"partition": "cpu", "tasks_per_node": 2, "timeout_min": 30, "mem_gb": 4}, site)
    assert (own["partition"], own["tasks_per_node"]) == ("cpu", 2)
    assert own["additional_parameters"].keys() == {"exclusive", "qos"}
