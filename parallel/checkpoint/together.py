"""Do work on every rank of a group, so that an error on one rank is raised on all of them."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from common.errors import STORAGE_ERRNOS, StorageFailed

T = TypeVar("T")


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; every rank raises the same error, whose message is one sentence."""


class SaveStalled(SaveFailed):
    """A checkpoint could not be written because its storage failed, which often passes."""


def together(group: dist.ProcessGroup, work: Callable[[], T]) -> list[T]:
    """Do `work` on every rank, and return the results of all, which are small; a collective.

    Raises SaveFailed or SaveStalled on every rank for an error on one.
    """
    mistake, result = None, None
    try:
        result = work()
    except Exception as error:  # any error: the other ranks must not wait for this one
        mistake = f"rank {group.rank()}: {error}", _is_storage_error(error)
    everywhere = gather((mistake, result), group)
    found = next((each for each, _ in everywhere if each is not None), None)
    if found is not None:
        text, may_pass = found
        raise (SaveStalled if may_pass else SaveFailed)(text)
    return [each for _, each in everywhere]  # type: ignore[misc]


def gather(mine: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return on every rank the objects of all; a collective of the group, or of all ranks."""
    everywhere: list[T | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everywhere, mine, group=group)
    return everywhere  # type: ignore[return-value]


def anywhere(mistake: T | None, group: dist.ProcessGroup | None = None) -> T | None:
    """Return on every rank the mistake of the lowest rank that has one; a collective of the group, or of all ranks."""
    return next(filter(None, gather(mistake, group)), None)


def nothing() -> None:
    """Take part in `together` where another rank works."""


def _is_storage_error(error: BaseException) -> bool:
    return isinstance(error, StorageFailed) or (isinstance(error, OSError) and error.errno in STORAGE_ERRNOS)
