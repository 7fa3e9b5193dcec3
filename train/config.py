"""Define the settings of a run: those of `train/`, joined with those of `model`, `parallel` and `data`."""

from dataclasses import asdict, dataclass, field, fields, make_dataclass
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from common.errors import ConfigurationError
from common.values import PATH, above, at_least, one_of
from data.config import ComponentConfig, DataConfig
from data.objectives import NAMES
from data.tasks.config import TaskConfig
from evaluation.config import EvaluationConfig
from model.config import ClassifierConfig, ModelConfig, MT5Config, PaLIConfig, ViTConfig
from parallel.config import OptimizerConfig, ParallelConfig


@dataclass
class GuardConfig:
    """Judge a step by its loss: not finite, or a spike far above the median of the last losses, is bad."""

    spike_factor: float = 3.0
    """A spike is above this times the median of the last losses, and above `spike_margin` too. 3 by default: a jump
    that no batch of a healthy run makes."""
    spike_margin: float = 2.0
    """Nats per target token: a spike is as far above the median too, so that small losses may vary. 2 by default."""
    window: int = 100
    """Losses that the median is taken of; spikes are judged once a phase has so many. 100 by default."""
    max_in_a_row: int = 10
    """Bad steps in a row after which the run goes back to its last checkpoint before them and skips their batches. 10
    by default: fewer may be bad batches."""
    roll_back: int = 0
    """How often the run may go back; then it stops with exit code 3. 0 by default: it stops at once, for a person to
    look at it."""

    def __post_init__(self) -> None:
        at_least("run.guard.", 1, window=self.window, max_in_a_row=self.max_in_a_row)
        at_least("run.guard.", 0, roll_back=self.roll_back)
        at_least("run.guard.", 0, spike_margin=self.spike_margin)
        above("run.guard.", 1, spike_factor=self.spike_factor)


@dataclass
class StragglerConfig:
    """Judge a rank by its own work, on average over some steps."""

    factor: float = 2.0
    """A rank is slow above this times the median of all ranks. 2 by default; 0 never."""
    window: int = 50
    """Steps of the average. 50 by default: some minutes of a large model."""

    def __post_init__(self) -> None:
        at_least("run.straggler.", 1, window=self.window)
        if self.factor and self.factor <= 1:
            raise ConfigurationError(f"run.straggler.factor={self.factor} must be greater than 1, or 0 for never.")


@dataclass
class RunSettings:
    """Name, place and length of a run."""

    name: str = "pretrain"
    """Name of the run, also in the tracker."""
    folder: str = field(default="runs/pretrain", metadata=PATH)
    """Folder of the run: settings, metrics, checkpoints. The same folder continues the run."""
    steps: int = 1000
    """Steps of the run, over all phases; a run that is started again with more goes on. `config.yaml` holds them also
    where `examples` gave them. The default is the warm-up of PaLI's schedule: long enough to see it learn."""
    examples: float | None = None
    """Length of the run in examples, instead of `steps`: 1.566e9 is the paper's. The number of steps follows from the
    batch size of each phase, rounded up. Null by default: `steps` gives the length."""
    seed: int = 0
    """Seed of the order of examples, of first weights and of dropout. 0 by default."""
    precision: str = "bf16"
    """`bf16` (weights and optimizer state stay fp32) or `fp32`. bf16 by default: it is twice as fast on GPUs."""
    initial: str | None = field(default=None, metadata=PATH)
    """Folder of another run whose latest checkpoint gives the first weights. Null by default: none."""
    branch: bool = False
    """Go on from the checkpoint of `initial` as its run would, with its optimizer state and from its step, so that the
    schedule and the order of examples go on too: for a cool-down (schedule.cooldown_steps) of one's own. False by
    default: weights alone are taken, and steps count from 1."""
    from_scratch: bool = False
    """Allow a phase to freeze weights that come from no file and that no earlier phase has trained: they stay random.
    Of use for measurements alone, hence false."""
    peak_tflops: float | None = None
    """Peak of one device (TFLOP/s) at the run's precision, for `mfu`. Null by default: looked up by the device's name;
    `mfu` is null where it is unknown."""
    restarts_without_progress: int = 3
    """Restarts in a row without a new checkpoint after which the run stops itself. 3 by default: a node may break
    twice."""
    rehearse: bool = False
    """Try one step, update, checkpoint, validation and prediction of each phase, print the memory that each takes, and
    end. The run's folder stays as it is. False by default; set it once before a long run."""
    allow_changes: list[str] = field(default_factory=list)
    """Settings that may differ from those of the run's newest checkpoint though its steps are others then, such as
    `data.global_batch_size`, `mixture` or `data.sources` (which shards a source has). None by default, so that a step
    number is the whole state."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """When a step is bad, and what happens then."""
    straggler: StragglerConfig = field(default_factory=StragglerConfig)
    """When a rank is called slow."""

    def __post_init__(self) -> None:
        at_least("run.", 1, steps=self.steps)
        at_least("run.", 0, seed=self.seed, restarts_without_progress=self.restarts_without_progress)
        one_of("run.precision", self.precision, ("fp32", "bf16"))
        if self.peak_tflops is not None:
            above("run.", 0, peak_tflops=self.peak_tflops)
        if self.branch and self.initial is None:
            raise ConfigurationError("run.branch=true goes on from another run; name it by run.initial=FOLDER[@STEP].")


@dataclass
class WeightsConfig:
    """Name the first weights of the towers: pretrained elsewhere, or in another run.

    Each is a folder of Hugging Face transformers, an export of ours (`train.export`), a safetensors or .npz file, or a
    run (`RUN`, `RUN@STEP`), and gives its whole tower; heads are left out. Where both name the same place, it gives the
    projection between them too. A run that goes on from a checkpoint does not read them.
    """

    vit: str | None = field(default=None, metadata=PATH)
    """ViT with its final norm: SigLIP, SigLIP 2 of a fixed resolution, or big_vision's .npz; null starts it at random.
    The paper's experiments leave it open ("???"): they freeze the ViT, and a frozen random ViT would be trained around
    for weeks."""
    mt5: str | None = field(default=None, metadata=PATH)
    """mT5 (embedding, encoder, decoder, head): mT5, umT5, T5 1.1 or Flan-T5; null starts it at random."""


@dataclass
class ScheduleConfig:
    """Set the learning rate of each step: linear warm-up to `peak`, then `name`, then a cool-down to zero."""

    name: str = "rsqrt"
    """Shape after the warm-up: `rsqrt`, `linear_decay`, `cosine` or `constant`. The default is PaLI's."""
    peak: float = 1e-2
    """Learning rate at the end of the warm-up. The default is PaLI-3B's."""
    warmup_steps: int = 1000
    """Steps of the linear warm-up. The default is the paper's."""
    warmup_examples: float | None = None
    """Length of the warm-up in examples, instead of `warmup_steps` (set that to null), rounded up to whole steps of the
    phases that it lies in. Null by default: `warmup_steps` gives the length."""
    end_fraction: float = 0.0
    """Fraction of `peak` that `linear_decay` and `cosine` end at. 0 by default."""
    cooldown_steps: int = 0
    """Last steps of the run, over which the learning rate falls linearly to zero. 0 by default: none."""

    def __post_init__(self) -> None:
        one_of("schedule.name", self.name, ("rsqrt", "linear_decay", "cosine", "constant"))
        at_least("schedule.", 0, warmup_steps=self.warmup_steps, cooldown_steps=self.cooldown_steps)
        above("schedule.", 0, peak=self.peak)
        if not 0 <= self.end_fraction <= 1:
            raise ConfigurationError(f"schedule.end_fraction={self.end_fraction} must lie in [0, 1].")


def _optional_settings(*kinds: type) -> Any:
    """Make a dataclass of all fields of `kinds`, each None by default."""
    made: dict[str, Any] = {}
    for kind in kinds:
        hints = get_type_hints(kind)
        made |= {one.name: (hints[one.name] | None, field(default=None, metadata=one.metadata)) for one in fields(kind)}
    described = [(name, kind, default) for name, (kind, default) in made.items()]
    return make_dataclass("OptionalSettings", described, kw_only=True)


_GROUPS = "process groups are made once for a run"
# Settings that a phase cannot have of its own, with the reason.
OF_THE_RUN = {
    **{f"parallel.{name}": _GROUPS for name in (
        "tensor", "pipeline", "virtual_stages", "sequence", "zero_stage", "hpz_partition_size", "timeout_s")},
    "data.tokenizer": "a model learns the ids of one tokenizer",
}  # fmt: skip

_OptionalSettings: Any = _optional_settings(DataConfig, ParallelConfig, ModelConfig)


@dataclass
class Phase(_OptionalSettings):
    """A stretch of a run at one resolution with one set of frozen parameters.

    Besides the fields below, a phase takes any key of `data`, `parallel` and `model` by its bare name, such as
    `image_size`, `global_batch_size` or `dropout_rate`. It replaces the run's value (null: does not). Excepted are keys
    that shape process groups, and the tokenizer.
    """

    steps: int | None = None
    """Steps of the phase; null takes what the other phases leave of `run.steps`. Null in one phase at most."""
    freeze: list[str] = field(default_factory=list)
    """Shell patterns of names of parameters that are not trained, such as `vit_block_*`. None by default."""
    learning_rate_factor: float = 1.0
    """Factor on the schedule's learning rate, for a phase that should learn more slowly."""
    objectives: dict[str, float] = field(default_factory=dict)
    """Weights by objective: the phase reads only these objectives of the mixture. Empty: the whole mixture."""
    learning_rate: ScheduleConfig | None = None
    """Schedule of this phase, whose steps it counts from 1, as a fine-tuning after pretraining has its own. Null
    by default: the run's `schedule`, over all phases."""

    def check(self, where: str) -> None:
        """Raise ConfigurationError for values that are impossible on their own; `where` begins the keys."""
        if self.steps is not None:
            at_least(where, 1, steps=self.steps)
        above(where, 0, learning_rate_factor=self.learning_rate_factor)
        if self.learning_rate is not None and self.learning_rate.warmup_examples is not None:
            raise ConfigurationError(f"{where}learning_rate.warmup_examples is not read; give warmup_steps instead.")
        for key, why in OF_THE_RUN.items():
            name = key.partition(".")[2]
            if getattr(self, name) is not None:
                raise ConfigurationError(f"{where}{name} cannot differ between phases, as {why}; set {key} instead.")


@dataclass
class CheckpointConfig:
    """Set when to save and what to keep."""

    every_steps: int = 1000
    """Save after every so many steps. 1000 by default."""
    every_minutes: float = 30.0
    """Save after so many minutes of wall clock too; 0 never. 30 by default: the most that a crash costs."""
    keep_last: int = 2
    """Newest checkpoints that stay. 2 by default: one may be damaged."""
    keep_every: int = 0
    """Checkpoints of every so many steps stay for ever; 0 none. 0 by default: they take much disk."""
    best: str = "validation/loss"
    """Metric of metrics.jsonl by which RUN@best chooses: the lowest of a loss, the highest of any other. The default is
    measured in every run; `train.finetune` takes the task's score (validation/<task>/<metric>)."""
    keep_best: int = 0
    """Checkpoints with the best such score that stay besides the newest. 0 by default; 1 in a fine-tuning. A checkpoint
    counts if its step is validated."""

    def __post_init__(self) -> None:
        at_least("checkpoint.", 1, every_steps=self.every_steps, keep_last=self.keep_last)
        at_least("checkpoint.", 0, keep_every=self.keep_every, keep_best=self.keep_best)
        if self.every_minutes < 0:
            raise ConfigurationError(
                f"checkpoint.every_minutes={self.every_minutes} must not be negative; 0 turns it off."
            )


@dataclass
class TrackerConfig:
    """Track a run with Weights & Biases."""

    name: str = "wandb"
    """`wandb` or `none`. wandb by default; files in the run's folder are written with either."""
    project: str = "pali"
    """Project of the run."""
    group: str | None = None
    """Group of the run. Null by default: none; runs of a sweep take the sweep's name."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run. None by default."""
    notes: str | None = None
    """Text that describes the run. Null by default: none."""
    mode: str = "auto"
    """`online`, `offline`, or `auto`: online where the user is logged in. Auto by default."""

    def __post_init__(self) -> None:
        one_of("tracker.name", self.name, ("wandb", "none"))
        one_of("tracker.mode", self.mode, ("auto", "online", "offline"))


@dataclass
class ProfileConfig:
    """Trace some steps, and record allocations of GPU memory."""

    steps: str | None = None
    """Steps that are traced, as `100-105`. Null by default: none, as a trace slows them."""
    ranks: list[int] = field(default_factory=lambda: [0])
    """Ranks that trace. The first by default: all ranks do the same."""
    memory_history: bool = False
    """Record allocations: the snapshot of a GPU's memory that is taken when it runs out shows which line allocated
    what. False by default: it costs some microseconds an allocation."""


@dataclass
class RunConfig:
    """Join all settings of a run."""

    run: RunSettings = field(default_factory=RunSettings)
    """Name, place and length."""
    vit: ViTConfig = field(default_factory=ViTConfig)
    """Size of the ViT (conf/vit)."""
    mt5: MT5Config = field(default_factory=MT5Config)
    """Size of the mT5 (conf/mt5)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """What joins the towers, and the loss (conf/model)."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """Head of a ViT that is pretrained alone (`train.pretrain_vit`)."""
    data: DataConfig = field(default_factory=DataConfig)
    """Shards, rows and batches (conf/data)."""
    mixture: dict[str, ComponentConfig] = field(default_factory=dict)
    """Components by name (conf/mixture)."""
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    """First weights of the towers (conf/weights)."""
    phases: dict[str, Phase] = field(default_factory=dict)
    """Phases by name, in order; they share one step counter (conf/phases)."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer (conf/optimizer)."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    """The learning rate (conf/schedule)."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is divided among ranks (conf/parallel)."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save and what to keep."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Validation and evaluation."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Weights & Biases (conf/tracker)."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """Traces."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """A task of official files, for `train.evaluate` (conf/task)."""

    def __post_init__(self) -> None:
        for name, phase in self.phases.items():
            phase.check(f"phases.{name}.")

    @property
    def pali(self) -> PaLIConfig:
        """The configuration of the whole model; of a phase only after `for_phase`, which sets the image size."""
        tower = "mt5" if self.data.images_per_row == 0 else None
        if self.classifier.head != "none":
            tower = "vit"
        return PaLIConfig(self.vit, self.mt5, self.model, len(NAMES), tower, self.classifier)


def to_yaml(config: RunConfig) -> str:
    """Return the resolved settings as YAML, every default spelled out."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the resolved settings as plain dictionaries and lists; of a phase's own settings, those that are given."""
    plain = asdict(config)
    own = {one.name for one in fields(_OptionalSettings)}
    for name, phase in plain["phases"].items():
        plain["phases"][name] = {key: value for key, value in phase.items() if key not in own or value is not None}
    return {str(key): value for key, value in plain.items()}
