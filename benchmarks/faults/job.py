"""The training job that a fault strikes: real launchers, two ranks, a folder of its own."""

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from parallel.rendezvous import free_port
from train.health.heartbeat import published

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVERY = 40, 4  # steps of the run; steps between checkpoints
PATIENCE_S = 900  # longest wait for any event
SETTINGS = ("experiment=equivalence", f"run.steps={STEPS}", "data.global_batch_size=4", "data.num_streams=2",
            "parallel.micro_batch_size=2", "parallel.timeout_s=300", f"checkpoint.every_steps={EVERY}")  # fmt: skip


@dataclass
class Job:
    """One command, started as often as needed: one launcher with two ranks, or one launcher a node.

    Output goes to `logs`, one file a start. `prefixes`: words before the command of each node (`ip netns exec …`).
    `address`: the rendezvous address of the nodes.
    """

    folder: Path
    logs: Path
    settings: Sequence[str] = ()
    module: str = "train.pretrain"
    environment: dict[str, str] = field(default_factory=dict)
    nodes: int = 1
    prefixes: Sequence[Sequence[str]] = ()
    address: str = "127.0.0.1"
    starts: int = 0
    launchers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        """Start the command, on a new port."""
        self.starts += 1
        port = free_port()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **self.environment}
        self.launchers = []
        for node in range(self.nodes):
            prefix = list(self.prefixes[node]) if self.prefixes else []
            ranks = ["--nnodes", str(self.nodes), "--node_rank", str(node), "--nproc_per_node", str(2 // self.nodes)]
            rendezvous = ["--master_addr", self.address, "--master_port", str(port)]
            launcher = [sys.executable, "-m", "torch.distributed.run", *ranks, *rendezvous]
            overrides = [*SETTINGS, f"run.folder={self.folder}", *self.settings]
            command = [*prefix, *launcher, "-m", self.module, *overrides]
            with self.log.open("ab") as log:
                self.launchers.append(
                    subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
                )

    @property
    def log(self) -> Path:
        """Return the log file of the last start."""
        self.logs.mkdir(parents=True, exist_ok=True)
        return self.logs / f"start_{self.starts}.log"

    def logged(self, pattern: str) -> re.Match[str] | None:
        """Search the last start's log."""
        return re.search(pattern, self.log.read_text(errors="replace", encoding="utf-8"))

    def lines(self) -> list[dict[str, Any]]:
        """Read the metrics so far, without a line that is still being written."""
        file = self.folder / "metrics.jsonl"
        texts = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
        return [json.loads(text) for text in texts]

    def step(self) -> int:
        """Return the last recorded step."""
        lines = self.lines()
        return int(lines[-1]["step"]) if lines else 0

    def until(self, happens: Callable[[], object], even_if_ended: bool = False) -> None:
        """Wait until `happens()` is true; raise TimeoutError, and RuntimeError where the job ends before that."""
        end = time.monotonic() + PATIENCE_S
        while not happens():
            if self.ended() and not even_if_ended and not happens():
                raise RuntimeError(f"the job ended with {self.codes()}; see {self.log}")
            if time.monotonic() > end:
                raise TimeoutError(f"nothing happened for {PATIENCE_S} s; see {self.log}")
            time.sleep(0.02)

    def until_step(self, step: int) -> None:
        """Wait until a step is recorded."""
        self.until(lambda: self.step() >= step)

    def processes(self, node: int | None = None) -> list[psutil.Process]:
        """List the living launchers and ranks of one node, or of all."""
        found = []
        for launcher in self.launchers if node is None else [self.launchers[node]]:
            if launcher.poll() is None:
                parent = psutil.Process(launcher.pid)
                found += [parent, *parent.children(recursive=True)]
        return found

    def rank(self, rank: int) -> psutil.Process:
        """Wait for the process of a rank, which its heartbeat file names, and return it."""

        def found() -> list[psutil.Process]:
            # A heartbeat of an earlier start names no living process of this one.
            beat = published(self.folder).get(rank)
            return [process for process in self.processes() if beat is not None and process.pid == beat.process]

        self.until(found)
        return found()[0]

    def kill(self, node: int | None = None) -> None:
        """Send SIGKILL to all processes of a node, or of the job."""
        for process in self.processes(node):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        for launcher in self.launchers if node is None else [self.launchers[node]]:
            launcher.wait()

    def ended(self) -> bool:
        """Return whether all launchers have ended."""
        return all(launcher.poll() is not None for launcher in self.launchers)

    def codes(self) -> list[int | None]:
        """Return the launchers' exit codes."""
        return [launcher.poll() for launcher in self.launchers]

    def finish(self) -> None:
        """Wait for the end; raise RuntimeError for an exit code other than 0."""
        self.until(self.ended, even_if_ended=True)
        if any(self.codes()):
            raise RuntimeError(f"the job ended with {self.codes()}; see {self.log}")

    def checkpoints(self) -> Path:
        """Return the folder of checkpoints."""
        return self.folder / "checkpoints"

    def partial(self) -> set[tuple[str, int]]:
        """List (name, inode) of the checkpoints that are being written."""
        found = set()
        for path in self.checkpoints().glob("*.partial"):
            with suppress(FileNotFoundError):
                found.add((path.name, path.stat().st_ino))
        return found

    def intact(self) -> int | None:
        """Return the step of the checkpoint that `latest` names, 0 without one, or None where its files are damaged."""
        latest = self.checkpoints() / "latest"
        if not latest.exists():
            return 0
        path = self.checkpoints() / latest.read_text(encoding="utf-8")
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name, expected in manifest.items():
            content = (path / name).read_bytes()
            if len(content) != expected["bytes"] or hashlib.sha256(content).hexdigest() != expected["sha256"]:
                return None
        return int(path.name[5:])

    def curve(self) -> list[tuple[Any, ...]]:
        """Return (step, loss, gradient norm, learning rate) of every step: no fault may change them."""
        return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in self.lines()]
