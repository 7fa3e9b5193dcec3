"""The page of a study, from evaluations whose numbers are made up."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigurationError
from train.studies.page import filled, to_html
from train.studies.plan import read_study
from train.studies.read import SCORES, Measured, Results, curve, difference
from train.studies.tables import TABLES
from train.study_report import main


def scores(value: float, blind: float | None = 0.1) -> dict[str, Any]:
    return {"score": value, "blind": blind, "low": value - 0.04, "high": value + 0.02}


def write(folder: Path, steps: int, value: float, **others: float) -> None:
    """Write an evaluation whose scores are `value`, but those of `others`; in English half a point in ten more."""
    objectives = {}
    for objective, name in SCORES.items():
        own = others.get(objective, value)
        languages = {"en": {"examples": 30, name: scores(own + 0.05)}, "de": {"examples": 10, name: scores(own - 0.15)}}
        objectives[objective] = {"examples": 40, name: scores(own), "languages": languages}
    folder.mkdir(parents=True)
    content = {"step": steps, "objectives": objectives}
    (folder / "evaluation.json").write_text(json.dumps(content), encoding="utf-8")


def study(folder: Path, seeds: int = 1) -> Results:
    return Results(read_study("miniature", folder, seeds))


def write_cells(folder: Path, seed: int = 0, value: float = 0.5) -> None:
    cells = folder / "cells"
    write(cells / f"cell-full,run.seed-{seed}", 700, value)
    write(cells / f"cell-scratch,run.seed-{seed}", 700, value - 0.2)
    write(cells / f"cell-without_ocr,run.seed-{seed}", 700, value + 0.01, ocr=0.0)
    write(cells / f"cell-english,run.seed-{seed}", 700, value)


def test_one_seed_has_the_interval_of_its_examples(tmp_path: Path) -> None:
    write_cells(tmp_path)
    results = study(tmp_path)
    full, scratch = results.cell("vqa", "full"), results.cell("vqa", "scratch")
    assert full and scratch
    assert full.text() == "50.0 ± 3.0" and full.blind == pytest.approx(10) and full.examples == 40
    found = difference(scratch, full)
    assert (found.mean, found.low, found.high) == pytest.approx((-20, -20 - math.hypot(3, 3), -20 + math.hypot(3, 3)))
    assert found.text() == "**-20.0**"
    other = results.cell("vqa", "without_ocr")
    assert other and difference(other, full).text() == "+1.0"
    assert results.cell("vqa", "vit_trained") is None
    assert "vit_trained" in " ".join(results.missing()) and "cell-full" not in " ".join(results.missing())


def test_several_seeds_have_their_spread(tmp_path: Path) -> None:
    write_cells(tmp_path)
    write_cells(tmp_path, seed=1, value=0.6)
    results = study(tmp_path, seeds=2)
    full, other = results.cell("vqa", "full"), results.cell("vqa", "without_ocr")
    assert full and other
    assert full.text() == "55.0 (50.0 to 60.0)"
    assert difference(other, full).text() == "**+1.0**"  # the same in both seeds
    mixed = Measured((49.0, 62.0), 3.0, None, 40)
    assert difference(mixed, full).text() == "+0.5"


def test_languages_are_weighted_by_their_examples(tmp_path: Path) -> None:
    write_cells(tmp_path)
    results = study(tmp_path)
    both = results.cell("captioning", "english", lambda code: True)
    assert both and both.mean == pytest.approx((55 * 30 + 35 * 10) / 40) and both.examples == 40
    assert both.half == pytest.approx(math.hypot(0.75 * 3, 0.25 * 3))
    others = results.cell("captioning", "english", lambda code: code != "en")
    assert others and others.text() == "35.0 ± 3.0"
    assert results.cell("captioning", "english", lambda code: code == "fr") is None


def test_an_earlier_evaluation_of_a_run_that_goes_on_does_not_count(tmp_path: Path) -> None:
    write(tmp_path / "cells" / "cell-full,run.seed-0", 699, 0.5)
    assert study(tmp_path).cell("vqa", "full") is None


def test_the_page_keeps_its_words_and_has_tables_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, page = tmp_path / "study", tmp_path / "page.md"
    write_cells(folder)
    lines = [json.dumps({"step": step, "accuracy/vqa": step / 4 if step > 1 else None}) for step in (1, 2, 3, 4)]
    (folder / "cells" / "cell-full,run.seed-0" / "metrics.jsonl").write_text("\n".join(lines) + "\n{", encoding="utf-8")
    assert curve(folder / "cells" / "cell-full,run.seed-0", "accuracy/vqa", 2) == ([2, 3, 4], [0.5, 0.625, 0.875])
    page.write_text(
        "# Mine\n\nOld & <b>words</b>.\n\n<!-- table: objectives -->\nstale\n<!-- end -->\n\n![A](study_towers.png)\n",
        encoding="utf-8",
    )
    main([f"folder={folder}", f"page={page}"])
    written = page.read_text(encoding="utf-8")
    assert "Old & <b>words</b>." in written and "stale" not in written
    row = next(line for line in written.splitlines() if line.startswith("| without ocr"))
    assert row.split(" | ")[1:3] == ["+1.0", "**-50.0**"] and "95.4 / 43.6" in row
    report = (folder / "report.html").read_text(encoding="utf-8")
    assert "<td>without ocr</td>" in report and "data:image/png;base64," in report and "&lt;b&gt;" in report
    printed = capsys.readouterr()
    assert "runs are missing" in printed.out and "no figure of scaling" in printed.err
    main([f"folder={folder}"])
    assert all(f"<!-- table: {name} -->" in (folder / "study.md").read_text(encoding="utf-8") for name in TABLES)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"folder=.*nowhere is not a folder"):
        main([f"folder={tmp_path}/nowhere"])
    with pytest.raises(ConfigurationError, match="asks for the table moon, which is none of state"):
        filled("<!-- table: moon -->\n<!-- end -->", TABLES)  # type: ignore[arg-type]
    assert 'src="missing.png"' in to_html("![x](missing.png)", tmp_path)
