"""Every setting has a docstring: what it means, its unit, and why its default is what it is."""

from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from common.field_docs import field_docs, help_lines
from data import objectives, tokenizer
from data.digest import DigestConfig
from data.miniature.config import MiniatureConfig
from data.show import ShowConfig
from model.describe import DescribeConfig
from slurm.cluster import SubmitConfig
from train import scaling_report, study, study_report
from train.config import Phase, RunConfig
from train.studies.plan import SweepConfig


def dataclasses_below(kind: Any) -> set[type]:
    if not is_dataclass(kind):
        return set().union(*(dataclasses_below(each) for each in get_args(kind)))
    assert isinstance(kind, type)
    return {kind}.union(*(dataclasses_below(each) for each in get_type_hints(kind).values()))


OTHERS = (DigestConfig, ShowConfig, DescribeConfig, MiniatureConfig, tokenizer.Options, scaling_report.Options,
          study.Options, study_report.Options, SweepConfig)  # fmt: skip
OPTIONS = [objectives.load(name).Options for name in objectives.NAMES]
KINDS = sorted(
    {*dataclasses_below(RunConfig), *dataclasses_below(SubmitConfig), *OTHERS, *OPTIONS},
    key=lambda kind: (kind.__module__, kind.__name__),
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_field_has_a_docstring(kind: type) -> None:
    of_other_groups = {one.name for one in fields(Phase.__mro__[1])} if kind is Phase else set()  # described there
    lacking = [
        one.name for one in fields(kind) if one.name not in of_other_groups and not field_docs(kind).get(one.name)
    ]
    assert not lacking


def test_help_names_keys_defaults_and_docstrings() -> None:
    shown = "\n".join(help_lines(RunConfig))
    assert "parallel.micro_batch_size=8\n    Rows of one forward pass" in shown
    assert "mixture.<name>.weight=???" in shown and "phases.<name>.freeze=[]" in shown
