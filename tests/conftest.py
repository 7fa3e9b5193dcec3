"""What a machine cannot test is said last, so that green does not hide it."""

from collections import Counter

import pytest


def pytest_unconfigure(config: pytest.Config) -> None:
    """Print why tests were skipped below the summary, as the last line of `make test`."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):  # a process of xdist's reports to the first one
        return
    reasons = Counter(_reason(report) for report in reporter.stats.get("skipped", []))
    if reasons:
        why = "; ".join(f"{number} x {reason}" for reason, number in reasons.most_common())
        reporter.write_line(f"NOT TESTED on this machine: {why}", red=True, bold=True)


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Give the reason of a skip without the file and the line that skipped."""
    where = report.longrepr
    return str(where[2] if isinstance(where, tuple) else where).removeprefix("Skipped: ")
