"""Train a model; the same command resumes the run.

    python -m train.pretrain data.root=runs/corpus run.steps=100
    torchrun --nproc_per_node 2 -m train.pretrain experiment=demo
    torchrun --nproc_per_node 8 -m train.pretrain experiment=paper_3b data.root=/data/shards \\
        weights.vit=siglip weights.mt5=mt5-large mixture.ocr.weight=0

One process is one rank, under torchrun, srun or mpirun alike. `-m` starts a sweep, `hydra/launcher=slurm` submits one.
"""

from contextlib import closing
from dataclasses import fields
from pathlib import Path

from omegaconf import DictConfig

from data.labels import open_tokenizer
from parallel.distributed import launch
from parallel.layout import Layout
from parallel.plan.blueprint import Plan
from train.build import build_phase_engine
from train.checks import check, check_training_data
from train.config import RunConfig
from train.entry import entry
from train.health.device_queue import DeviceQueue
from train.health.watchdog import Watchdog
from train.phases import Span, find_span, for_phase, spans
from train.rehearsal import rehearse
from train.run.restarts import stop_if_in_vain
from train.run.run import Run
from train.settings.compose import to_run_config
from train.settings.facts import check_settings_of_ranks
from train.settings.planning import choose_layout
from train.step.loop import Loop
from train.step.reader import ReplicaReader
from train.step.spike_guard import check_end
from train.step.validation import Validation

READS = (*(group.name for group in fields(RunConfig) if group.name != "classifier"), "experiment=", "cell=")


def main(composed: DictConfig) -> None:
    """Train one run, from its composed configuration to its last checkpoint."""
    config = to_run_config(composed)
    this = launch()
    config = choose_layout(config, this.world_size)
    plans = check(config, this.world_size, rank=this.rank)
    check_training_data(config)
    check_settings_of_ranks(config, this)
    layout = Layout.start(config.parallel, this)
    if config.run.rehearse:
        rehearse(config, layout, plans)
        return
    timeout_s, folder = config.parallel.timeout_s, Path(config.run.folder)
    with (
        closing(Run(config, layout)) as run,
        Watchdog(timeout_s, folder, layout.rank, layout.world_size, DeviceQueue(layout.device)),
    ):
        stop_if_in_vain(run)
        done = run.checkpoints.steps_done()
        while done < config.run.steps:
            span = find_span(spans(config), done + 1)
            done = train_phase(run, span, plans.pop(span.name, None))
        run.checkpoints.settle()
        check_end(done, run.checkpoints.skipped_last(), folder)
        more = f"{done} steps are done; run.steps={config.run.steps} leaves none to do."
        run.records.note(f"{run.folder}: {more if done > config.run.steps else f'all {done} steps are done.'}")


def train_phase(run: Run, span: Span, plan: Plan | None) -> int:
    """Train one phase from the newest checkpoint to its last step; return the steps of the run that are done.

    `plan`: the phase's model, planned by the checks; None where the phase is entered again, because it is used up.
    """
    config = for_phase(run.config, span)
    restored, given = run.checkpoints.restores(), run.checkpoints.first_names()
    engine = build_phase_engine(config, span.phase, run.layout, restored, plan, given)
    run.records.introduce(engine)
    done, extra = run.checkpoints.restore(engine)
    for line in run.checkpoints.describe_first() if given else ():
        run.records.note(line)
    if done < span.first - 1:
        return done  # the newest checkpoint was damaged -> the one before it belongs to an earlier phase
    tokenizer = open_tokenizer(config.data.tokenizer)
    with closing(ReplicaReader(config, run.layout, tokenizer, config.mixture, "train")) as reader:
        run.checkpoints.take_sources(reader.facts, extra)
        run.begin(done, extra, engine)
        validation = Validation(config, run.layout, tokenizer)
        return Loop(config, span, run, engine, reader, validation, extra).train(done)


if __name__ == "__main__":
    entry("pretrain", main, READS)
