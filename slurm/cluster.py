"""Define the settings of `python -m train.submit`: the site (`conf/cluster`) and the submission."""

import re
from dataclasses import dataclass, field

from common.errors import ConfigurationError
from common.values import PATH

TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+|\d+-\d+:\d\d|\d+-\d+:\d\d:\d\d")  # the forms that sbatch accepts


@dataclass
class ClusterConfig:
    """Describe a site. What is null is left to Slurm."""

    partition: str | None = None
    """Slurm's partition. Null by default: Slurm's own."""
    account: str | None = None
    """Slurm's account. Null by default: the user's."""
    qos: str | None = None
    """Slurm's quality of service, for sites whose limits go by it. Null by default: Slurm's own."""
    reservation: str | None = None
    """Nodes that are set aside under this name. Null by default: none."""
    constraint: str | None = None
    """Features that nodes must have, such as `a100&ib`. Null by default: a partition has one kind of node."""
    nodelist: str | None = None
    """Nodes that the job must run on, such as `n[01-04]`. Null by default: Slurm chooses."""
    exclude: str | None = None
    """Nodes that the job must not run on, such as one with a broken GPU. Null by default: none."""
    time: str = "24:00:00"
    """Time limit of a job as sbatch reads it: `24:00:00`, `2-0`, or minutes. A day by default: most sites allow it, and
    a job that reaches its limit is queued again."""
    signal_lead_s: int = 300
    """Seconds before the limit at which the ranks get a signal to save; enough for a step and a checkpoint (Slurm looks
    every 30 s). 5 minutes by default."""
    gpus_per_node: int = 0
    """GPUs of a node; also the ranks of a node. 0 by default: no GPUs."""
    gres: str | None = None
    """GPUs as a generic resource, such as `gpu` or `gpu:a100`: --gres=gpu:a100:8 is then given to Slurm; `none` gives
    nothing, where nodes come with their GPUs. Null by default: --gpus-per-node, unless `sbatch` has an option for GPUs.
    """
    tasks_per_node: int | None = None
    """Ranks of a node. Null by default: one for each GPU."""
    cpus_per_task: int = 1
    """Cores of a rank. 1 by default; give a node's cores divided by its ranks, as readers need them."""
    memory: str | None = None
    """Memory of a node as sbatch reads it; `0` is all of it. Null by default: Slurm's own."""
    python: str | None = field(default=None, metadata=PATH)
    """Interpreter on the nodes. Null by default: the one that submits."""
    container: list[str] = field(default_factory=list)
    """Words that start the interpreter in a container, such as [apptainer, exec, --nv, image.sif]. None by default."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before Python starts, such as `module load cuda`. None by default."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of a job. None by default."""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch. None by default."""
    srun: list[str] = field(default_factory=list)
    """Further options of srun. None by default."""
    mpi: str = "pmi2"
    """The value of `srun --mpi` that suits the MPI of mpi4py; only corpora need one. `pmi2` is MPICH's."""

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
                f'cluster.time={self.time!r} is not a time of Slurm; write "24:00:00", "2-00" or minutes, in quotes.'
            )
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ConfigurationError(
                    f"cluster.environment: {name!r} is not the name of a variable; use letters, digits and _."
                )

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node: `tasks_per_node`, else one for each GPU, else one."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


@dataclass
class SubmitSettings:
    """Describe how one job is submitted."""

    data_parallel: int = 1
    """Replicas of the model: ranks = data_parallel x pipeline x tensor. 1 by default."""
    min_data_parallel: int | None = None
    """Replicas that are enough to start on fewer nodes, as after losing one: the data-parallel size follows, rows and
    batches stay. Null by default: all nodes are needed."""
    ranks: int | None = None
    """Processes that make a corpus. Null by default: the cores of one node."""
    after: int | None = None
    """Id of a job that must have succeeded before. Null by default: none."""
    dry_run: bool = False
    """Show everything and submit nothing; `--dry-run` is short for it. False by default."""
    follow: bool = False
    """Show the log until the last job has ended; `--follow` is short for it. False by default."""

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
    """Join the settings of a submission besides its jobs."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """The site (conf/cluster). The default is an empty site, for one machine."""
    submit: SubmitSettings = field(default_factory=SubmitSettings)
    """How a job is submitted."""
