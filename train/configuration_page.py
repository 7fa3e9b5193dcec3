"""Write docs/configuration.md from the docstrings of the settings.

python -m train.configuration_page
python -m train.configuration_page output=/tmp/configuration.md
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from common.command_line import CONF, parse, run_command
from common.errors import ConfigurationError
from common.field_docs import field_docs, shown_default
from common.files import write_text
from common.limits import Check, allowed
from common.values import PATH
from data import digest, index, labels, objectives, overlap, show, tokenizer
from data.config import DataConfig
from data.corpus.config import BuildConfig
from data.miniature.config import MiniatureConfig
from data.tasks.config import TaskConfig
from model.describe import DescribeConfig
from slurm.cluster import SubmitConfig
from train import average, export, plan, scaling_report, study, study_report
from train.config import Phase, RunConfig

# Commands with options of their own, beside the groups that some of them read.
COMMANDS: Mapping[str, Any] = {
    "data.corpus.build": BuildConfig(),
    "data.digest": digest.DigestConfig(),
    "data.index": index.Options(),
    "data.labels": labels.Options(),
    "data.miniature": MiniatureConfig(),
    "data.overlap": overlap.OverlapConfig(),
    "data.show": show.ShowConfig(),
    "data.tokenizer": tokenizer.Options(),
    "model.describe": DescribeConfig(),
    "train.average": average.Options(),
    "train.export": export.Options(),
    "train.plan": plan.PlanOptions(nodes=1),
    "train.scaling_report": scaling_report.Options(),
    "train.study": study.Options(),
    "train.study_report": study_report.Options(),
}
# Checks beside `__post_init__`, of settings that come from several files.
CHECKS: Mapping[type, Check] = {
    DataConfig: DataConfig.check,
    MiniatureConfig: MiniatureConfig.check,
    Phase: lambda phase: phase.check(""),
}
COLUMNS = " | default | allowed | meaning |\n|---|---|---|---|\n"
PAGE = CONF.parent / "docs" / "configuration.md"
HEAD = """# Configuration

`python -m train.configuration_page` writes this page from the docstrings of the settings; edit those.

A command line is `key=value` arguments. A group takes the name of one of its files (`model=pali_3b`), a key below it
any value (`parallel.micro_batch_size=4`), an experiment sets many keys at once (`experiment=paper_3b`). Mixtures and
phases are mappings by name: `mixture.ocr.weight=0` or `~mixture.ocr` leaves a component out,
`mixture.mine={source: photos, objective: captioning, weight: 10}` adds one, and `phases.full_588.micro_batch_size=2`
changes one phase. A mistake ends the command with exit code 2 and one sentence.

"Allowed" are the values that the setting's own check accepts; empty: all of its type.
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
    run = plan.read_config([])
    parts = [HEAD, *_sections(RunConfig, run), *_options(), *_sections(SubmitConfig, SubmitConfig()), *_commands()]
    return "\n".join(parts)


def _sections(kind: Any, settings: Any) -> Iterator[str]:
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
        yield "| key" + COLUMNS + "\n".join(_rows(entry, prefix, _one(getattr(settings, field.name)))) + "\n"


def _one(settings: Any) -> Any:
    """Return the settings themselves, or the first of a mapping by name; None where there are none."""
    return next(iter(settings.values()), None) if isinstance(settings, dict) else settings


def _rows(kind: Any, prefix: str, settings: Any) -> Iterator[str]:
    """Yield a row for each field of a dataclass; `settings` are an example of it, for trying values."""
    hints, docs = get_type_hints(kind), field_docs(kind)
    for field in fields(kind):
        inner = hints[field.name]
        entry = get_args(inner)[-1] if get_origin(inner) is dict else inner
        if is_dataclass(entry) and entry is not TaskConfig:  # `data.tasks` has the options of the section `task`
            own = _one(getattr(settings, field.name, None)) or _example(entry)
            yield from _rows(
                entry, f"{prefix}{field.name}." if entry is inner else f"{prefix}{field.name}.<name>.", own
            )
        elif field.name in docs:
            default, meaning = (text.replace("|", "\\|") for text in (shown_default(field), docs[field.name]))
            values = "" if settings is None else allowed(settings, field.name, CHECKS.get(kind, _nothing))
            yield f"| `{prefix}{field.name}` | {f'`{default}`' if default else 'empty'} | {values} | {meaning} |"


def _nothing(settings: Any) -> None:
    """Check nothing more than `__post_init__` does."""


def _example(kind: Any) -> Any:
    with suppress(TypeError, ConfigurationError):  # settings that have no default
        return kind()
    return None


def _options() -> Iterator[str]:
    yield "## Options of the objectives\n\nAs `mixture.<name>.options.<option>`.\n"
    for name in objectives.NAMES:
        kind = objectives.load(name).Options
        yield f"### {name}\n\n| option" + COLUMNS + "\n".join(_rows(kind, "", _example(kind))) + "\n"


def _commands() -> Iterator[str]:
    yield "## Options of other commands\n\nAs `python -m <command> <option>=<value>`.\n"
    for name, options in COMMANDS.items():
        yield f"### {name}\n\n| option" + COLUMNS + "\n".join(_rows(type(options), "", options)) + "\n"


def _first_comment(file: Path) -> str:
    lines = file.read_text(encoding="utf-8").splitlines()
    comments = [line.lstrip("# ") for line in lines if line.startswith("#") and "@package" not in line]
    return comments[0] if comments else ""


if __name__ == "__main__":
    run_command(main)
