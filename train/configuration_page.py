"""Write docs/configuration.md from the docstrings of the settings.

python -m train.configuration_page
python -m train.configuration_page output=/tmp/configuration.md
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from common.command_line import CONF, parse, run_command
from common.field_docs import field_docs, shown_default
from common.files import write_text
from common.values import PATH
from data import digest, index, labels, objectives, overlap, show, tokenizer
from data.corpus.config import BuildConfig
from data.miniature.config import MiniatureConfig
from data.tasks.config import TaskConfig
from model.describe import DescribeConfig
from slurm.cluster import SubmitConfig
from train import average, export, plan, scaling_report
from train.config import Phase, RunConfig

# Commands with options of their own, beside the groups that some of them read.
COMMANDS: Mapping[str, Any] = {
    "data.corpus.build": BuildConfig,
    "data.digest": digest.DigestConfig,
    "data.index": index.Options,
    "data.labels": labels.Options,
    "data.miniature": MiniatureConfig,
    "data.overlap": overlap.OverlapConfig,
    "data.show": show.ShowConfig,
    "data.tokenizer": tokenizer.Options,
    "model.describe": DescribeConfig,
    "train.average": average.Options,
    "train.export": export.Options,
    "train.plan": plan.PlanOptions,
    "train.scaling_report": scaling_report.Options,
}
PAGE = CONF.parent / "docs" / "configuration.md"
HEAD = """# Configuration

`python -m train.configuration_page` writes this page from the docstrings of the settings; edit those.

A command line is `key=value` arguments. A group takes the name of one of its files (`model=pali_3b`), a key below it
any value (`parallel.micro_batch_size=4`), an experiment sets many keys at once (`experiment=paper_3b`). Mixtures and
phases are mappings by name: `mixture.ocr.weight=0` or `~mixture.ocr` leaves a component out,
`mixture.mine={source: photos, objective: captioning, weight: 10}` adds one, and `phases.full_588.micro_batch_size=2`
changes one phase. A mistake ends the command with exit code 2 and one sentence.
"""


@dataclass
class Options:
    """Options of this command."""

    output: str = dataclasses.field(default=str(PAGE), metadata=PATH)
    """File to write. By default the page of this checkout."""


def main(words: Sequence[str]) -> None:
    """Write the page."""
    write_text(Path(parse(words, Options).output), page())


def page() -> str:
    """Return the text of the page."""
    parts = [HEAD, *_sections(RunConfig), *_options(), *_sections(SubmitConfig), *_commands()]
    return "\n".join(parts)


def _sections(kind: Any) -> Iterator[str]:
    hints, docs = get_type_hints(kind), field_docs(kind)
    for field in fields(kind):
        inner = hints[field.name]
        entry = get_args(inner)[-1] if get_origin(inner) is dict else inner
        yield f"## {field.name}\n\n{docs[field.name]}\n"
        if files := sorted((CONF / field.name).glob("*.yaml")):
            yield "\n".join(f"- `{field.name}={file.stem}`: {_first_comment(file)}" for file in files) + "\n"
        prefix = f"{field.name}." if entry is inner else f"{field.name}.<name>."
        if entry is Phase:
            yield f"{(Phase.__doc__ or '').partition(chr(10) * 2)[2].replace(chr(10) + '    ', chr(10)).strip()}\n"
        yield "| key | default | meaning |\n|---|---|---|\n" + "\n".join(_rows(entry, prefix)) + "\n"


def _rows(kind: Any, prefix: str) -> Iterator[str]:
    hints, docs = get_type_hints(kind), field_docs(kind)
    for field in fields(kind):
        inner = hints[field.name]
        entry = get_args(inner)[-1] if get_origin(inner) is dict else inner
        if is_dataclass(entry) and entry is not TaskConfig:  # `data.tasks` has the options of the section `task`
            yield from _rows(entry, f"{prefix}{field.name}." if entry is inner else f"{prefix}{field.name}.<name>.")
        elif field.name in docs:
            default, meaning = (text.replace("|", "\\|") for text in (shown_default(field), docs[field.name]))
            yield f"| `{prefix}{field.name}` | {f'`{default}`' if default else 'empty'} | {meaning} |"


def _options() -> Iterator[str]:
    yield "## Options of the objectives\n\nAs `mixture.<name>.options.<option>`.\n"
    for name in objectives.NAMES:
        rows = "\n".join(_rows(objectives.load(name).Options, ""))
        yield f"### {name}\n\n| option | default | meaning |\n|---|---|---|\n{rows}\n"


def _commands() -> Iterator[str]:
    yield "## Options of other commands\n\nAs `python -m <command> <option>=<value>`.\n"
    for name, kind in COMMANDS.items():
        yield f"### {name}\n\n| option | default | meaning |\n|---|---|---|\n" + "\n".join(_rows(kind, "")) + "\n"


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    comments = [line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line]
    return comments[0] if comments else ""


if __name__ == "__main__":
    run_command(main)
