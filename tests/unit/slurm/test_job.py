"""The calls of Slurm's commands: their words, their retries, and answers that are lost."""

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from common.errors import ConfigurationError, Interrupted
from slurm import job as slurm
from slurm.cluster import ClusterConfig, SubmitConfig, SubmitSettings
from slurm.job import Job, follow, gpu_option, masked, sbatch_command, site_script
from train.entry import CONF, register
from train.submit import composed, submit

Stub = Callable[[str, str], Path]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Put a stub of a Slurm command into PATH; return the file with a line for each call."""
    place, log = tmp_path / "bin", tmp_path / "calls"
    place.mkdir()
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(log))

    def put(name: str, body: str) -> Path:
        (place / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{body}\n', encoding="utf-8")
        (place / name).chmod(0o755)
        return log

    return put


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace `sleep` and return the list of its seconds."""
    seconds: list[float] = []
    monkeypatch.setattr(slurm.time, "sleep", seconds.append)
    return seconds


def job(makes: str = "runs/x", **cluster: Any) -> Job:
    site = SubmitConfig(ClusterConfig(**cluster), SubmitSettings())
    return Job("pretrain", ("a=b",), Path(makes), (1,), 2, site, "run: {}\n")


def failing(times: int, printed: str, then: str) -> str:
    return f'[ $(grep -c "^$(basename "$0")" "$CALLS") -gt {times} ] || {{ echo "{printed}" >&2; exit 1; }}; {then}'


@pytest.mark.parametrize(
    "printed", ["Unable to contact slurm controller (connect failure)", "Socket timed out on send/recv"]
)
def test_a_busy_controller_is_called_again(printed: str, stub: Stub, slept: list[float], tmp_path: Path) -> None:
    stub("squeue", "exit 1")
    log = stub("sbatch", failing(2, printed, "echo 77"))
    assert slurm.submit(["sbatch", "x"], tmp_path) == "77"
    assert slept == [1, 2] and log.read_text(encoding="utf-8").count("sbatch x") == 3


def test_a_job_whose_answer_was_lost_is_not_submitted_twice(stub: Stub, slept: list[float], tmp_path: Path) -> None:
    stub("squeue", f'echo "9 /other/x.sbatch"; echo "78 {tmp_path}/code/slurm/pretrain.sbatch"')
    log = stub("sbatch", "echo 'Socket timed out on send/recv operation' >&2; exit 1")
    assert slurm.submit(["sbatch", "x"], tmp_path) == "78"
    assert log.read_text(encoding="utf-8").count("sbatch x") == 1


def test_a_controller_that_stays_away(stub: Stub, slept: list[float], tmp_path: Path) -> None:
    stub("squeue", "exit 1")
    stub("sbatch", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(
        Interrupted, match=r"Slurm does not answer \(Unable to contact slurm controller\); submit again"
    ):
        slurm.submit(["sbatch", "x"], tmp_path)
    assert 60 < sum(slept) <= 300 and slept == sorted(slept)


def test_what_slurm_refuses_is_not_tried_again(stub: Stub, slept: list[float], tmp_path: Path) -> None:
    stub("sbatch", "echo 'invalid partition specified: x' >&2; exit 1")
    with pytest.raises(ConfigurationError, match="Slurm refuses the job: invalid partition specified: x"):
        slurm.submit(["sbatch", "x"], tmp_path)
    assert slept == []


def test_a_chain_that_breaks_names_what_is_submitted(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("train.submit.take", lambda folder, files: folder)
    stub("sbatch", '[ -e first ] && { echo "no more jobs" >&2; exit 1; }; touch first; echo 5')
    printed = r"no more jobs Submitted already: 5 \(`scancel 5` cancels them; submit.after=5 continues after them\)"
    with pytest.raises(ConfigurationError, match=printed):
        submit([job(), job("runs/y")])


def test_followers_ask_more_and_more_seldom(stub: Stub, slept: list[float], tmp_path: Path) -> None:
    stub("scontrol", failing(40, "Unable to contact slurm controller", "echo JobState=COMPLETED"))
    assert follow("7", tmp_path / "log") == "COMPLETED"
    assert slept[0] == 2 and slept == sorted(slept) and max(slept) == 60 and len(slept) == 40


def test_followers_print_letters_whole(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Also where a read ends within one."""
    log = tmp_path / "log"
    parts = [b"\xe4\xb8", b"\xad", b"\xff\n"]

    def grow(_: float) -> None:
        log.open("ab").write(parts.pop(0))

    monkeypatch.setattr(slurm.time, "sleep", grow)
    stub("scontrol", failing(3, "busy", "echo JobState=FAILED"))
    assert follow("7", log) == "FAILED" and capsys.readouterr().out == "中�\n"


@pytest.mark.parametrize(
    ("sacct", "expected"),
    [("echo COMPLETED", "COMPLETED"), ("echo FAILED", "FAILED"), ("exit 1", "FORGOTTEN"), (":", "FORGOTTEN")],
)
def test_a_forgotten_job_is_no_success(sacct: str, expected: str, stub: Stub) -> None:
    stub("scontrol", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    stub("sacct", sacct)
    assert slurm.state("7") == expected


@pytest.mark.parametrize(
    ("cluster", "expected"),
    [
        ({}, {"gpus-per-node": 8}),
        ({"gres": "gpu:a100"}, {"gres": "gpu:a100:8"}),
        ({"gres": "none"}, {}),
        ({"sbatch": ["--exclusive", "--gres=gpu:8"]}, {}),
        ({"sbatch": ["--gpus=8"]}, {}),
        ({"sbatch": ["-G8"]}, {}),
        ({"sbatch": ["--gres=nvme:1", "--gres-flags=x"]}, {"gpus-per-node": 8}),
    ],
)
def test_how_gpus_are_requested(cluster: dict[str, Any], expected: dict[str, object]) -> None:
    assert gpu_option(ClusterConfig(gpus_per_node=8, **cluster), 8) == expected


def test_without_gpus_none_are_requested() -> None:
    assert gpu_option(ClusterConfig(gres="gpu"), 0) == {}


def test_what_a_site_goes_by() -> None:
    words = {"partition": "p", "account": "a", "qos": "q", "reservation": "r", "constraint": "h100&ib",
             "nodelist": "n[1-4]", "exclude": "n3"}  # fmt: skip
    command = sbatch_command(job(**words), Path("s"), None)
    assert {f"--{name}={value}" for name, value in words.items()} <= set(command)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "cluster").glob("*.yaml")))
def test_the_sites_that_are_shipped(name: str, tmp_path: Path) -> None:
    register()
    site = OmegaConf.to_object(composed("submit", [f"cluster={name}"]))
    assert isinstance(site, SubmitConfig)
    one = Job("pretrain", (), Path("runs/x"), (1,), site.cluster.ranks_per_node, site, "")
    gpus = [word for word in sbatch_command(one, Path("s"), None) if "gpu" in word and "partition" not in word]
    assert gpus == {"gres": ["--gres=gpu:a100:4"], "whole_nodes": [], "cpu": []}.get(name, ["--gpus-per-node=8"])
    subprocess.run(["bash", "-n"], input=site_script(one), encoding="utf-8", check=True)


def test_keys_are_not_shown() -> None:
    secrets = {"WANDB_API_KEY": "abc' \"d", "HF_TOKEN": "efg", "my_password": "hij", "AWS_SECRET_ACCESS_KEY": "a/b+c="}
    shown = {"TOKENIZERS_PARALLELISM": "false", "NCCL_DEBUG": "INFO"}
    text = site_script(job(environment=secrets | shown, setup=["export GIT_TOKEN=klm; module load cuda"]))
    assert all(shlex.quote(value) in text for value in secrets.values())
    safe = masked(text)
    assert not any(value in safe for value in [*secrets.values(), "abc", "klm"])
    assert safe.count("***") == 5 and "TOKENIZERS_PARALLELISM=false" in safe and "***; module load cuda" in safe
