"""Schedule tests that share worlds or a cluster, and print last which tests a machine could not run."""

from collections import Counter

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

# Rooms that take minutes, the longest first (measured by make test): the last ones to begin are short then.
LONGEST = (
    "tests/distributed/test_engines.py", "tests/slurm/", "tests/distributed/test_options_engines.py",
    "tests/distributed/test_checkpoints.py", "tests/distributed/test_processes.py",
    "tests/distributed/test_error_budget.py", "tests/distributed/test_checkpoint_loading.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put rooms of many processes in the order of their length."""

    def place(item: pytest.Item) -> int:
        found = (number for number, room in enumerate(LONGEST) if item.nodeid.startswith(room))
        return next(found, len(LONGEST))

    items.sort(key=place)


class RoomScheduling(LoadFileScheduling):
    """Give one worker a file of tests/distributed, or all of tests/slurm: their tests share worlds, or a cluster.

    `--dist loadgroup` does not do it: pytest-xdist 3.8.0 writes groups into a field that pytest 9.2 does not read.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "tests/slurm" if file.startswith("tests/slurm/") else file


@pytest.hookimpl(optionalhook=True)  # `-p no:xdist` has no such hook
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling | None:
    """Schedule by rooms where `--dist loadfile` is given; leave every other mode to pytest-xdist."""
    return RoomScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print the reasons of skipped tests below the summary, as the last line of `make test`."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):  # a worker of xdist reports to the main process
        return
    reasons = Counter(_reason(report) for report in reporter.stats.get("skipped", []))
    if reasons:
        why = "; ".join(f"{number} x {reason}" for reason, number in reasons.most_common())
        reporter.write_line(f"NOT TESTED on this machine: {why}", red=True, bold=True)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Return the reason of a skip without its file and line."""
    where = report.longrepr
    return str(where[2] if isinstance(where, tuple) else where).removeprefix("Skipped: ")
