"""Define the settings of `python -m train.submit`: the site (`conf/cluster`) and the submission."""

import re
from dataclasses import dataclass, field

from common.errors import ConfigurationError
from common.values import PATH

TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+|\d+-\d+:\d\d|\d+-\d+:\d\d:\d\d")  # sbatch's


@dataclass
class ClusterConfig:
    """A site. What is null is left to Slurm.

    `time` is a job's limit as sbatch reads it ("24:00:00", "2-0"); `signal_lead_s` seconds before it the ranks are told
    to save, which must be enough for a step and a checkpoint (Slurm looks every 30 s). A node has `gpus_per_node`, and
    runs `tasks_per_node` ranks (null: one for each GPU) of `cpus_per_task` cores. `memory` is a node's as sbatch reads
    it ("0": all). `python` is the interpreter on the nodes (null: this one), started by the words of `container`.
    `setup` are shell lines that come before it; `sbatch` and `srun` are further options of these. `mpi` is what
    `srun --mpi` must say to the MPI that mpi4py loads (only corpora need one).
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    """Slurm's quality of service, for sites whose limits go by it."""
    reservation: str | None = None
    """Nodes that are set aside under this name."""
    constraint: str | None = None
    """Features that nodes must have, e.g. "a100&ib"; null where a partition has one kind of node."""
    nodelist: str | None = None
    """Nodes that the job must run on, e.g. "n[01-04]"; null, for Slurm chooses well."""
    exclude: str | None = None
    """Nodes that the job must not run on, e.g. one with a broken GPU."""
    time: str = "24:00:00"
    signal_lead_s: int = 300
    gpus_per_node: int = 0
    gres: str | None = None
    """GPUs as a generic resource, e.g. "gpu" or "gpu:a100": then --gres=gpu:a100:8 asks for them; "none" asks for
    nothing, where nodes come with their GPUs. null: --gpus-per-node, unless `sbatch` has an option for GPUs."""
    tasks_per_node: int | None = None
    cpus_per_task: int = 1
    memory: str | None = None
    python: str | None = field(default=None, metadata=PATH)
    container: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    sbatch: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)
    mpi: str = "pmi2"

    def __post_init__(self) -> None:
        for name, least in (("gpus_per_node", 0), ("cpus_per_task", 1), ("signal_lead_s", 30)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"cluster.{name}={getattr(self, name)} must be at least {least}.")
        if self.tasks_per_node is not None and self.tasks_per_node < 1:
            raise ConfigurationError(f"cluster.tasks_per_node={self.tasks_per_node} must be at least 1, or null.")
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            raise ConfigurationError(
                f"cluster.tasks_per_node={self.tasks_per_node} ranks would share cluster.gpus_per_node="
                f"{self.gpus_per_node} GPUs; start at most one for each."
            )
        if not TIME.fullmatch(self.time):
            raise ConfigurationError(
                f'cluster.time={self.time!r} is not a time of sbatch; write "24:00:00", "2-00" or minutes, in quotes.'
            )
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ConfigurationError(
                    f"cluster.environment: {name!r} is not a name of a variable; use letters, digits and _."
                )

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node: `tasks_per_node`, else one for each GPU, else one."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


@dataclass
class SubmitSettings:
    """How one job is submitted.

    `data_parallel`: replicas of the model; ranks = data_parallel x pipeline x tensor. Where `min_data_parallel` is
    smaller, the job may start on fewer nodes, as after losing one, down to so many replicas: the data-parallel size
    follows, rows and batches stay. `ranks`: of a corpus (null: the cores of one node). `after`: the id of a job that
    must have succeeded. `dry_run` shows what would be submitted; `follow` shows the log until the last job has ended.
    """

    data_parallel: int = 1
    min_data_parallel: int | None = None
    ranks: int | None = None
    after: int | None = None
    dry_run: bool = False
    follow: bool = False

    def __post_init__(self) -> None:
        for name in ("data_parallel", "min_data_parallel", "ranks", "after"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"submit.{name}={value} must be at least 1.")
        if self.min_data_parallel is not None and self.min_data_parallel > self.data_parallel:
            raise ConfigurationError(
                f"submit.min_data_parallel={self.min_data_parallel} is more than submit.data_parallel="
                f"{self.data_parallel}; swap them."
            )


@dataclass
class SubmitConfig:
    """Everything a submission is told besides its jobs."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    submit: SubmitSettings = field(default_factory=SubmitSettings)
