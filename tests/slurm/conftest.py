"""One cluster, one corpus and one run without interruptions for all tests on Slurm."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import PATH, Cluster, clear_of_launchers, needs_slurm

STEPS = 12
TINY = [
    "vit.width=32", "vit.depth=1", "vit.mlp_dim=64", "vit.num_heads=2", "mt5.d_model=32", "mt5.d_ff=64", "mt5.d_kv=16",
    "mt5.num_heads=2", "mt5.num_encoder_layers=1", "mt5.num_decoder_layers=1", "mt5.vocab_size=1152",
]  # fmt: skip
CORPUS = ["scale=0.01", "languages=[en,de,ru,ja]"]
SETTINGS = [
    "experiment=equivalence", *TINY, f"run.steps={STEPS}", "data.batch_examples=4", "data.num_streams=2",
    "data.encoder_length=128", "data.images_per_row=1", "parallel.micro_batch=2", "checkpoint.every_steps=2",
]  # fmt: skip


def curve(folder: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of the lines of a run's metrics."""
    file = folder / "metrics.jsonl"
    lines = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def same_curve(found: list[tuple[int, float, float]], expected: list[tuple[int, float, float]]) -> None:
    """Every step once, in order, and fp32 rounding apart."""
    assert [step for step, *_ in found] == [step for step, *_ in expected]
    for (_, *numbers), (_, *wanted) in zip(found, expected, strict=True):
        assert numbers == pytest.approx(wanted, rel=2e-5)


@pytest.fixture(scope="session")
def environment() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        clear_of_launchers(patch)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PATH", PATH)
        yield patch


@pytest.fixture(scope="session")
def slurm(environment: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    needs_slurm()
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
