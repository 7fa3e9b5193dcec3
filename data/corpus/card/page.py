"""Write the data card of a corpus: `card.json` and `card.html`, one page without links."""

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import RunStopped
from common.files import write_text
from data.corpus.card import figures
from data.corpus.card.counts import Counts
from data.corpus.stages.plan import Plan, settings

PAGE = Path(__file__).with_name("card.html")
TEXTS = {
    "alt_text": "Alt-texts by language",
    "captions": "Captions by language",
    "ocr": "Texts in images by language",
    "questions": "Questions by language",
    "text": "Documents by language",
}


def write_card(plan: Plan, sources: Mapping[str, Counts], num_shards: int) -> None:
    """Write the card. Raises RunStopped where counts do not add up to the rows that came in."""
    total = Counts()
    for own in sources.values():
        total.add(own)
        if own.rows != own.kept + own.dropped.total():
            raise RunStopped(f"{plan.folder}: counts do not add up ({own.rows} rows); report this as a fault.")
    content = {
        "shards": num_shards,
        "total": total.plain(),
        "sources": {name: own.plain() for name, own in sorted(sources.items())},
        "settings": settings(plan.config),
    }
    write_text(plan.folder / "card.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n", durable=True)
    write_text(plan.folder / "card.html", page(plan.folder.name, content, total, sources), durable=True)


def page(name: str, content: Mapping[str, Any], total: Counts, sources: Mapping[str, Counts]) -> str:
    """Return the page."""
    parts = {
        "NAME": html.escape(name),
        "SUMMARY": _summary(total, content["shards"]),
        "SOURCES": _table(
            ("source", "rows that came in", "kept", "share"),
            [(one, own.rows, own.kept, _share(own.kept, own.rows)) for one, own in sorted(sources.items())],
        ),
        "CAUSES": _causes(total, sources),
        "NOTES": _table(("counted", "times"), [*total.notes.most_common(), *total.defects.most_common()]),
        "FIGURES": "\n".join(_figures(total)),
        "SETTINGS": html.escape(json.dumps(content["settings"], indent=1, ensure_ascii=False)),
    }
    text = PAGE.read_text(encoding="utf-8")
    for key, value in parts.items():
        text = text.replace(f"<!--{key}-->", value)
    return text


def _summary(total: Counts, num_shards: int) -> str:
    codes = {code for own in total.languages.values() for code in own}
    return (
        f"{total.kept:,} of {total.rows:,} rows ({_share(total.kept, total.rows)}) in {num_shards:,} shards, with "
        f"texts in {len(codes):,} languages."
    )


def _causes(total: Counts, sources: Mapping[str, Counts]) -> str:
    names = sorted(sources)
    rows = [
        (cause, *(sources[name].dropped[cause] for name in names), number, _share(number, total.rows))
        for cause, number in sorted(total.dropped.items(), key=lambda each: (-each[1], each[0]))
    ]
    kept = ("kept", *(sources[name].kept for name in names), total.kept, _share(total.kept, total.rows))
    came = ("rows that came in", *(sources[name].rows for name in names), total.rows, _share(total.rows, total.rows))
    return _table(("removed because of", *names, "all", "share"), [*rows, kept, came])


def _figures(total: Counts) -> Iterable[str]:
    for name, title in TEXTS.items():
        if own := total.languages.get(name):
            yield _image(title, figures.bars(title, _largest(own)))
    for name, (title, *_) in figures.HISTOGRAMS.items():
        if bins := total.histograms.get(name):
            yield _image(title, figures.histogram(name, bins))
    if total.labels:
        yield _image("Labels of objects", figures.bars("Labels of objects", _largest(total.labels)))


def _largest(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda each: (-each[1], each[0]))


def _image(title: str, content: bytes) -> str:
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["<table><tr>" + "".join(f"<th>{html.escape(each)}</th>" for each in head) + "</tr>"]
    for row in rows:
        cells = (
            f'<td class="number">{each:,}</td>' if isinstance(each, int) else f"<td>{html.escape(str(each))}</td>"
            for each in row
        )
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "\n".join([*lines, "</table>"])


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"
