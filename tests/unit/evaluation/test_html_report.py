"""report.html shows its entries, and filters them, in a browser without a network."""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from evaluation.html_report import Entry, data_url, write_report

ENTRIES = [
    Entry(
        "vqav2", "1", "en", "What color?", ["red"], "red", 1.0, True, "blue", data_url(np.zeros((8, 8, 3), np.uint8))
    ),
    Entry("vqav2", "2", "de", "Welche Farbe?", ["rot"], "<b>blau</b></script>", 0.0, False),
    Entry("coco", "3", "de", "Beschreibe", ["ein \ud83d"], "ein Hund", None, False),
]


def write(folder: Path) -> Path:
    path = folder / "report.html"
    write_report(path, "step 7", {"cider": 1.25, "examples": 3}, ENTRIES)
    return path


def test_the_page_is_one_file_without_links(tmp_path: Path) -> None:
    page = write(tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"']", page) and "http" not in page
    assert page.count("</script>") == 3  # the prediction's does not count


@pytest.mark.parametrize(
    "filters, ids",
    [
        ("", ["1", "2", "3"]),
        ("#task=vqav2", ["1", "2"]),
        ("#language=de&right=false", ["2", "3"]),
        ("#right=true", ["1"]),
    ],
)
def test_a_browser_shows_and_filters(tmp_path: Path, filters: str, ids: list[str]) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        pytest.skip("no chromium: as root, `make tools`")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile",
               "--dump-dom", f"file://{write(tmp_path)}{filters}"]  # fmt: skip
    shown = subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()
    main = shown.partition("<main>")[2].partition("</main>")[0]
    assert re.findall(r"· (\d)(?: · [\d.]+)?</p>", main) == ids
    assert f"{len(ids)} of 3" in shown and "1.2500" in shown
    if "2" in ids:
        assert "&lt;b&gt;blau&lt;/b&gt;&lt;/script&gt;" in main
