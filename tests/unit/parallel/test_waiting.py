"""What a rank waits for its peers: real collectives between two processes, of which one comes late."""

import time
from pathlib import Path

import torch
import torch.distributed as dist

from parallel.launch import launch, start
from parallel.waiting import CommunicationWait
from tests.distributed.world import run_world


def late(folder: Path) -> None:
    this = launch()
    start(this, 60)
    x = torch.ones(1000)
    with CommunicationWait(torch.device("cpu")) as waiting:
        dist.all_reduce(x)
        waiting.seconds()
        if this.rank == 1:
            time.sleep(1)
        dist.all_reduce(x)
        dist.all_gather([x.clone(), x.clone()], x)
        message = [dist.P2POp(dist.isend, x, 1)] if this.rank == 0 else [dist.P2POp(dist.irecv, x, 0)]
        for work in dist.batch_isend_irecv(message):
            work.wait()
        (folder / f"{this.rank}").write_text(f"{waiting.seconds()} {waiting.seconds()}", encoding="utf-8")
    assert dist.Work.wait is waiting_before


waiting_before = dist.Work.wait


def test_who_comes_early_waits(tmp_path: Path) -> None:
    run_world(2, late, tmp_path)
    early, then = map(float, (tmp_path / "0").read_text(encoding="utf-8").split())
    tardy, _ = map(float, (tmp_path / "1").read_text(encoding="utf-8").split())
    assert 0.9 < early < 2 and then == 0
    assert tardy < 0.5
