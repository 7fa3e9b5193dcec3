"""One cluster, one corpus and one run without interruptions for all tests on Slurm."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.slurm.cluster import PATH, Cluster, clear_of_launchers, needs_slurm, show

STEPS = 12
TINY = [
    "vit.width=32", "vit.depth=1", "vit.mlp_dim=64", "vit.num_heads=2", "mt5.d_model=32", "mt5.d_ff=64", "mt5.d_kv=16",
    "mt5.num_heads=2", "mt5.num_encoder_layers=1", "mt5.num_decoder_layers=1", "mt5.vocab_size=1152",
]  # fmt: skip
CORPUS = ["scale=0.01", "languages=[en,de,ru,ja]"]
SETTINGS = [
    "experiment=equivalence", *TINY, f"run.steps={STEPS}", "data.global_batch_size=4", "data.num_streams=2",
    "data.encoder_length=128", "mixture.span_corruption.options.input_length=128", "data.images_per_row=1",
    "parallel.micro_batch_size=2", "checkpoint.every_steps=2",
]  # fmt: skip


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of the lines of a run's metrics."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def same_curve(found: list[tuple[int, float, float]], expected: list[tuple[int, float, float]]) -> None:
    """Every step once, in order, and fp32 rounding apart."""
    assert [step for step, *_ in found] == [step for step, *_ in expected]
    for (_, *numbers), (_, *wanted) in zip(found, expected, strict=True):
        assert numbers == pytest.approx(wanted, rel=2e-5)


@contextmanager
def stopped_after(steps: int, run: Path, number: str) -> Iterator[list[int]]:
    """Both ranks of a run's job hang (SIGSTOP) once so many steps are done, so that it cannot end too early.

    Gives their processes, in order of rank; at the end, those that are left go on.
    """
    end = time.monotonic() + 500
    while len(curve(run)) < steps:
        assert time.monotonic() < end and show(number)["JobState"] in ("PENDING", "RUNNING", "COMPLETING")
        time.sleep(0.05)
    ranks = [process_of(number, rank) for rank in range(2)]
    try:
        for process in ranks:
            os.kill(process, signal.SIGSTOP)
        assert len(curve(run)) < STEPS, "the run was over before anything could happen to it; give it more steps"
        yield ranks
    finally:
        for process in ranks:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGCONT)


def process_of(number: str, rank: int) -> int:
    """The process of one rank of a job's training, which srun started itself or submitit in it."""
    wanted = {f"SLURM_JOB_ID={number}", f"SLURM_PROCID={rank}", "SLURM_STEP_ID=0"}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            own = set((folder / "environ").read_text(errors="replace", encoding="utf-8").split("\0"))
            command = (folder / "cmdline").read_text(encoding="utf-8").split("\0")
        except OSError:
            continue
        trains = {"train.pretrain", "submitit.core._submit"} & set(command)
        if wanted <= own and trains and "srun" not in command[0]:
            return int(folder.name)
    raise AssertionError(f"no process of rank {rank} of job {number}")


@pytest.fixture(scope="session")
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        clear_of_launchers(patch)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PATH", PATH)
        yield patch


@pytest.fixture(scope="session")
def slurm(environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    from train.entry import register

    needs_slurm()
    register()  # for tests that submit: each must pass alone
    cluster = Cluster(tmp_path_factory.mktemp("cluster"))
    environment.setenv("SLURM_CONF", str(cluster.folder / "slurm.conf"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        environment.delenv("SLURM_CONF")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus by one process, and its tokenizer."""
    from data.corpus_text import corpus_texts
    from data.miniature.config import parse
    from data.miniature.corpus import make_corpus
    from data.tokenizer import train_tokenizer

    needs_slurm()
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    make_corpus(parse([f"folder={folder}", "workers=1", *CORPUS]))
    train_tokenizer(corpus_texts(folder, "train"), folder / "tokenizer.model", 1024)
    return folder


@pytest.fixture(scope="session")
def straight(
    environment: pytest.MonkeyPatch, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[int, float, float]]:
    """The curve of one process that nothing happens to."""
    from train import pretrain
    from train.entry import entry

    folder = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["program", *SETTINGS, f"data.root={corpus}", "run.folder=run"])
        entry("pretrain", pretrain.main)
    return curve(folder / "run")
