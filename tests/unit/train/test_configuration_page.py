"""docs/configuration.md is written from the docstrings of the settings."""

from train.configuration_page import PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m train.configuration_page"
