"""What a source holds is printed with its index: exact numbers by field and language, and the names not read."""

import json

from data import index
from tests.unit.data.conftest import png
from tests.unit.data.shards.test_source import write_tar


def test_the_command_prints_what_a_source_holds(tmp_path, capsys):
    """As img2dataset writes a table with a column of captions for each language; some texts and shards are broken."""
    codes = ["de", "pt_BR", None, "b/w", "", "iw", "he"]
    columns = [{"caption": f"a {n}", "LANGUAGE": code, "caption_fr": "un", "caption_de": None, "width": 9, "NSFW": 0.1}
               for n, code in enumerate(codes)]  # fmt: skip
    members = {f"{n}.json": json.dumps(one).encode() for n, one in enumerate(columns)} | {"0.jpg": png(0)}
    write_tar(tmp_path / "webli" / "00000.tar", members)
    (tmp_path / "webli" / "00001.tar").write_bytes(b"no tar")
    index.main([f"root={tmp_path}", "processes=1", "fields={webli: {language: LANGUAGE, captions: caption_*}}"])
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("webli train: 7 records in 2 shards, 1 of them broken (")
    assert lines == [
        "  alt_text: 6 records in 4 languages: en 2, iw 2, de 1, pt-br 1",
        "  captions: 7 records in 1 language: fr 7",
        "  malformed: alt_text 1",
        "  images: 1 records; 6 have none, or one whose size cannot be read",
        f"  {tmp_path}/webli/00001.tar: not a tar",
        "  names in the JSON that no field reads: NSFW",
    ]
    index.main([f"root={tmp_path}", "processes=1"])
    printed = capsys.readouterr().out
    assert "language: en 7 (en is the language of records without `language`)\n" in printed
    assert "no field reads: LANGUAGE, NSFW, caption_de, caption_fr\n" in printed
