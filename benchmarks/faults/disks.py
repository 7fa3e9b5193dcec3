"""Faults of files and disks: a full disk, damaged checkpoints, shards that hang or vanish."""

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.faults.trial import Trial

MIB = 2**20
ROOM_LEFT = 200 * 1024  # bytes: enough for a line of metrics, too few for a checkpoint


def copy_corpus(trial: Trial) -> None:
    """Give the trial a corpus of its own, which it may damage."""
    own = trial.job.folder.parent / "corpus"
    shutil.copytree(trial.corpus, own)
    trial.job.settings = [*trial.job.settings, f"data.root={own}"]
    trial.corpus = own


def hang_reading(trial: Trial) -> None:
    """Replace shards by pipes without a writer, as a network drive that does not answer."""
    trial.strikes()
    for shard in _shards(trial):
        shard.rename(shard.with_suffix(".away"))
        os.mkfifo(shard)


def stop_hanging(trial: Trial) -> None:
    """Put the shards back in place of the pipes."""
    for shard in _shards(trial):
        shard.unlink()
        shard.with_suffix(".away").rename(shard)


def remove_shards(trial: Trial) -> None:
    """Remove all training shards of a source."""
    trial.strikes()
    for shard in _shards(trial):
        shard.rename(shard.with_suffix(".away"))


def restore_shards(trial: Trial) -> None:
    """Put the removed shards back."""
    for away in trial.corpus.glob("vq2a/*.away"):
        away.rename(away.with_suffix(".tar"))


def mount_small_disk(trial: Trial) -> None:
    """Mount a small tmpfs for the run; only root can."""
    if os.geteuid() == 0:
        disk = trial.job.folder.parent
        disk.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600m", "pali-faults", str(disk)], check=True)
        trial.undo.callback(lambda: subprocess.run(["umount", "--lazy", str(disk)], check=True))


def fill_disk(trial: Trial) -> None:
    """Fill the run's disk up to ROOM_LEFT; without root, limit the size of the ranks' files instead."""
    trial.job.until(lambda: (trial.job.checkpoints() / "latest").exists())  # which a background thread writes
    ballast = trial.job.folder.parent / "ballast"
    if os.geteuid() == 0:
        with ballast.open("wb", buffering=0) as file:
            with suppress(OSError):  # the disk is full
                while file.write(bytes(MIB)):
                    pass
            file.truncate(max(0, ballast.stat().st_size - ROOM_LEFT))
    else:
        for rank in (0, 1):
            trial.job.rank(rank).rlimit(psutil.RLIMIT_FSIZE, (ROOM_LEFT, ROOM_LEFT))
    trial.strikes()


def free_disk(trial: Trial) -> None:
    """Remove the file that fills the disk."""
    (trial.job.folder.parent / "ballast").unlink(missing_ok=True)


def truncate_checkpoint(trial: Trial) -> None:
    """Kill the job, and cut the largest file of its newest checkpoint in half."""
    _kill_after_two_checkpoints(trial)
    file = _largest_file(trial)
    os.truncate(file, file.stat().st_size // 2)


def flip_bit(trial: Trial) -> None:
    """Kill the job, and flip one bit in the largest file of its newest checkpoint."""
    _kill_after_two_checkpoints(trial)
    with _largest_file(trial).open("r+b") as file:
        file.seek(12345)
        byte = file.read(1)[0]
        file.seek(12345)
        file.write(bytes([byte ^ 1]))


def _shards(trial: Trial) -> list[Path]:
    return sorted(trial.corpus.glob("vq2a/train-*.tar"))


def _kill_after_two_checkpoints(trial: Trial) -> None:
    """Kill the job once it has an older checkpoint to go back to."""
    trial.job.until(lambda: len(list(trial.job.checkpoints().glob("step_*[0-9]"))) > 1)
    trial.strikes()
    trial.job.kill()


def _largest_file(trial: Trial) -> Path:
    newest = trial.job.checkpoints() / (trial.job.checkpoints() / "latest").read_text(encoding="utf-8")
    return max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
