"""Fill the tables of a study into its page, and write the page as one HTML file without links."""

import base64
import re
from collections.abc import Mapping
from pathlib import Path

from markdown_it import MarkdownIt

from common.errors import ConfigurationError

TABLE = re.compile(r"(<!-- table: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.S)
IMAGE = re.compile(r'src="(?!data:)([^"]+\.png)"')
HTML = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Study</title>
<style>
  body {{ font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1100px; padding: 1.5rem; color: #1b1b1f; }}
  table {{ border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto; font-size: 13px; }}
  td, th {{ border-bottom: 1px solid #ddd; padding: .25rem .7rem .25rem 0; text-align: left; vertical-align: top; }}
  img {{ max-width: 100%; }} pre {{ background: #f5f5f5; padding: .75rem; overflow-x: auto; }}
</style>
{body}
</html>
"""


def empty_page(tables: Mapping[str, str]) -> str:
    """Return a page that has a heading and a place for each table."""
    parts = ["# Study"]
    for name in tables:
        parts.append(f"## {name.replace('_', ' ').capitalize()}\n\n<!-- table: {name} -->\n<!-- end -->")
    return "\n\n".join(parts) + "\n"


def filled(page: str, tables: Mapping[str, str]) -> str:
    """Return the page with each table between its marks. Raises ConfigurationError for a mark without a table."""

    def replaced(found: re.Match[str]) -> str:
        if found["name"] not in tables:
            raise ConfigurationError(
                f"The page asks for the table {found['name']}, which is none of {', '.join(tables)}; correct its mark."
            )
        return f"{found[1]}\n{tables[found['name']]}\n\n{found[3]}"

    return TABLE.sub(replaced, page)


def to_html(page: str, folder: Path) -> str:
    """Return the page as HTML, with the images that lie in `folder` inside."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(re.sub(r"<!--.*?-->", "", page))

    def embedded(found: re.Match[str]) -> str:
        file = folder / found[1]
        if not file.is_file():
            return found[0]
        return f'src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"'

    return HTML.format(body=IMAGE.sub(embedded, body))
