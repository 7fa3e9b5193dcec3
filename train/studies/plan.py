"""Plan a study (conf/study): its sweeps, the runs of each, and the words that train and evaluate them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from omegaconf import OmegaConf

from common.command_line import CONF
from common.errors import ConfigurationError
from common.values import PATH, at_least, one_of, typed
from parallel.checkpoint.folder import CheckpointFolder
from train.sweep import folder_name

FOLDER_VARIABLE = "PALI_STUDY"
"""Environment variable with the study's folder, which conf/experiment/study*.yaml read."""
DIRNAME = "hydra.job.config.override_dirname"
SEPARATOR = "-"
"""Between key and value in the name of a run's folder: Hydra's `=` would need quotes in `weights.vit=…`."""


@dataclass
class StudyOptions:
    """Choose a study and its runs."""

    study: str = "miniature"
    """File of conf/study: `miniature`, or `web` for shards of one's own. The first by default."""
    folder: str = field(default="runs/study", metadata=PATH)
    """Folder of all runs of the study. The same folder continues it."""
    seeds: int = 1
    """Seeds of every run but the towers: 0, 1, and so on. 1 by default: a first pass."""
    full: bool = False
    """Train each run for its `full_steps`. False by default: a first pass, of hours on two cores."""
    steps: int | None = None
    """Steps of every run, for a trial. Null by default: those of the study."""

    def __post_init__(self) -> None:
        at_least("", 1, seeds=self.seeds, steps=self.steps or 1)

    def read(self, more: Sequence[str] = ()) -> "dict[str, StudySweep]":
        """Return the sweeps of the study; see `read_study`."""
        return read_study(self.study, Path(self.folder), self.seeds, self.full, self.steps, more)


@dataclass
class SweepConfig:
    """One sweep of a study."""

    command: str = "pretrain"
    """`pretrain`, or `pretrain_vit`. The first by default."""
    words: list[str] = field(default_factory=list)
    """Words that all runs of the sweep have. None by default."""
    over: dict[str, list[str]] = field(default_factory=dict)
    """Values by key: the sweep has a run for every combination. None by default."""
    seeds: bool = True
    """A run for every seed of the study; else of seed 0 alone. True by default; false for towers, which all share."""
    evaluate: bool = True
    """Evaluate the runs on the test split. True by default."""
    evaluation: list[str] = field(default_factory=list)
    """Further words of the evaluation. None by default."""
    steps: int = 1
    """Steps of a run in a first pass."""
    full_steps: int = 1
    """Steps of a run in a full pass."""

    def __post_init__(self) -> None:
        one_of("command", self.command, ("pretrain", "pretrain_vit"))
        at_least("", 1, steps=self.steps, full_steps=self.full_steps)


@dataclass(frozen=True)
class Cell:
    """One run of a study: its values by key, its folder, and its steps."""

    values: dict[str, str]
    folder: Path
    steps: int

    @property
    def trained(self) -> bool:
        """The run has its last checkpoint."""
        return (CheckpointFolder.from_run(self.folder).latest_step() or 0) >= self.steps

    @property
    def evaluated(self) -> bool:
        """Its evaluation.json is that of its last checkpoint."""
        try:
            return json.loads((self.folder / "evaluation.json").read_text(encoding="utf-8"))["step"] >= self.steps
        except (OSError, ValueError, KeyError, TypeError):
            return False


@dataclass(frozen=True)
class StudySweep:
    """One sweep of a study with its folder, its seeds, and further words for all its runs."""

    name: str
    config: SweepConfig
    folder: Path
    seeds: tuple[int, ...]
    steps: int
    more: tuple[str, ...] = ()

    @property
    def over(self) -> dict[str, list[str]]:
        """Values by key, those of the seed last."""
        seeds = {"run.seed": [str(seed) for seed in self.seeds]} if self.config.seeds else {}
        return self.config.over | seeds

    def cells(self) -> list[Cell]:
        """Return the runs, those of one seed together."""
        names, found = list(self.over), []
        for values in product(*reversed(self.over.values())):
            own = dict(zip(names, reversed(values), strict=True))
            name = ",".join(sorted(f"{key}{SEPARATOR}{value}" for key, value in own.items()))
            found.append(Cell(own, self.folder / folder_name(name), self.steps))
        return found

    def words(self) -> list[str]:
        """Return the words that all runs have."""
        return [*self.config.words, f"run.steps={self.steps}", f"run.folder={self.folder}", *self.more]

    def training(self, cells: Sequence[Cell]) -> list[str]:
        """Return the words of the sweep over these runs, and over done ones where they complete the combinations."""
        over = {key: list(dict.fromkeys(cell.values[key] for cell in cells)) for key in self.over}
        names = [_left_out_of_names(self.words()), f"{DIRNAME}.kv_sep='{SEPARATOR}'"]
        return ["-m", *names, *self.words(), *(f"{key}={','.join(values)}" for key, values in over.items())]

    def evaluation(self, cells: Sequence[Cell]) -> list[str]:
        """Return the words of the sweep of evaluations of these runs."""
        folders = ",".join(f"'{cell.folder}'" for cell in cells)
        launcher = [word for word in self.more if word.startswith("hydra") or "@hydra.launcher" in word]
        own = [*self.config.evaluation, *launcher, f"hydra.sweep.dir={self.folder}"]
        return ["-m", _left_out_of_names([*own, "run.folder="]), *own, f"run.folder={folders}"]

    def share(self, cells: Sequence[Cell], parts: int) -> list[list[Cell]]:
        """Deal the runs to at most `parts` sweeps side by side, by the values of the key that has most of them."""
        if not cells or not self.over:
            return [list(cells)] if cells else []
        longest = max(self.over, key=lambda key: len({cell.values[key] for cell in cells}))
        values = list(dict.fromkeys(cell.values[longest] for cell in cells))
        dealt = [
            [cell for cell in cells if values.index(cell.values[longest]) % parts == part] for part in range(parts)
        ]
        return [part for part in dealt if part]


def read_study(
    study: str, folder: Path, seeds: int, full: bool = False, steps: int | None = None, more: Sequence[str] = ()
) -> dict[str, StudySweep]:
    """Return the sweeps of conf/study/<study>.yaml by name, in their order. Raises ConfigurationError.

    `steps`: of every run, in place of the study's. `more`: further words of every run.
    """
    path = CONF / "study" / f"{study}.yaml"
    if not path.is_file():
        names = sorted(each.stem for each in path.parent.glob("*.yaml"))
        raise ConfigurationError(f"study={study} is not a file of conf/study; choose one of {', '.join(names)}.")
    plain = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    assert isinstance(plain, dict)
    sweeps = {}
    for name, settings in plain.items():
        config = typed(SweepConfig, settings, str(name))
        own = steps or (config.full_steps if full else config.steps)
        sweeps[str(name)] = StudySweep(str(name), config, folder / str(name), tuple(range(seeds)), own, tuple(more))
    return sweeps


def _left_out_of_names(words: Sequence[str]) -> str:
    """Return the word that leaves these out of the names of folders.

    All that is above their keys too: `mixture.mine={…}` becomes `mixture={mine: {…}}` (common/overrides.py).
    """
    paths = [word.partition("=")[0].lstrip("+~").split(".") for word in words]
    keys = dict.fromkeys(".".join(path[:end]) for path in paths for end in range(1, len(path) + 1))
    return f"{DIRNAME}.exclude_keys=[{','.join(keys)}]"
