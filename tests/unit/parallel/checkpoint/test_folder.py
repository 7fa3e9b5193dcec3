"""Which checkpoints are there, which of them stay, and that `latest` is no second answer."""

import errno
import json
from pathlib import Path
from unittest.mock import patch

import pytest

from common.errors import Notice, StorageFailed
from parallel.checkpoint.folder import CheckpointFolder


def saved(folder: Path, step: int, trusted: bool = True, **extra: object) -> None:
    place = folder / f"step_{step:08d}"
    place.mkdir(parents=True)
    (place / "state.json").write_text(json.dumps({"step": step, "extra": extra, "trusted": trusted}), encoding="utf-8")


def test_the_folders_are_the_one_answer(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    assert checkpoints.steps() == [] and checkpoints.latest_step() is None and checkpoints.named_latest() is None
    for step in (4, 8):
        saved(tmp_path, step)
    for other in ("step_00000009.partial", "step_00000010.damaged", "step_00000011.removed", "step_x", "step_12"):
        (tmp_path / other).mkdir()
    (tmp_path / "step_00000013").write_text("no folder", encoding="utf-8")
    for named in (None, "step_00000004", "step_00000099", "", "step_\udcff"):  # older, not there, illegible
        if named is not None:
            (tmp_path / "latest").write_text(named, encoding="utf-8", errors="surrogateescape")
        assert checkpoints.steps() == [4, 8] and checkpoints.latest_step() == 8
    checkpoints.write_latest(8)
    assert checkpoints.named_latest() == "step_00000008"


def test_a_folder_of_another_name_is_no_step_of_that_name(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    assert checkpoints.renamed() is None
    for step in (4, 8):
        saved(tmp_path, step)
    assert checkpoints.renamed() is None
    (tmp_path / "step_00000004").rename(tmp_path / "step_00000099")
    assert checkpoints.renamed() == f"{tmp_path / 'step_00000099'} holds the state of step 4"
    (tmp_path / "step_00000099" / "state.json").write_text("[", encoding="utf-8")
    assert checkpoints.renamed() is None, "a damaged one is put aside when it is loaded"


def test_what_is_not_trusted_replaces_nothing(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path, keep_last=2, keep_every=10)
    for step in (10, 12, 14):
        saved(tmp_path, step)
    for step in (20, 22):
        saved(tmp_path, step, trusted=False)
    checkpoints.prune()
    assert checkpoints.steps() == [10, 12, 14, 20, 22] and checkpoints.trusted_steps() == [10, 12, 14]
    saved(tmp_path, 24)
    checkpoints.prune()
    assert checkpoints.steps() == [10, 14, 24], "the row has ended well; its checkpoints are old ones"


def test_the_last_good_one_is_never_removed(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path, keep_last=1)
    saved(tmp_path, 4)
    for step in (5, 6, 7):
        saved(tmp_path, step, trusted=False)
        checkpoints.prune()
    assert checkpoints.steps() == [4, 5, 6, 7]


def test_a_kill_while_removing_leaves_no_half_checkpoint(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path, keep_last=1)
    for step in (1, 2):
        saved(tmp_path, step)
    with (
        patch("parallel.checkpoint.folder.shutil.rmtree", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        checkpoints.prune()
    assert checkpoints.steps() in ([1, 2], [2]) and (tmp_path / "step_00000002" / "state.json").exists()
    checkpoints.remove(2)
    assert 2 not in checkpoints.steps()


def test_what_was_saved_is_read_from_the_newest_that_is_legible(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    saved(tmp_path, 1, note="first")
    saved(tmp_path, 2, note="second")
    assert checkpoints.latest_extra() == {"note": "second"}
    (tmp_path / "step_00000002" / "state.json").write_text("cut sho", encoding="utf-8")
    assert checkpoints.latest_extra() == {"note": "first"}


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_no_empty_folder_and_no_damage(tmp_path: Path, code: int) -> None:
    saved(tmp_path, 4, x=1)
    checkpoints, error = CheckpointFolder(tmp_path), OSError(code, "it fails")
    with patch("os.scandir", side_effect=error), pytest.raises(StorageFailed, match=r"could not be read \(it fails\)"):
        checkpoints.lost()
    with patch.object(Path, "read_text", side_effect=error):
        with pytest.raises(StorageFailed, match=r"step_00000004 could not be read \(it fails\)"):
            checkpoints.latest_extra()
        with pytest.warns(Notice, match="could not be listed"):
            checkpoints.prune()
        with pytest.raises(StorageFailed):
            checkpoints.named_latest()
    assert checkpoints.latest_extra() == {"x": 1}


def test_checkpoints_after_the_good_one_are_forgotten(tmp_path: Path) -> None:
    checkpoints = CheckpointFolder(tmp_path)
    for step in (4, 8, 12):
        (tmp_path / f"step_{step:08d}").mkdir()
    (tmp_path / "latest").write_text("step_00000012", encoding="utf-8")
    checkpoints.forget_after(9)
    assert checkpoints.named_latest() == "step_00000008"
    assert checkpoints.steps() == [4, 8] and checkpoints.latest_step() == 8
    checkpoints.forget_after(3)
    assert checkpoints.steps() == [] and checkpoints.latest_step() is None
    assert checkpoints.named_latest() is None
