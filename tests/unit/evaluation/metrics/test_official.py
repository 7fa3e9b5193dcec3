"""Every metric equals its official implementation on the same random predictions (`benchmarks.metrics`)."""

import random
import shutil

import pytest

from benchmarks import metrics

PACKAGES = {"captions": "pycocoevalcap", "squad": "torchmetrics", "anls": "anls_star", "detection": "pycocotools",
            "top_k": "torchmetrics"}  # fmt: skip


@pytest.mark.parametrize("name", metrics.COMPARISONS)
def test_equals_the_official_implementation(name: str) -> None:
    pytest.importorskip(PACKAGES[name])
    if name == "captions" and not shutil.which("java"):
        pytest.skip("no java: as root, `make tools`")
    rows = metrics.COMPARISONS[name](random.Random(1), 200)
    assert rows and all(row.difference < 1e-6 for row in rows), rows
