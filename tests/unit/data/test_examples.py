"""An example's origin states what is not known yet by numbers that no place has."""

from data.examples import ExampleInfo


def test_an_example_outside_of_rows_has_no_place() -> None:
    info = ExampleInfo("webli", "ocr", "key", "shard", "en", "in", "out")
    assert (info.step, info.row, info.index, info.segment) == (-1, -1, -1, 0)
