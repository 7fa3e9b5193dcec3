"""A table that is damaged within: what can be read is read, and the rest is counted."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from data.corpus.config import InputConfig
from data.corpus.inputs.tables import Tables
from data.corpus.row import Part


def test_a_damaged_row_group_is_counted_and_the_others_are_read(tmp_path: Path) -> None:
    path = tmp_path / "texts.parquet"
    table = pa.table({"caption": [f"a photograph of the old house, number {n}" for n in range(30)]})
    pq.write_table(table, path, row_group_size=10, compression="snappy", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start, size = column.data_page_offset, column.total_compressed_size
    content[start : start + size] = b"\xff" * size
    path.write_bytes(content)
    reader = Tables("web", InputConfig(path=str(path), format="table"), part_rows=100)
    (part,) = reader.parts()
    defects: Counter[str] = Counter()
    rows = list(reader.rows(part, defects))
    assert defects == {"damaged row group of a parquet file": 1}
    assert [row.cause for row in rows] == [None] * 10 + ["unreadable rows of a parquet file"] * 10 + [None] * 10
    assert rows[-1].fields["alt_text"] == "a photograph of the old house, number 29"


def test_row_groups_are_joined_to_parts_and_an_unreadable_file_is_one_part(tmp_path: Path) -> None:
    table = pa.table({"caption": [f"an old house, number {n}" for n in range(50)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    (tmp_path / "b.parquet").write_bytes(b"nothing of a parquet file")
    reader = Tables("web", InputConfig(path=str(tmp_path), format="table"), part_rows=15)
    first, second = (str(tmp_path / name) for name in ("a.parquet", "b.parquet"))
    ends = [(0, 2), (2, 4), (4, 5)]
    assert reader.parts() == [Part("web", first, *own) for own in ends] + [Part("web", second, 0, 0)]
    defects: Counter[str] = Counter()
    assert sum(len(list(reader.rows(part, defects))) for part in reader.parts()) == 50
    assert defects == {"unreadable parquet file": 1}
