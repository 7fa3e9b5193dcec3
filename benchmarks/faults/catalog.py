"""The list of all faults."""

from benchmarks.faults.disks import (
    copy_corpus,
    fill_disk,
    flip_bit,
    free_disk,
    hang_reading,
    mount_small_disk,
    remove_shards,
    restore_shards,
    stop_hanging,
    truncate_checkpoint,
)
from benchmarks.faults.processes import (
    KILLS,
    kill_in_checkpoints,
    kill_launcher,
    kill_node,
    kill_rank,
    start_twice,
    stop_rank,
)
from benchmarks.faults.surroundings import (
    LINK_DOWN_S,
    close_wandb,
    fake_clock,
    make_two_networks,
    move_clock,
    needs_faketime,
    needs_root,
    pull_cable,
    wait_for_nan,
)
from benchmarks.faults.trial import Fault

SOON = "parallel.timeout_s=30"
NAN_SETTINGS = ("run.guard.max_in_a_row=1", "run.guard.roll_back=1")
NO_BUDGET = ("data.error_budget=0", "data.error_budget_minimum=0")
DAMAGED = "is damaged"  # logged at the next start

FAULTS = [
    Fault("kill -9 of a rank", kill_rank),
    Fault("kill -9 of the launcher", kill_launcher, report="has died; this process saves and ends", settings=(SOON,)),
    Fault("kill -9 of a node (two launchers on one machine)", kill_node, nodes=2),
    Fault("SIGSTOP of a rank", stop_rank, report=r"No response \(stopped or dead\): rank 1", settings=(SOON,)),
    Fault("a read that never returns", hang_reading, report=r"No progress: rank", prepare=copy_corpus,
          repair=stop_hanging, settings=("data.prefetch=0", SOON)),
    Fault("the same command started twice", start_twice, ends=False, settings=("parallel.timeout_s=900",)),
    Fault(f"kill -9 of all while a checkpoint is written, at {KILLS} random moments", kill_in_checkpoints,
          settings=("checkpoint.every_steps=1",)),
    Fault("disk full while a checkpoint is written", fill_disk, report="could not be written",
          prepare=mount_small_disk, repair=free_disk),
    Fault("newest checkpoint cut short", truncate_checkpoint, report=DAMAGED),
    Fault("newest checkpoint with one bit flipped", flip_bit, report=DAMAGED),
    Fault("NaN in a gradient of one rank", wait_for_nan, report="gradient is not finite", ends=False,
          module="benchmarks.faults.nan_job", settings=NAN_SETTINGS, reference="without the batch"),
    Fault("shards of a source vanish", remove_shards, report="is over its error budget", prepare=copy_corpus,
          repair=restore_shards, settings=NO_BUDGET),
    Fault("wandb cannot be reached", lambda trial: trial.strikes(), report="send it later with `wandb sync`",
          ends=False, prepare=close_wandb, settings=("tracker=wandb", "tracker.mode=online")),
    Fault(f"link between two nodes down for {LINK_DOWN_S} s", pull_cable, ends=False, prepare=make_two_networks,
          nodes=2, needs=needs_root),
    Fault("clock jumps an hour ahead, then two back", move_clock, ends=False, prepare=fake_clock,
          needs=needs_faketime),
]  # fmt: skip
