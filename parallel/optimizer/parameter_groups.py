"""Parameter groups: options of the update of tensors whose names match a pattern."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from common.errors import ConfigurationError
from parallel.config import ParameterGroup


def check_groups(groups: Sequence[ParameterGroup], names: Iterable[str]) -> None:
    """Raise ConfigurationError for a pattern that matches none of the model's logical names, trained or frozen."""
    all_names = list(names)
    for group in groups:
        if not any(fnmatchcase(name, group.pattern) for name in all_names):
            raise ConfigurationError(
                f"optimizer.groups: the pattern {group.pattern!r} matches no parameter; write a shell pattern of names "
                f"such as {all_names[0]!r}."
            )


def matching_group(name: str, groups: Sequence[ParameterGroup]) -> ParameterGroup:
    """Return the last group whose pattern matches a name, or one without options if none does."""
    matching = (group for group in reversed(groups) if fnmatchcase(name, group.pattern))
    return next(matching, ParameterGroup(pattern=name))
