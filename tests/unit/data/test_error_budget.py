"""What is broken counts in a window; what is written about it is bounded."""

import logging

import pytest

from data.error_budget import MOST_CAUSES, ErrorBudgetExceeded, Ledger


def read(ledger: Ledger, outcomes: str) -> None:
    """Count records: "." used, "s" skipped, "x" broken."""
    for outcome in outcomes:
        if outcome == "x":
            ledger.count_defect("webli", "a.tar", "broken JSON")
        elif outcome == "s":
            ledger.count_skip("webli", "ocr: no OCR text")
        else:
            ledger.count_used("webli")


def test_a_source_that_breaks_late_is_refused_as_early_as_one_that_breaks_at_once():
    ledger = Ledger(budget=0.1, minimum=2, window=50)
    read(ledger, "." * 10_000 + "xxxxx")
    with pytest.raises(ErrorBudgetExceeded, match=r"6 of 50 records read are broken \(6 x broken JSON\)"):
        read(ledger, "x")


def test_what_was_broken_long_ago_is_forgotten():
    ledger = Ledger(budget=0.1, minimum=2, window=50)
    for _ in range(20):
        read(ledger, "." * 45 + "xxxxx")
    assert ledger.account("webli").broken == 100 and ledger.account("webli").read == 1000


def test_skipped_records_are_whole_and_sources_are_apart():
    ledger = Ledger(budget=0.5, minimum=0, window=4)
    read(ledger, "sx")
    with pytest.raises(ErrorBudgetExceeded, match="source text"):
        ledger.count_defect("text", "b.tar", "broken JSON")
    with pytest.raises(ErrorBudgetExceeded, match="source webli"):
        read(ledger, "xx")


def test_shards_count_against_the_budget_but_are_no_records():
    ledger = Ledger(budget=0.4, minimum=0)
    ledger.count_shards("webli", 3, {"d.tar": "truncated tar", "e.tar": "truncated tar"})
    assert ledger.account("webli").read == 0 and ledger.drain() == {"webli/truncated tar": 2}
    with pytest.raises(ErrorBudgetExceeded, match=r"3 of 6 .*most are in shard [def]\.tar"):
        ledger.count_shards("webli", 0, {"f.tar": "truncated tar"})


def test_log_lines_and_causes_are_bounded(caplog):
    ledger = Ledger(budget=1.0, minimum=0, window=10)
    with caplog.at_level(logging.WARNING):
        for number in range(1234):
            ledger.count_defect("webli", f"{number}.tar", "broken JSON")
    logged = [line.getMessage() for line in caplog.records]
    assert logged[0] == "source webli: broken JSON in 0.tar; skipped and counted" and len(logged) == 4
    assert logged[3] == "source webli: broken JSON, 1,000 times so far, the last in 999.tar"
    for number in range(1000):
        ledger.count_skip("webli", f"ocr: no text in {number}")
    counted = ledger.drain()
    assert len(counted) == MOST_CAUSES + 1 and sum(counted.values()) == 2234
    assert ledger.account("webli").read == 2234
