"""Write the page of a study: tables beside the paper's numbers, figures, and one HTML file.

    python -m train.study_report folder=runs/study
    python -m train.study_report folder=runs/study page=docs/study.md
    python -m train.study_report folder=runs/study_full seeds=3 full=true

`page` is a Markdown file of one's own words; its tables, between `<!-- table: NAME -->` and `<!-- end -->`, are written
anew. Runs that are not done are named as missing.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from common.command_line import parse as arguments_of
from common.errors import ConfigurationError
from common.files import write_text, writes
from common.terminal import use_utf8
from common.values import PATH
from train.entry import in_one_sentence
from train.scaling.figure import draw
from train.scaling.read import Score, read_sweep, returns
from train.studies.figures import draw_objectives, draw_towers
from train.studies.page import empty_page, filled, to_html
from train.studies.plan import StudyOptions
from train.studies.read import SCORES, Results
from train.studies.tables import TABLES


@dataclass
class Options(StudyOptions):
    """Write the page of a study: tables beside the paper's numbers, figures, and one HTML file."""

    page: str | None = field(default=None, metadata=PATH)
    """Markdown file to fill; its figures are written beside it. Null by default: <folder>/study.md, made if missing."""


def main(arguments: Sequence[str]) -> None:
    """Write tables, figures and report.html. Raises ConfigurationError."""
    options = arguments_of(arguments, Options)
    folder = Path(options.folder)
    if not folder.is_dir():
        raise ConfigurationError(f"folder={folder} is not a folder; name that of a study, such as runs/study.")
    results = Results(options.read())
    page = Path(options.page) if options.page else folder / "study.md"
    tables = {name: make(results) for name, make in TABLES.items()}
    with writes(f"page={page}"):
        page.parent.mkdir(parents=True, exist_ok=True)
        text = filled(page.read_text(encoding="utf-8") if page.is_file() else empty_page(tables), tables)
        write_text(page, text)
        draw_towers(results, page.with_name("study_towers.png"))
        draw_objectives(results, page.with_name("study_objectives.png"))
        draw_scaling(folder / "scaling", page.with_name("study_scaling.png"))
        write_text(folder / "report.html", to_html(text, page.parent))
    missing = results.missing()
    print(f"{page}, {folder / 'report.html'}; {len(missing)} runs are missing.")
    for name in missing:
        print(f"missing: {name}", file=sys.stderr)


def draw_scaling(folder: Path, path: Path) -> None:
    """Draw the joint-scaling figure by VQA, where two runs or more have a score."""
    score = Score(f"evaluation/vqa/{SCORES['vqa']}")
    try:
        runs, _ = read_sweep(folder, score)
    except ConfigurationError as error:
        print(f"no figure of scaling: {error}", file=sys.stderr)
        return
    draw(runs, returns(runs, score.lower_is_better), score, path)


if __name__ == "__main__":
    use_utf8()
    in_one_sentence(lambda: main(sys.argv[1:]))
