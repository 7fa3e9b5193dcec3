"""How the world is divided, and which optimizer updates the shards."""

from dataclasses import dataclass, field

from common.errors import ConfigurationError
from common.values import PATH, at_most, one_of

STACKS = ("vit", "encoder", "decoder")
OPTIMIZERS = {"adafactor": "Adafactor", "adamw": "AdamW"}  # optimizer.name -> class in parallel/optimizer/<name>.py
RECOMPUTE = ("none", "block", "every_n", "attention")


@dataclass
class ParallelConfig:
    """Degrees of parallelism; data parallelism is what remains of the world: world = data x pipeline x tensor.

    `zero_stage`: 0 replicates, 1 shards optimizer state and fp32 weights over the data-parallel ranks, 2 gradients too,
    3 parameters too (DeepSpeed ZeRO), of which tensors of less than `param_persistence_threshold` elements stay
    gathered. `schedule` is "1f1b" or "gpipe"; with `virtual_stages` > 1 every rank holds that many stages and the
    schedule is interleaved
    1F1B. `cut` names the first unit of every stage but the first; left empty, stages are balanced, every rank
    within `memory_gib` of predicted memory if that is given. `sequence`: Megatron sequence parallelism between
    tensor-parallel layers. `micro_batch_size` is in rows per forward pass. A rank that hears nothing from its peers for
    `timeout_s` seconds gives up.

    What ZeRO may do besides: `gather`: ZeRO-3's parameters are gathered anew for every "micro_batch", or once and kept
    over all micro-batches of a "step", whatever `param_persistence_threshold` is. `offload_optimizer`: the fp32
    weights,
    their gradients and the optimizer's state live on the "cpu" and are updated there; "nvme" maps weights and state
    into
    files in `offload_folder` as well. `offload_parameters`: ZeRO-3's shards of parameters, frozen ones too, live on the
    "cpu", or in files ("nvme"). Files are filled from host memory, which must hold a rank's shard once, at the start.
    All are tested on CPUs only. ZeRO++: `hpz_partition_size` ranks next to each other (of one machine) keep a second
    copy of ZeRO-3's parameters, gathered from in the backward pass; `quantized_weights` and `quantized_gradients` (int8
    and int4 on the wire; losses change) need CUDA, and are not tested here.

    `recompute` trades time for memory in trained blocks of `recompute_stacks`: "none" keeps all activations, "block"
    only the inputs of blocks, "every_n" so for one block of every `recompute_every`, "attention" all but the scores and
    weights of attention.
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_stages: int = 1
    schedule: str = "1f1b"
    cut: list[str] = field(default_factory=list)
    memory_gib: float | None = None
    sequence: bool = False
    zero_stage: int = 0
    param_persistence_threshold: int = 100_000
    micro_batch_size: int = 8
    gather: str = "micro_batch"
    offload_optimizer: str = "none"
    offload_parameters: str = "none"
    offload_folder: str | None = field(default=None, metadata=PATH)
    hpz_partition_size: int = 1
    quantized_weights: bool = False
    quantized_gradients: bool = False
    recompute: str = "none"
    recompute_every: int = 2
    recompute_stacks: list[str] = field(default_factory=lambda: list(STACKS))
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        for name in (
            "tensor",
            "pipeline",
            "virtual_stages",
            "micro_batch_size",
            "recompute_every",
            "hpz_partition_size",
        ):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"parallel.{name}={getattr(self, name)} must be at least 1.")
        if self.zero_stage not in (0, 1, 2, 3):
            raise ConfigurationError(f"parallel.zero_stage={self.zero_stage} is unknown; choose 0, 1, 2 or 3.")
        one_of("parallel.recompute", self.recompute, RECOMPUTE)
        for stack in self.recompute_stacks:
            one_of("parallel.recompute_stacks", stack, STACKS)
        one_of("parallel.schedule", self.schedule, ("1f1b", "gpipe"))
        if self.virtual_stages > 1 and (self.pipeline == 1 or self.schedule != "1f1b"):
            raise ConfigurationError(
                f"parallel.virtual_stages={self.virtual_stages} interleaves the stages of a 1f1b pipeline; set "
                "parallel.pipeline to 2 or more and parallel.schedule to 1f1b."
            )
        if self.timeout_s <= 0:
            raise ConfigurationError(f"parallel.timeout_s={self.timeout_s} must be greater than 0.")
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise ConfigurationError(
                f"parallel.memory_gib={self.memory_gib} must be greater than 0, or null for no bound."
            )
        if self.param_persistence_threshold < 0:
            raise ConfigurationError(
                f"parallel.param_persistence_threshold={self.param_persistence_threshold} must not be negative."
            )
        at_most("parallel.", 1e7, timeout_s=self.timeout_s)  # timers overflow far above
        self._check_zero()

    def _check_zero(self) -> None:
        one_of("parallel.gather", self.gather, ("micro_batch", "step"))
        one_of("parallel.offload_optimizer", self.offload_optimizer, ("none", "cpu", "nvme"))
        one_of("parallel.offload_parameters", self.offload_parameters, ("none", "cpu", "nvme"))
        least_stage = {
            "gather": 3 if self.gather == "step" else 0,
            "offload_optimizer": 1 if self.offload_optimizer != "none" else 0,
            "offload_parameters": 3 if self.offload_parameters != "none" else 0,
            "hpz_partition_size": 3 if self.hpz_partition_size > 1 else 0,
            "quantized_weights": 3 if self.quantized_weights else 0,
            "quantized_gradients": 3 if self.quantized_gradients else 0,
        }
        for name, least in least_stage.items():
            if self.zero_stage < least:
                raise ConfigurationError(
                    f"parallel.{name}={getattr(self, name)} is a matter of ZeRO stage {least}; set "
                    f"parallel.zero_stage={least} (it is {self.zero_stage})."
                )
        for name in ("offload_optimizer", "offload_parameters"):
            if getattr(self, name) == "nvme" and not self.offload_folder:
                raise ConfigurationError(f"parallel.{name}=nvme needs a place; set parallel.offload_folder.")
        if self.quantized_gradients and self.tensor * self.pipeline > 1:
            raise ConfigurationError(
                "parallel.quantized_gradients exchanges gradients between all ranks of a machine, which must be "
                "data-parallel; set parallel.tensor=1 and parallel.pipeline=1."
            )


@dataclass
class ParameterGroup:
    """How the logical tensors whose names match the shell pattern (`vit_block_*.weight`) are updated.

    Their learning rate is the schedule's times `learning_rate_factor`, approached linearly over a tensor's own first
    `warmup_steps` updates. `weight_decay` replaces the optimizer's (null = does not).
    """

    pattern: str = ""
    learning_rate_factor: float = 1.0
    weight_decay: float | None = None
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate_factor", "weight_decay", "warmup_steps"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigurationError(
                    f"optimizer.groups: {name}={getattr(self, name)} of {self.pattern!r} must not be negative."
                )


@dataclass
class OptimizerConfig:
    """Adafactor exactly as T5X's (`t5x/adafactor.py`), or AdamW. The learning rate comes from the schedule.

    Adafactor: beta2 of step t is 1 - (t + 1)^-`decay_exponent`; the step is scaled by max(RMS(parameter),
    `epsilon_scale`) and its RMS clipped at `update_clipping`; matrices of at least `min_dim_size_to_factor` on both
    sides keep row and column means only. big_vision's has besides: beta2 of at most `beta2_cap`, and the update
    averaged with those before by `momentum`, kept in bf16. AdamW: `beta1`, `beta2`, `epsilon`. `gradient_clipping`
    bounds the global gradient norm (null = off). `weight_decay` is decoupled, times the learning rate, on matrices
    only. Of several `groups` that match a tensor, the last holds.
    """

    name: str = "adafactor"
    decay_exponent: float = 0.8
    update_clipping: float | None = 1.0
    multiply_by_parameter_scale: bool = True
    epsilon_scale: float = 1e-3
    min_dim_size_to_factor: int = 128
    beta2_cap: float = 1.0
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    gradient_clipping: float | None = None
    groups: list[ParameterGroup] = field(default_factory=list)

    def __post_init__(self) -> None:
        one_of("optimizer.name", self.name, tuple(OPTIMIZERS))
        for name in ("decay_exponent", "epsilon", "epsilon_scale"):
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"optimizer.{name}={getattr(self, name)} must be greater than 0.")
        if not 0 < self.beta2_cap <= 1:
            raise ConfigurationError(f"optimizer.beta2_cap={self.beta2_cap} must lie in (0, 1].")
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigurationError(f"optimizer.{name}={getattr(self, name)} must lie in [0, 1).")
        for name in ("update_clipping", "gradient_clipping"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigurationError(f"optimizer.{name}={value} must be greater than 0, or null to turn it off.")
        if self.weight_decay < 0:
            raise ConfigurationError(f"optimizer.weight_decay={self.weight_decay} must not be negative.")
        if self.min_dim_size_to_factor < 1:
            raise ConfigurationError(
                f"optimizer.min_dim_size_to_factor={self.min_dim_size_to_factor} must be at least 1."
            )
