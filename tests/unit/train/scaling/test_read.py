"""The report of a sweep, from run folders whose numbers are made up and whose settings are real."""

import csv
import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from common.errors import ConfigurationError
from model.costs import unit_costs
from model.describe import one_example, read_model
from model.pali import plan_on_meta
from train.config import to_yaml
from train.entry import CONF, register
from train.scaling_report import main
from train.settings.compose import to_run_config

SIZES = ("nano", "micro", "mini")
LOSSES = {("nano", "nano"): 2.0, ("nano", "micro"): 1.9, ("micro", "nano"): 1.7, ("micro", "micro"): 1.5}


def write_run(sweep: Path, vit: str, mt5: str, loss: float | None, *settings: str, steps: int = 4) -> Path:
    """A run of 4 steps that has done `steps`, 0.25 TFLOP each."""
    register()
    with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        overrides = [
            "experiment=study",
            "cell=scaling",
            f"vit={vit}",
            f"mt5={mt5}",
            "run.steps=4",
            "data.root=corpus",
            *settings,
        ]
        config = to_run_config(compose("pretrain", overrides=overrides))
    folder = sweep / ",".join([f"vit={vit}", f"mt5={mt5}", *settings])
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    lines = [{"step": step, "tflop": 0.25, "loss": 3.0} for step in range(1, steps + 1)]
    lines[-1]["validation/loss"] = loss  # type: ignore[assignment]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


def write_sweep(sweep: Path) -> Path:
    for (vit, mt5), loss in LOSSES.items():
        write_run(sweep, vit, mt5, loss)
    return sweep


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def parameters(vit: str, mt5: str) -> int:
    """By the cost formulas."""
    config, _ = read_model(["experiment=study", "cell=scaling", f"vit={vit}", f"mt5={mt5}"])
    return sum(unit.cost.parameters for unit in unit_costs(plan_on_meta(config).units(), one_example(config, 1, 1)))


def test_tables_and_figure(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep")
    main([f"folder={sweep}"])
    found = {(row["vit"], row["mt5"]): row for row in rows(sweep / "scaling.csv")}
    assert found.keys() == LOSSES.keys()
    for pair, row in found.items():
        assert int(row["parameters"]) == parameters(*pair)
        assert int(row["vit_parameters"]) + int(row["mt5_parameters"]) == int(row["parameters"])
        assert float(row["training_tflop"]) == 1.0
        assert float(row["validation/loss (nats per target token)"]) == LOSSES[pair]
    assert found["micro", "nano"]["vit_parameters"] == found["micro", "micro"]["vit_parameters"]
    gains = {
        (row["larger_tower"], row["from"], row["to"], row["beside"]): row for row in rows(sweep / "scaling_returns.csv")
    }
    assert {key: round(float(row["gain (nats per target token)"]), 6) for key, row in gains.items()} == {
        ("vit", "nano", "micro", "nano"): 0.3,
        ("vit", "nano", "micro", "micro"): 0.4,
        ("mt5", "nano", "micro", "nano"): 0.1,
        ("mt5", "nano", "micro", "micro"): 0.2,
    }
    added = parameters("micro", "nano") - parameters("nano", "nano")
    first = gains["vit", "nano", "micro", "nano"]
    assert int(first["added_parameters"]) == added
    per_million = float(first["gain_per_million_parameters (nats per target token)"])
    assert per_million == pytest.approx(0.3 / added * 1e6, rel=1e-5)
    with Image.open(sweep / "scaling.png") as image:
        assert image.width > 1000 and len(image.convert("RGB").getcolors(1 << 20) or []) > 50


def test_runs_that_cannot_be_compared_are_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = write_sweep(tmp_path / "sweep")
    write_run(sweep, "mini", "nano", 1.0, steps=3)
    write_run(sweep, "mini", "micro", None)
    (write_run(sweep, "mini", "mini", 1.0) / "metrics.jsonl").write_text('{"step": 4, "tfl', encoding="utf-8")
    (write_run(sweep, "nano", "mini", 1.0) / "config.yaml").write_text("run: [", encoding="utf-8")
    (sweep / "empty").mkdir()
    main([f"folder={sweep}", f"output={tmp_path / 'figures' / 'joint'}"])
    assert len(rows(tmp_path / "figures" / "joint.csv")) == 4
    printed = capsys.readouterr().err
    assert "vit=mini,mt5=nano: it is at step 3 of 4" in printed
    assert "vit=mini,mt5=micro: validation/loss is not in the last line of its metrics.jsonl" in printed
    assert "vit=mini,mt5=mini: its metrics.jsonl cannot be read" in printed
    assert "vit=nano,mt5=mini: its config.yaml cannot be read" in printed
    assert "empty: it has no config.yaml" in printed
    assert printed.count("left out") == 5


def test_scores_of_an_evaluation_rise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = write_sweep(tmp_path / "sweep")
    for (vit, mt5), loss in list(LOSSES.items())[:3]:
        scores = {"objectives": {"vqa": {"exact_match": {"score": (3 - loss) / 10, "blind": None}}}}
        (sweep / f"vit={vit},mt5={mt5}" / "evaluation.json").write_text(json.dumps(scores), encoding="utf-8")
    main([f"folder={sweep}", "score=evaluation/vqa/exact_match"])
    found = {
        (r["vit"], r["mt5"]): float(r["evaluation/vqa/exact_match (percent)"]) for r in rows(sweep / "scaling.csv")
    }
    assert found == {("nano", "nano"): 10.0, ("nano", "micro"): 11.0, ("micro", "nano"): 13.0}
    assert {r["larger_tower"]: float(r["gain (percent)"]) for r in rows(sweep / "scaling_returns.csv")} == {
        "vit": 3.0,
        "mt5": 1.0,
    }
    assert "vit=micro,mt5=micro: it has no evaluation.json" in capsys.readouterr().err


def test_seeds_are_averaged_and_other_differences_refused(tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep")
    write_run(sweep, "nano", "nano", 2.2, "run.seed=1")
    main([f"folder={sweep}"])
    first = rows(sweep / "scaling.csv")[0]
    assert (first["vit"], first["mt5"], first["runs"]) == ("nano", "nano", "2")
    assert float(first["validation/loss (nats per target token)"]) == pytest.approx(2.1)
    write_run(sweep, "mini", "mini", 1.0, "schedule.peak=0.5")
    with pytest.raises(ConfigurationError, match=r"differ in schedule\.peak, not only in towers and seed"):
        main([f"folder={sweep}"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "folder is not given"),
        (["folder=nowhere"], "folder=nowhere is not a folder"),
        (["folder=."], "holds 0 finished runs"),
        (["folder=.", "scores=x"], "scores is not an option; known here: folder, score, output."),
        (["folder=.", "score=accuracy"], "score=accuracy is unknown; give validation/loss"),
        (["folder"], "'folder' is not of the form key=value"),
    ],
)
def test_mistakes(arguments: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError) as error:
        main(arguments)
    assert sentence in str(error.value)
