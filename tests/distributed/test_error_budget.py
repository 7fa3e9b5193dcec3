"""A broken record that one rank of two reads stops both, with one sentence, long before any time-out."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from data.error_budget import Ledger
from data.shards.source import ShardSource
from data.shards.writer import write_shard

ROOT = Path(__file__).resolve().parents[2]
RUN = ["experiment=equivalence", "data.global_batch_size=4", "data.num_streams=2", "parallel.micro_batch_size=2",
       "~mixture", "mixture.vqa={source: vq2a, objective: vqa, weight: 1}",
       "data.error_budget=0", "data.error_budget_minimum=0"]  # fmt: skip


def ended(module: str, *settings: str, ranks: int = 2) -> tuple[list[int], list[str]]:
    """Exit codes of the ranks, started side by side as torchrun does, and what each printed."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", module, *settings]
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = []
    for rank in map(str, range(ranks)):
        own = os.environ | common | {"RANK": rank, "LOCAL_RANK": rank}
        devnull, pipe = subprocess.DEVNULL, subprocess.PIPE
        processes.append(subprocess.Popen(command, cwd=ROOT, env=own, stdout=devnull, stderr=pipe, encoding="utf-8"))
    try:
        printed = [process.communicate(timeout=400)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], printed


def broken(shard: Path, number: int) -> None:
    """Make one record's image unreadable."""
    source = ShardSource("vq2a", str(shard), shard.name.split("-")[0], Ledger(1.0, 0))
    records = [source[each] for each in range(len(source))]
    images = [record.image[:40] if each == number else record.image for each, record in enumerate(records)]
    write_shard(shard, [(r.key, r.fields, image) for r, image in zip(records, images, strict=True)])


def is_clean(codes: list[int], printed: list[str], shard: Path) -> bool:
    """Both ranks stopped themselves, and the main rank alone printed why."""
    sentence = "source vq2a is over its error budget: 1 of"
    return (
        codes == [3, 3]
        and sentence in printed[0]
        and f"most are in shard {shard}" in printed[0]
        and sentence not in printed[1]
        and not any("Traceback" in one for one in printed)
    )


def test_a_broken_record_of_one_rank_stops_all(corpus: Path, tmp_path: Path) -> None:
    own = tmp_path / "corpus"
    shutil.copytree(corpus, own)
    (training,) = (own / "vq2a").glob("train-*.tar")
    (held_out,) = (own / "vq2a").glob("test-*.tar")
    run = [*RUN, f"data.root={own}", f"run.folder={tmp_path / 'run'}"]
    codes, printed = ended("train.pretrain", *run, "run.steps=1", ranks=1)
    assert codes == [0], printed

    broken(held_out, 1)
    codes, printed = ended(
        "train.evaluate", f"run.folder={tmp_path / 'run'}", "evaluation.batch=1", "evaluation.max_new_tokens=2"
    )
    assert is_clean(codes, printed, held_out), (codes, printed)

    broken(training, 30)
    for layout in ([], ["parallel.tensor=2"]):  # two ranks that read, and one that sends to the other
        codes, printed = ended("train.pretrain", *run, "run.steps=100", "run.allow_changes=[data.sources]", *layout)
        assert is_clean(codes, printed, training), (codes, printed)
