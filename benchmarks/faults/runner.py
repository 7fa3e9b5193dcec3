"""Run one trial of a fault, and compare the job's loss curve with that of an undisturbed run."""

import shutil
import time
from contextlib import ExitStack
from functools import cache
from pathlib import Path

from benchmarks.faults.catalog import DAMAGED
from benchmarks.faults.job import STEPS, Job
from benchmarks.faults.processes import kill_in_checkpoints
from benchmarks.faults.trial import STRIKE_AT, Fault, Result, Trial
from data.corpus_text import corpus_texts
from data.miniature.config import MiniatureConfig
from data.miniature.corpus import make_corpus
from data.tokenizer import train_tokenizer

NAN_BATCH = STRIKE_AT + 1
SKIPPED_BATCHES = {"undisturbed": "[]", "without the batch": f"[{NAN_BATCH}]"}  # of the reference runs


def run(fault: Fault, folder: Path, corpus: Path) -> Result:
    """Inject the fault into a new job, and return what became of the job."""
    if (missing := fault.needs()) is not None:
        return Result(fault.name, f"not run: {missing}")
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier call
    expected = reference(fault.reference, folder.parent, corpus)
    nan = {"FAULT_NAN_BATCH": str(NAN_BATCH)} if fault.module == "benchmarks.faults.nan_job" else {}
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
            return _ended(fault, trial, expected) if fault.ends else _went_on(fault, trial, expected)
        except (RuntimeError, TimeoutError, OSError) as error:
            return Result(fault.name, f"FAILED: {error}")


def _ended(fault: Fault, trial: Trial, expected: list[tuple]) -> Result:
    """Wait for the job's end, start it again, and judge the whole."""
    job, result, damaged = trial.job, Result(fault.name, ""), fault.report == DAMAGED
    early = "" if damaged else fault.report
    job.until(lambda: (early and job.logged(early)) or job.ended(), even_if_ended=True)
    result.detected_s = time.monotonic() - trial.struck_at
    job.until(job.ended, even_if_ended=True)
    codes = " and ".join(map(str, job.codes()))
    reported = _reported(fault, trial)
    intact = job.intact()
    fault.repair(trial)
    job.start()
    job.until(lambda: job.logged(r"resumed after step (\d+)|a new run"))
    found = job.logged(r"resumed after step (\d+)")
    resumed = int(found[1]) if found else 0
    job.until_step(resumed + 1)
    result.training_again_s = time.monotonic() - trial.struck_at
    result.steps_lost = max(0, trial.step - resumed)  # ranks that outlive their launcher take one more
    if damaged:
        reported = bool(job.logged(fault.report))
        result.detected_s = None  # damage is found at the next start
    result.happened = f"ended with {codes}; started again, it went on from step {resumed}"
    return _judged(fault, trial, result, expected, reported, whole=damaged or intact is not None)


def _went_on(fault: Fault, trial: Trial, expected: list[tuple]) -> Result:
    """Wait until the job trains on by itself, and judge the whole."""
    job, result = trial.job, Result(fault.name, "")
    job.until(lambda: job.step() > trial.step or job.ended(), even_if_ended=True)
    result.training_again_s = time.monotonic() - trial.struck_at
    reported = _reported(fault, trial)
    result.steps_lost = _steps_gone_back(job)
    back = f", {result.steps_lost} steps back and without the batch" if result.steps_lost else ""
    result.happened = f"the job went on by itself{back}"
    return _judged(fault, trial, result, expected, reported, whole=True)


def _judged(fault: Fault, trial: Trial, result: Result, expected: list[tuple], reported: bool, whole: bool) -> Result:
    """Let the job finish, and compare its curve; `whole`: the fault left an intact checkpoint."""
    job = trial.job
    job.finish()
    result.equal = job.curve() == expected
    result.survived = bool(result.equal and reported and whole and job.intact() == STEPS)
    if not reported:
        result.happened += f"; its log lacks {fault.report!r}"
    if not whole:
        result.happened += "; its last checkpoint was damaged"
    return result


def _reported(fault: Fault, trial: Trial) -> bool:
    expected_later = not fault.report or (fault.ends and fault.report == DAMAGED)
    return expected_later or trial.reported or bool(trial.job.logged(fault.report))


def _steps_gone_back(job: Job) -> int:
    found = job.logged(r"goes back from step (\d+) to step (\d+)")
    return int(found[1]) - int(found[2]) if found else 0


@cache
def reference(name: str, folder: Path, corpus: Path) -> list[tuple]:
    """Return the curve of a run without faults; `without the batch` skips the batch of the NaN from the start."""
    job = Job(folder / name, folder / "logs" / name, [f"data.root={corpus}"])
    if len(job.curve()) == STEPS:  # of an earlier call with the same folder
        return job.curve()
    job.folder.mkdir(parents=True, exist_ok=True)
    skipped = f'{{"batches": {SKIPPED_BATCHES[name]}, "roll_backs": 0}}'
    (job.folder / "left_out.json").write_text(skipped, encoding="utf-8")
    job.start()
    try:
        job.finish()
    finally:
        job.kill()
    return job.curve()


def make_data(folder: Path) -> Path:
    """Make a corpus of a few hundred records, unless it is there."""
    if (folder / "tokenizer.model").exists():
        return folder
    make_corpus(MiniatureConfig(folder=str(folder), scale=0.01, languages=["en", "de"], workers=1))
    train_tokenizer(corpus_texts(folder, "train"), folder / "tokenizer.model", 1024)
    return folder
