"""Join the ranks' plans of a save into one, and describe the files that they wrote, with DCP's own planner and writer.

Both are pure Python over every piece of every rank: some 40 us a piece. Beside a training step they would hold the
interpreter for most of that time, so large plans go to a process of their own: this file as a program, which reads a
job from standard input and writes the result to standard output.
"""

import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

AWAY_BYTES = 4 * 2**20  # of pickled plans, some 285 a piece: half a second of planning; a process takes seconds
METADATA = ".metadata"  # DCP's name of the file that lists all pieces


def join_plans(plans: Sequence[bytes]) -> tuple[list[bytes], bytes]:
    """Return the plan that each rank is to write, without pieces that another one writes, and DCP's metadata."""
    return _run(_join_plans, [list(plans)], sum(map(len, plans)))  # type: ignore[no-any-return]


def describe(metadata: bytes, results: Sequence[bytes], part: bytes, folder: str) -> bytes:
    """Return the content of `.metadata` from the ranks' results.

    `part` is the `.metadata` of a part that was written by itself into its `folder`, empty if there is none: its pieces
    are listed too.
    """
    return _run(_describe, [metadata, list(results), part, folder], len(metadata))  # type: ignore[no-any-return]


def _join_plans(plans: Sequence[bytes]) -> tuple[list[bytes], bytes]:
    joined, metadata = DefaultSavePlanner().create_global_plan([pickle.loads(each) for each in plans])
    final = FileSystemWriter(".").prepare_global_plan(joined)
    return [pickle.dumps(each) for each in final], pickle.dumps(metadata)


def _describe(metadata: bytes, results: Sequence[bytes], part: bytes, folder: str) -> bytes:
    whole, own = pickle.loads(metadata), [pickle.loads(each) for each in results]
    with TemporaryDirectory() as beside:
        FileSystemWriter(beside).finish(whole, own)
        written = Path(beside, METADATA).read_bytes()
    if not part:
        return written
    whole, more = pickle.loads(written), pickle.loads(part)
    whole.state_dict_metadata |= more.state_dict_metadata
    whole.planner_data |= more.planner_data
    for index, place in more.storage_data.items():
        place.relative_path = f"{folder}/{place.relative_path}"
        whole.storage_data[index] = place
    return pickle.dumps(whole)


def _run(job: Callable[..., Any], arguments: list[Any], size: int) -> Any:
    if size <= AWAY_BYTES:
        return job(*arguments)
    command = [sys.executable, "-P", __file__]  # -P: the modules of this folder are not importable by bare names
    done = subprocess.run(command, input=pickle.dumps((job.__name__, arguments)), capture_output=True, check=False)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [""]
        raise RuntimeError(f"the process that plans a checkpoint ended with code {done.returncode} ({last[0]})")
    return pickle.loads(done.stdout)


if __name__ == "__main__":
    jobs: dict[str, Callable[..., Any]] = {"_join_plans": _join_plans, "_describe": _describe}
    name, given = pickle.load(sys.stdin.buffer)
    sys.stdout.buffer.write(pickle.dumps(jobs[name](*given)))
