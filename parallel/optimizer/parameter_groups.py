"""Parameter groups: what is particular to the update of tensors whose names match a pattern."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from common.errors import ConfigurationError
from parallel.config import ParameterGroup


def check_groups(groups: Sequence[ParameterGroup], names: Iterable[str]) -> None:
    """Raise ConfigurationError for a pattern that matches none of the model's logical names, trained or frozen."""
    known = list(names)
    for group in groups:
        if not any(fnmatchcase(name, group.pattern) for name in known):
            raise ConfigurationError(
                f"optimizer.groups: the pattern {group.pattern!r} matches no parameter; write a shell pattern of names "
                f"such as {known[0]!r}."
            )


def group_of(name: str, groups: Sequence[ParameterGroup]) -> ParameterGroup:
    """The last group whose pattern matches; one that changes nothing if none does."""
    matching = (group for group in reversed(groups) if fnmatchcase(name, group.pattern))
    return next(matching, ParameterGroup(pattern=name))
