"""The main rank shows a table on a terminal, and lines with units elsewhere; other ranks show nothing."""

import io

import pytest
from rich.console import Console

from train.run.display import Display, LiveTable, Plain, open_display
from train.run.metrics_file import Line


def line(step: int, **changes: object) -> Line:
    values = {"loss": 2.5, "grad_norm": 1.25, "lr": 1e-3, "examples_per_s": 80.0, "tokens_per_s": 9000.0, "mfu": None,
              "tflops_per_device": 0.03, "padding_fraction": 0.25, "data_wait_s": 0.002, "memory_gib": 0.5,
              "loss/vqa": 1.5, "accuracy/vqa": 0.5}  # fmt: skip
    return {"step": step, **values, **changes}


def test_lines_have_units_and_are_rare_after_the_first_steps() -> None:
    out = io.StringIO()
    display = Plain("run", 100, Console(file=out, width=80))
    for step in range(1, 8):
        display.step(line(step))
    display.step(line(100, **{"validation/loss": 2.0, "mfu": 0.4}))
    lines = out.getvalue().splitlines()
    assert [text.split(" | ")[0] for text in lines] == ["step 1/100", "step 2/100", "step 3/100", "step 100/100"]
    assert "loss 2.5000 nats" in lines[0] and "data wait 2 ms" in lines[0] and "80.0 examples/s" in lines[0]
    assert "validation loss 2.0000 nats" in lines[-1] and "40.0 % of peak" in lines[-1] and "left 0:00:00" in lines[-1]


def test_a_skipped_step_is_always_shown() -> None:
    out = io.StringIO()
    display = Plain("run", 100, Console(file=out, width=80))
    for step in range(1, 7):
        display.step(line(step, grad_norm=None if step == 6 else 1.0))
    assert "step 6/100" in out.getvalue() and "gradient norm skipped" in out.getvalue()


def test_a_step_without_targets_is_shown_at_the_usual_pace() -> None:
    out = io.StringIO()
    display = Plain("run", 100, Console(file=out, width=80))
    for step in range(1, 7):
        display.step(
            line(step, loss=None, grad_norm=None, empty_steps=step, **{"validation/loss": None} if step == 3 else {})
        )
    lines = out.getvalue().splitlines()
    assert len(lines) == 3 and "loss none | gradient norm skipped" in lines[0] and "validation loss none" in lines[2]


def test_skipped_records_are_summed_and_their_causes_named() -> None:
    out = io.StringIO()
    display = Plain("run", 100, Console(file=out, width=80))
    display.step(line(1))
    for step in (2, 3):
        display.step(line(step, **{"skipped/webli/ocr: no OCR text": 600, "skipped/webli/empty caption": 2,
                                   "skipped/a/b": 1, "skipped/c/d": 1, "skipped/e/f": step - 2}))  # fmt: skip
    lines = out.getvalue().splitlines()
    assert "skipped records" not in lines[0]
    assert (
        "skipped records 1,209 (1,200 x webli/ocr: no OCR text, 4 x webli/empty caption, 2 x a/b, 2 more causes)"
        in (lines[2])
    )


SHARES = {"share_asked/a/ocr": 0.2, "share/a/ocr": 0.1, "share_asked/a/vqa": 0.8, "share/a/vqa": 0.9}


def test_components_far_from_their_share_are_named() -> None:
    out = io.StringIO()
    display = Plain("run", 100, Console(file=out, width=80))
    display.step(line(1, **SHARES))
    display.step(line(2, **SHARES | {"share/a/ocr": 0.199, "share/a/vqa": 0.801}))
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("shares a/ocr 10.0 % of 20.0 % asked, a/vqa 90.0 % of 80.0 % asked")
    assert lines[1].endswith("shares as asked")


def test_the_table_shows_shares() -> None:
    out = io.StringIO()
    display = LiveTable("my run", 10, Console(file=out, force_terminal=True, width=100))
    display.step(line(1, **SHARES | {"share/a/vqa": None}))
    display.close()
    assert "share 10.0 % of 20.0 % asked" in out.getvalue() and "share none of 80.0 % asked" in out.getvalue()


def test_the_table_shows_objectives() -> None:
    out = io.StringIO()
    display = LiveTable("my run", 10, Console(file=out, force_terminal=True, width=100))
    display.step(line(1))
    display.note("a note")
    display.close()
    shown = out.getvalue()
    assert "my run" in shown and "50.0 % of tokens right" in shown and "a note" in shown


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    display = open_display("run", 10, rank=1)
    display.step(line(1))
    display.note("x")
    display.close()
    assert type(display) is Display and capsys.readouterr().out == ""
