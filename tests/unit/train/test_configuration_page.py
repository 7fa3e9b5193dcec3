"""docs/configuration.md is written from the docstrings of the settings."""

from pathlib import Path

import pytest

from train.configuration_page import PAGE, main, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m train.configuration_page"


def test_help_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "page.md"
    with pytest.raises(SystemExit) as end:
        main([f"output={output}", "--help"])
    assert not end.value.code and "File to write." in capsys.readouterr().out and not output.exists()
    main([f"output={output}"])
    assert output.read_text(encoding="utf-8") == page()
