"""Group tests that share worlds or a cluster, and print last which tests a machine could not run."""

from collections import Counter

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one worker run a file of tests/distributed, or all of tests/slurm, because their tests share fixtures."""
    for item in items:
        room = item.path.parent.name
        if room in ("distributed", "slurm") and "unit" not in item.path.parts:
            item.add_marker(pytest.mark.xdist_group(item.path.stem if room == "distributed" else room))


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
