"""`--help` of each command shows a sentence, three examples, and its settings with their docstrings."""

import sys
from importlib import import_module

import pytest

from train.entry import entry

COMMANDS = {
    "train.pretrain": "parallel.micro_batch_size=8",
    "train.pretrain_vit": "classifier.bias=-10.0",
    "train.evaluate": "evaluation.examples=512",
    "train.submit": "submit.data_parallel=1",
    "train.scaling_report": "score=validation/loss",
    "train.study": "study=miniature",
    "train.study_report": "page=null",
    "data.digest": "steps=1:2",
    "data.show": "rows=3",
    "data.tokenizer": "vocab_size=4096",
    "data.labels": "most=30000",
    "data.miniature": "scale=1.0",
    "model.describe": "input_tokens=32",
}


@pytest.mark.parametrize(("module", "setting"), COMMANDS.items())
def test_help(module: str, setting: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    command = import_module(f"{module}.__main__" if module == "data.miniature" else module)
    try:
        if hasattr(command, "READS") and module.startswith("train."):
            entry("pretrain", command.main, command.READS)
        else:
            command.main(["--help"])
    except SystemExit as end:
        assert not end.code
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].endswith(".") and f"\n{setting}\n    " in shown
    assert sum(f"-m {module} " in line for line in shown.splitlines()) >= 3
