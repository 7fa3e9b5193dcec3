"""Faults done to real training jobs, and what is left of the run: each is survived, or ends it cleanly.

    python -m benchmarks.faults                       # all of them
    python -m benchmarks.faults "SIGSTOP of a rank"   # some
    python -m benchmarks.faults --list
    python -m benchmarks.faults --report benchmarks/faults.md

A job is two ranks of the toy model on CPUs (gloo), a checkpoint every 4 of 40 steps. A fault strikes while it trains;
where the job ends, the same command is started again. "Loss curve equal" compares every step's loss, gradient norm and
learning rate with those of a run that nothing was done to, to the last bit. Seconds are wall clock; most of the time
until a job trains again is Python importing torch.
"""

import argparse
import glob
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.fault_job import EVERY, STEPS, Job
from common.terminal import use_utf8
from data.corpus.text import corpus_texts
from data.miniature.config import MiniatureConfig
from data.miniature.corpus import make_corpus
from data.tokenizer import train_tokenizer

STRIKE_AT = EVERY + 2  # between two checkpoints
LINK_DOWN_S = 20
KILLS = 10
MIB = 2**20
ROOM_LEFT = 200 * 1024  # bytes: enough for a line of metrics, too few for a checkpoint
CLOCK_JUMP_S = 3600
NAN_BATCH = STRIKE_AT + 1
FAKETIME = "/usr/lib/*/faketime/libfaketimeMT.so.1"
NAMESPACES = (f"pali-a-{os.getpid()}", f"pali-b-{os.getpid()}")
ADDRESSES, LINKS = ("10.77.7.1", "10.77.7.2"), ("pali-va", "pali-vb")


@dataclass
class Trial:
    """A job and what is done to it; `undo` is closed at the end."""

    job: Job
    corpus: Path
    undo: ExitStack
    struck_at: float = 0.0  # time.monotonic()
    step: int = 0  # the last one recorded when the fault struck
    told: bool = False

    def strikes(self) -> None:
        """Now."""
        self.struck_at, self.step = time.monotonic(), self.job.step()


@dataclass(frozen=True)
class Fault:
    """`prepare` comes before the start, `strike` while the job trains (it calls `Trial.strikes`), `mend` before the
    command is started again. `told`: what the job says of it. `ends`: whether the job ends. `needs`: why it cannot be
    done here, or None."""

    name: str
    strike: Callable[[Trial], None]
    told: str = ""
    ends: bool = True
    prepare: Callable[[Trial], None] = lambda trial: None
    mend: Callable[[Trial], None] = lambda trial: None
    settings: tuple[str, ...] = ()
    module: str = "train.pretrain"
    nodes: int = 1
    reference: str = "undisturbed"
    needs: Callable[[], str | None] = lambda: None


@dataclass
class Result:
    """One row of the table; seconds are from the fault."""

    fault: str
    happened: str
    detected_s: float | None = None
    training_again_s: float | None = None
    steps_lost: int | None = None
    equal: bool | None = None
    survived: bool = False
    notes: list[str] = field(default_factory=list)


# ---- faults ----------------------------------------------------------------------------------------------------------


def kill_rank(trial: Trial) -> None:
    trial.strikes()
    trial.job.rank(1).kill()


def kill_launcher(trial: Trial) -> None:
    ranks = [trial.job.rank(rank) for rank in (0, 1)]
    trial.undo.callback(lambda: [process.kill() for process in ranks if process.is_running()])
    trial.strikes()
    trial.job.launchers[0].kill()
    psutil.wait_procs(ranks, timeout=120)  # orphans, which nobody but themselves can end
    trial.told = not any(process.is_running() for process in ranks)


def kill_node(trial: Trial) -> None:
    trial.strikes()
    trial.job.kill(node=1)


def stop_rank(trial: Trial) -> None:
    trial.strikes()
    trial.job.rank(1).suspend()


def hang_reading(trial: Trial) -> None:
    """A network drive that does not answer: a shard becomes a pipe that nobody writes to."""
    trial.strikes()
    for shard in _shards(trial):
        shard.rename(shard.with_suffix(".away"))
        os.mkfifo(shard)


def answer_again(trial: Trial) -> None:
    for shard in _shards(trial):
        shard.unlink()
        shard.with_suffix(".away").rename(shard)


def start_twice(trial: Trial) -> None:
    second = Job(trial.job.folder, trial.job.logs / "second", trial.job.settings)
    ranks = [trial.job.rank(rank) for rank in (0, 1)]
    for process in ranks:  # or it would be done before the second has begun
        process.suspend()
    trial.strikes()
    second.start()
    second.until(second.ended, even_if_ended=True)
    for process in ranks:
        process.resume()
    trial.told = bool(second.said("is in use by process")) and all(second.codes())


def kill_in_checkpoints(trial: Trial) -> None:
    """KILLS times: wait until a checkpoint is being written, and a random while; each must leave the last one whole."""
    draw, job = random.Random(0), trial.job
    longest = _seconds_of_a_checkpoint(job)
    for number in range(KILLS):
        if number:
            job.start()
        before = job.partial()
        job.until(lambda known=before: job.partial() - known)
        time.sleep(draw.uniform(0, longest))
        trial.strikes()
        job.kill()
        if job.intact() is None:
            raise RuntimeError(f"kill {number + 1} of {KILLS} left a damaged checkpoint as the latest")
    trial.told = True


def fill_disk(trial: Trial) -> None:
    trial.job.until(lambda: (trial.job.checkpoints() / "latest").exists())  # which is written beside the steps
    ballast = trial.job.folder.parent / "ballast"
    if os.geteuid() == 0:
        with ballast.open("wb", buffering=0) as file:
            with suppress(OSError):  # it is full
                while file.write(bytes(MIB)):
                    pass
            file.truncate(max(0, file.tell() - ROOM_LEFT))
    else:  # files that may not grow stand for a disk that is full
        for rank in (0, 1):
            trial.job.rank(rank).rlimit(psutil.RLIMIT_FSIZE, (ROOM_LEFT, ROOM_LEFT))
    trial.strikes()


def empty_disk(trial: Trial) -> None:
    (trial.job.folder.parent / "ballast").unlink(missing_ok=True)


def small_disk(trial: Trial) -> None:
    if os.geteuid() == 0:
        disk = trial.job.folder.parent
        disk.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600m", "pali-faults", str(disk)], check=True)
        trial.undo.callback(lambda: subprocess.run(["umount", "--lazy", str(disk)], check=True))


def truncate_checkpoint(trial: Trial) -> None:
    _stop_whole(trial)
    file = _largest_file(trial)
    os.truncate(file, file.stat().st_size // 2)


def flip_bit(trial: Trial) -> None:
    _stop_whole(trial)
    with _largest_file(trial).open("r+b") as file:
        file.seek(12345)
        byte = file.read(1)[0]
        file.seek(12345)
        file.write(bytes([byte ^ 1]))


def wait_for_nan(trial: Trial) -> None:
    trial.job.until(lambda: trial.job.said("gradient is not finite"))
    trial.strikes()


def remove_shard(trial: Trial) -> None:
    trial.strikes()
    for shard in _shards(trial):
        shard.rename(shard.with_suffix(".away"))


def put_shard_back(trial: Trial) -> None:
    for away in trial.corpus.glob("vq2a/*.away"):
        away.rename(away.with_suffix(".tar"))


def own_corpus(trial: Trial) -> None:
    own = trial.job.folder.parent / "corpus"
    shutil.copytree(trial.corpus, own)
    trial.job.settings = [*trial.job.settings, f"data.root={own}"]
    trial.corpus = own


def nothing_answers(trial: Trial) -> None:
    trial.job.environment = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}


def two_networks(trial: Trial) -> None:
    """Two network namespaces, joined by one cable."""
    for name in NAMESPACES:
        _ip("netns", "add", name)
        trial.undo.callback(_ip, "netns", "delete", name)
    _ip(
        "link",
        "add",
        LINKS[0],
        "netns",
        NAMESPACES[0],
        "type",
        "veth",
        "peer",
        "name",
        LINKS[1],
        "netns",
        NAMESPACES[1],
    )
    for name, address, link in zip(NAMESPACES, ADDRESSES, LINKS, strict=True):
        _ip("-n", name, "address", "add", f"{address}/24", "dev", link)
        _ip("-n", name, "link", "set", link, "up")
        _ip("-n", name, "link", "set", "lo", "up")
    named = [f"GLOO_SOCKET_IFNAME={link}" for link in LINKS]
    trial.job.prefixes = [("ip", "netns", "exec", ns, "env", name) for ns, name in zip(NAMESPACES, named, strict=True)]
    trial.job.address = ADDRESSES[0]


def pull_cable(trial: Trial) -> None:
    trial.strikes()
    _ip("-n", NAMESPACES[0], "link", "set", LINKS[0], "down")
    time.sleep(LINK_DOWN_S)
    trial.step = trial.job.step()
    _ip("-n", NAMESPACES[0], "link", "set", LINKS[0], "up")


def movable_clock(trial: Trial) -> None:
    offset = trial.job.folder.parent / "clock"
    offset.parent.mkdir(parents=True, exist_ok=True)
    offset.write_text("+0\n", encoding="utf-8")
    sleep = offset.with_name("real_sleep.so")
    source = Path(__file__).with_name("real_sleep.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(sleep), str(source)], check=True)
    trial.job.environment = {
        "LD_PRELOAD": f"{sleep}:{glob.glob(FAKETIME)[0]}", "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }  # fmt: skip


def move_clock(trial: Trial) -> None:
    trial.strikes()
    (trial.job.folder.parent / "clock").write_text(f"+{CLOCK_JUMP_S}\n", encoding="utf-8")
    trial.job.until_step(trial.step + 2)
    (trial.job.folder.parent / "clock").write_text(f"-{CLOCK_JUMP_S}\n", encoding="utf-8")


def _root() -> str | None:
    return None if os.geteuid() == 0 and shutil.which("ip") else "root and iproute2 are needed"


def _faketime() -> str | None:
    there = glob.glob(FAKETIME) and shutil.which("cc")
    return None if there else "libfaketime and a C compiler are needed (apt-get install libfaketime gcc)"


SOON = "parallel.timeout_s=30"
NAN_SETTINGS = ("run.guard.max_in_a_row=1", "run.guard.roll_back=1")
FAULTS = [
    Fault("kill -9 of a rank", kill_rank),
    Fault("kill -9 of the launcher", kill_launcher, told="has died; this process saves and ends", settings=(SOON,)),
    Fault("kill -9 of a node (two launchers, a process tree stands for a node)", kill_node, nodes=2),
    Fault("SIGSTOP of a rank", stop_rank, told=r"Does not answer, stopped or dead: rank 1", settings=(SOON,)),
    Fault("a read that never returns", hang_reading, told=r"Stands still: rank", prepare=own_corpus, mend=answer_again,
          settings=("data.prefetch=0", SOON)),
    Fault("the same command started twice", start_twice, ends=False, settings=("parallel.timeout_s=900",)),
    Fault(f"kill -9 of all while a checkpoint is written, at {KILLS} random moments", kill_in_checkpoints,
          settings=("checkpoint.every_steps=1",)),
    Fault("disk full while a checkpoint is written", fill_disk, told="could not be written", prepare=small_disk,
          mend=empty_disk),
    Fault("newest checkpoint cut short", truncate_checkpoint, told="is damaged"),
    Fault("newest checkpoint with one bit flipped", flip_bit, told="is damaged"),
    Fault("NaN in a gradient of one rank", wait_for_nan, told="gradient is not finite", ends=False,
          module="benchmarks.faulty", settings=NAN_SETTINGS, reference="left_out"),
    Fault("shards of a source vanish", remove_shard, told="is over its error budget", prepare=own_corpus,
          mend=put_shard_back, settings=("data.error_budget=0", "data.error_budget_minimum=0")),
    Fault("wandb cannot be reached", lambda trial: trial.strikes(), told="send it later with `wandb sync`", ends=False,
          prepare=nothing_answers, settings=("tracker=wandb", "tracker.mode=online")),
    Fault(f"link between two nodes down for {LINK_DOWN_S} s", pull_cable, ends=False, prepare=two_networks, nodes=2,
          needs=_root),
    Fault("clock jumps an hour ahead, then two back", move_clock, ends=False, prepare=movable_clock, needs=_faketime),
]  # fmt: skip


def _shards(trial: Trial) -> list[Path]:
    return sorted(trial.corpus.glob("vq2a/train-*.tar"))


def _stop_whole(trial: Trial) -> None:
    """End the job with a checkpoint that is not its only one."""
    trial.job.until(lambda: len(list(trial.job.checkpoints().glob("step_*[0-9]"))) > 1)
    trial.strikes()
    trial.job.kill()


def _largest_file(trial: Trial) -> Path:
    newest = trial.job.checkpoints() / (trial.job.checkpoints() / "latest").read_text(encoding="utf-8")
    return max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)


def _seconds_of_a_checkpoint(job: Job) -> float:
    job.until(lambda: list(job.checkpoints().glob("*.partial")))
    began = time.monotonic()
    job.until(lambda: (job.checkpoints() / "latest").exists())
    return time.monotonic() - began


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


# ---- the runner ------------------------------------------------------------------------------------------------------


def run(fault: Fault, folder: Path, corpus: Path) -> Result:
    """Do it, and see what becomes of the job."""
    if (missing := fault.needs()) is not None:
        return Result(fault.name, f"not run: {missing}")
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call
    expected = reference(fault.reference, folder.parent, corpus)
    nan = {"FAULT_NAN_BATCH": str(NAN_BATCH)} if fault.module == "benchmarks.faulty" else {}
    settings = [f"data.root={corpus}", *fault.settings]
    job = Job(folder / "disk" / "run", folder / "logs", settings, fault.module, environment=nan, nodes=fault.nodes)
    with ExitStack() as undo:
        trial = Trial(job, corpus, undo)
        undo.callback(job.kill)
        try:
            fault.prepare(trial)
            job.start()
            if fault.strike is not kill_in_checkpoints:
                job.until_step(STRIKE_AT)
            fault.strike(trial)
            return _aftermath(fault, trial, expected)
        except (RuntimeError, TimeoutError, OSError) as error:
            return Result(fault.name, f"FAILED: {error}")


def _aftermath(fault: Fault, trial: Trial, reference: list[tuple]) -> Result:
    job, result = trial.job, Result(fault.name, "")
    damaged = fault.told == "is damaged"
    if fault.ends:
        early = fault.told if not damaged else ""
        job.until(lambda: (early and job.said(early)) or job.ended(), even_if_ended=True)
        result.detected_s = time.monotonic() - trial.struck_at
        job.until(job.ended, even_if_ended=True)
        codes = " and ".join(map(str, job.codes()))
        told = damaged or trial.told or not fault.told or bool(job.said(fault.told))
        intact = job.intact()
        fault.mend(trial)
        job.start()
        job.until(lambda: job.said(r"resumed after step (\d+)|a new run"))
        found = job.said(r"resumed after step (\d+)")
        resumed = int(found[1]) if found else 0
        job.until_step(resumed + 1)
        result.training_again_s = time.monotonic() - trial.struck_at
        result.steps_lost = max(0, trial.step - resumed)  # ranks that outlive their launcher take one more
        if damaged:
            told = bool(job.said(fault.told))
            result.detected_s = None  # it is looked for at the next start
        result.happened = f"ended with {codes}; started again, it went on from step {resumed}"
    else:
        intact = 0
        job.until(lambda: job.step() > trial.step or job.ended(), even_if_ended=True)
        result.training_again_s = time.monotonic() - trial.struck_at
        told = trial.told or not fault.told or bool(job.said(fault.told))
        result.steps_lost = _steps_gone_back(job)
        result.happened = "the job went on by itself" + (
            f", {result.steps_lost} steps back and without the batch" if result.steps_lost else ""
        )
    job.finish()
    result.equal = job.curve() == reference
    result.survived = bool(result.equal and told and (damaged or intact is not None) and job.intact() == STEPS)
    if not told:
        result.happened += f"; it never said {fault.told!r}"
    if intact is None and not damaged:
        result.happened += "; its last checkpoint was damaged"
    return result


def _steps_gone_back(job: Job) -> int:
    found = job.said(r"goes back from step (\d+) to step (\d+)")
    return int(found[1]) - int(found[2]) if found else 0


LEFT_OUT = {"undisturbed": "[]", "left_out": f"[{NAN_BATCH}]"}  # batches


@cache
def reference(name: str, folder: Path, corpus: Path) -> list[tuple]:
    """The curve of a run that nothing is done to: as it is, or one that leaves out the batch of the NaN all along."""
    job = Job(folder / name, folder / "logs" / name, [f"data.root={corpus}"])
    if len(job.curve()) == STEPS:  # of an earlier call with the same --folder
        return job.curve()
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "left_out.json").write_text(f'{{"batches": {LEFT_OUT[name]}, "roll_backs": 0}}', encoding="utf-8")
    job.start()
    try:
        job.finish()
    finally:
        job.kill()
    return job.curve()


def make_data(folder: Path) -> Path:
    """A corpus of a few hundred records."""
    if (folder / "tokenizer.model").exists():
        return folder
    make_corpus(MiniatureConfig(folder=str(folder), scale=0.01, languages=["en", "de"], workers=1))
    train_tokenizer(corpus_texts(folder, "train"), folder / "tokenizer.model", 1024)
    return folder


def table(results: list[Result]) -> Table:
    shown = Table(title="What faults do to a run of two ranks")
    for name in HEAD:
        shown.add_column(name, justify="left" if name in HEAD[:2] else "right")
    for result in results:
        shown.add_row(*cells(result))
    return shown


HEAD = ("fault", "what happened", "seconds to detect", "seconds until training again", "steps lost",
        "loss curve equal", "survived")  # fmt: skip


def cells(result: Result) -> tuple[str, ...]:
    seconds = ["–" if s is None else f"{s:.1f} s" for s in (result.detected_s, result.training_again_s)]
    lost = "–" if result.steps_lost is None else str(result.steps_lost)
    equal = "–" if result.equal is None else "yes" if result.equal else "NO"
    survived = "not run" if result.happened.startswith("not run") else "yes" if result.survived else "NO"
    return result.fault, result.happened, *seconds, lost, equal, survived


def write_report(results: list[Result], path: Path) -> None:
    """The table in Markdown, with the command that makes it."""
    rows = [HEAD, ("---",) * len(HEAD), *map(cells, results)]
    load = f"{os.cpu_count()} cores, load average {os.getloadavg()[1]:.1f}"
    text = "# Faults\n\n" + (__doc__ or "").split("\n", 1)[1].strip("\n") + "\n\n"
    text += f"Measured with `python -m benchmarks.faults --report {path}` on {load}:\n\n"
    path.write_text(text + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("faults", nargs="*", help="names, or parts of them; left out, all")
    parser.add_argument("--list", action="store_true", help="say which there are, and end")
    parser.add_argument(
        "--folder", type=Path, help="where the jobs are kept (else a new folder, removed if all is well)"
    )
    parser.add_argument("--report", type=Path, help="write the table into this Markdown file")
    arguments = parser.parse_args()
    console = Console()
    if arguments.list:
        console.print("\n".join(fault.name for fault in FAULTS), markup=False)
        return 0
    chosen = [f for f in FAULTS if not arguments.faults or any(part in f.name for part in arguments.faults)]
    if not chosen:
        console.print(f"No fault is named like {', '.join(arguments.faults)}; see --list.")
        return 2
    folder = (arguments.folder or Path(tempfile.mkdtemp(prefix="pali-faults-"))).resolve()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # jobs are ended on the way out
    corpus = make_data(folder / "corpus")
    results = []
    for number, fault in enumerate(chosen):
        console.print(f"{fault.name} …", markup=False)
        results.append(run(fault, folder / f"fault_{number:02d}", corpus))
        console.print("    " + "; ".join(cells(results[-1])[1:]), markup=False)
        if arguments.report:
            write_report(results, arguments.report)
    console.print(table(results))
    if arguments.folder is None and all(result.survived for result in results):
        shutil.rmtree(folder)
    else:
        console.print(f"what the jobs said and left is in {folder}")
    return 0 if all(result.survived for result in results) else 1


if __name__ == "__main__":
    use_utf8()
    sys.exit(main())
