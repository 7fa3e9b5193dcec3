"""Define settings of the layout and of the optimizer."""

from dataclasses import dataclass, field

from common.errors import ConfigurationError
from common.values import PATH, above, at_least, at_most, one_of

STACKS = ("vit", "encoder", "decoder")
FACTORINGS = ("t5x", "big_vision")
# optimizer.name -> class in parallel/optimizer/<name>.py
OPTIMIZERS = {"adafactor": "Adafactor", "adamw": "AdamW"}
RECOMPUTE = ("none", "block", "every_n", "attention", "mlp", "norm", "elementwise")


@dataclass
class ParallelConfig:
    """Divide the world: world = data x pipeline x tensor ranks, where data parallelism is what remains."""

    auto: bool = False
    """Plan the layout for the world size as `train.plan` does, and keep it in the run's folder while that size stays.
    Degrees, ZeRO stage, cut, micro-batch and recomputation are then chosen. False by default; `parallel=auto` sets it.
    """
    hardware: str | None = None
    """File of conf/hardware that `auto` plans for. Null by default: that of this machine's GPU, or `cpu`."""
    tensor: int = 1
    """Degree of tensor parallelism, in ranks. 1 by default: a model that fits needs none."""
    pipeline: int = 1
    """Degree of pipeline parallelism, in ranks. 1 by default: no pipeline, no bubble."""
    virtual_stages: int = 1
    """Pipeline stages on every rank; above 1 the schedule is interleaved 1F1B. 1 by default: fewer messages."""
    schedule: str = "1f1b"
    """Schedule of the pipeline, `1f1b` or `gpipe`. 1F1B by default: it keeps fewer activations."""
    cut: list[str] = field(default_factory=list)
    """First unit of every pipeline stage but the first. Empty by default: the stages are balanced."""
    memory_gib: float | None = None
    """Predicted memory (GiB) that a rank may have when stages are balanced. Null by default: no bound."""
    sequence: bool = False
    """Megatron's sequence parallelism: activations between tensor-parallel layers are divided by position. False by
    default; set it with `tensor`, as it saves memory at the same traffic."""
    replicate_frozen_vit: bool = False
    """Whether each tensor-parallel rank holds the frozen ViT whole, and runs it on its share of a micro-batch's images:
    the ViT then sends one message, at the bridge. False by default: it takes the memory of the whole ViT on each."""
    zero_stage: int = 0
    """What ZeRO shards over the data-parallel ranks: 0 nothing, 1 optimizer state and fp32 weights, 2 gradients too
    (see `reduce`), 3 parameters too. 0 by default: it needs one rank only."""
    param_persistence_threshold: int = 100_000
    """Elements: under ZeRO-3 parameters with at most so many are not sharded. DeepSpeed's default."""
    micro_batch_size: int = 8
    """Rows of one forward pass on a rank. The default suits toys; lower it where memory runs out."""
    gather: str = "micro_batch"
    """When ZeRO-3's parameters are gathered: unit by unit in every `micro_batch`, or once for all micro-batches of a
    `step`. By micro-batch by default: it takes the least memory."""
    reduce: str = "step"
    """When ZeRO sums gradients over data-parallel ranks: once a `step`, in its last backward pass, or in every
    `micro_batch` (stages 2 and 3). By step by default: it sends the least. By micro-batch, no rank keeps whole
    gradients: 4 bytes a trained parameter less where a step has several micro-batches."""
    shard_frozen: bool = False
    """Whether ZeRO-3 shards frozen parameters too. False by default: they have no gradient and no state, and whole ones
    are never gathered. True where the frozen part does not fit."""
    reduce_dtype: str = "fp32"
    """Precision in which gradients are sent and summed over data-parallel ranks: `fp32` or `bf16`. Micro-batches are
    added up in fp32 anyway. Fp32 by default: bf16 halves the bytes, and rounds every sum to 8 bits."""
    offload_optimizer: str = "none"
    """Where fp32 weights, their gradients and the optimizer's state live and are updated: `none`, `cpu`, or `nvme`
    (weights and state also in files of `offload_folder`). None by default: it is the fastest. Tested on CPUs only."""
    offload_parameters: str = "none"
    """Where ZeRO-3's shards of parameters live: `none`, `cpu` or `nvme`. None by default. Tested on
    CPUs only."""
    offload_folder: str | None = field(default=None, metadata=PATH)
    """Folder of the files of `nvme`, on a fast local disk. They are filled from host memory, which must hold a rank's
    shard once, at the start. Null by default: required with `nvme` only."""
    hpz_partition_size: int = 1
    """ZeRO++: ranks next to each other, of one machine, that keep a second copy of ZeRO-3's parameters, gathered from
    in the backward pass. 1 by default: none."""
    quantized_weights: bool = False
    """ZeRO++: gather parameters as int8. Losses change, hence false. Needs CUDA; not tested here."""
    quantized_gradients: bool = False
    """ZeRO++: reduce gradients as int4. Losses change, hence false. Needs CUDA; not tested here."""
    recompute: str = "none"
    """Activations that are recomputed in the backward pass: `none`; `block`, all but the inputs of blocks; `every_n`,
    so for one block of every `recompute_every`; `attention`, the scores and weights of attention, where the kernel
    keeps any; `mlp`, the activation of the MLPs; `norm`, the results of norms; `elementwise`, both. The last three run
    no matrix product again. None by default: it is the fastest."""
    recompute_every: int = 2
    """Blocks of a group; `every_n` recomputes one of them. 2 by default: half of the memory for half of the time."""
    recompute_stacks: list[str] = field(default_factory=lambda: list(STACKS))
    """Stacks whose trained blocks are recomputed. All by default."""
    timeout_s: float = 600.0
    """Seconds without a message of its peers after which a rank ends the run with exit code 4. The default is above the
    longest step or read that is expected."""

    def __post_init__(self) -> None:
        degrees = ("tensor", "pipeline", "virtual_stages", "hpz_partition_size")
        at_least("parallel.", 1, **{name: getattr(self, name) for name in degrees})
        at_least("parallel.", 1, micro_batch_size=self.micro_batch_size, recompute_every=self.recompute_every)
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
        above("parallel.", 0, timeout_s=self.timeout_s)
        if self.memory_gib is not None and self.memory_gib <= 0:
            raise ConfigurationError(
                f"parallel.memory_gib={self.memory_gib} must be greater than 0, or null for no bound."
            )
        at_least("parallel.", 0, param_persistence_threshold=self.param_persistence_threshold)
        at_most("parallel.", 1e7, timeout_s=self.timeout_s)  # timers overflow far above
        self._check_zero()

    @property
    def replica_size(self) -> int:
        """Ranks of one replica of the model."""
        return self.tensor * self.pipeline

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of replicas in a world whose size is a multiple of `replica_size`."""
        return world_size // self.replica_size

    def _check_zero(self) -> None:
        one_of("parallel.gather", self.gather, ("micro_batch", "step"))
        one_of("parallel.reduce", self.reduce, ("step", "micro_batch"))
        one_of("parallel.reduce_dtype", self.reduce_dtype, ("fp32", "bf16"))
        one_of("parallel.offload_optimizer", self.offload_optimizer, ("none", "cpu", "nvme"))
        one_of("parallel.offload_parameters", self.offload_parameters, ("none", "cpu", "nvme"))
        least_stage = {
            "gather": 3 if self.gather == "step" else 0,
            "reduce": 2 if self.reduce == "micro_batch" else 0,
            "shard_frozen": 3 if self.shard_frozen else 0,
            "offload_optimizer": 1 if self.offload_optimizer != "none" else 0,
            "offload_parameters": 3 if self.offload_parameters != "none" else 0,
            "hpz_partition_size": 3 if self.hpz_partition_size > 1 else 0,
            "quantized_weights": 3 if self.quantized_weights else 0,
            "quantized_gradients": 3 if self.quantized_gradients else 0,
        }
        for name, least in least_stage.items():
            if self.zero_stage < least:
                raise ConfigurationError(
                    f"parallel.{name}={getattr(self, name)} requires ZeRO stage {least}; set "
                    f"parallel.zero_stage={least} (it is {self.zero_stage})."
                )
        for name in ("offload_optimizer", "offload_parameters"):
            if getattr(self, name) == "nvme" and not self.offload_folder:
                raise ConfigurationError(f"parallel.{name}=nvme writes files; set parallel.offload_folder.")
        if self.quantized_gradients and self.tensor * self.pipeline > 1:
            raise ConfigurationError(
                "parallel.quantized_gradients exchanges gradients between all ranks of a machine, which must be "
                "data-parallel; set parallel.tensor=1 and parallel.pipeline=1."
            )


@dataclass
class ParameterGroup:
    """Update the logical tensors whose names match a shell pattern in a way of their own."""

    pattern: str = ""
    """Shell pattern of logical names, such as `vit_block_*.weight`. Required in effect: empty matches nothing."""
    learning_rate_factor: float = 1.0
    """Factor on the schedule's learning rate. 1 by default: the same."""
    weight_decay: float | None = None
    """Replaces the optimizer's weight decay. Null by default: it does not."""
    warmup_steps: int = 0
    """Updates of a tensor over which its learning rate rises linearly. 0 by default: none of its own."""

    def __post_init__(self) -> None:
        for name in ("learning_rate_factor", "weight_decay", "warmup_steps"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigurationError(
                    f"optimizer.groups: {name}={getattr(self, name)} of {self.pattern!r} must not be negative."
                )


@dataclass
class OptimizerConfig:
    """Configure Adafactor, exactly T5X's (`t5x/adafactor.py`), or AdamW. The learning rate comes from the schedule."""

    name: str = "adafactor"
    """`adafactor` or `adamw`. Adafactor by default, as PaLI's."""
    decay_exponent: float = 0.8
    """Adafactor: beta2 of step t is 1 - (t + 1)^-`decay_exponent`. T5X's default."""
    update_clipping: float | None = 1.0
    """Adafactor: the RMS of a tensor's update is at most this; null turns it off. T5X's default."""
    multiply_by_parameter_scale: bool = True
    """Adafactor: scale a tensor's update by max(its RMS, `epsilon_scale`). True by default, as in T5X."""
    epsilon_scale: float = 1e-3
    """Adafactor: smallest scale of a tensor, see above. T5X's default."""
    factoring: str = "t5x"
    """Adafactor: the kernels whose second moments are row and column means. `t5x`: those of a matrix [inputs, outputs],
    heads joined. `big_vision`: those of a kernel's two largest dimensions in flax, so of a ViT's attention head by
    head. T5X's by default, as PaLI's."""
    min_dim_size_to_factor: int = 128
    """Adafactor: matrices of at least this many rows and columns keep row and column means only. T5X's default."""
    beta2_cap: float = 1.0
    """Adafactor: beta2 is at most this; big_vision has 0.999. 1 by default: no cap, as in T5X."""
    momentum: float = 0.0
    """Adafactor: the update is averaged with those before by this factor, in bf16; big_vision has 0.9. 0 by default:
    none, as in T5X."""
    beta1: float = 0.9
    """AdamW: decay of the mean of gradients. The usual default."""
    beta2: float = 0.95
    """AdamW: decay of the mean of squared gradients. 0.95 by default, as large models have it."""
    epsilon: float = 1e-8
    """AdamW: added to the denominator. The usual default."""
    weight_decay: float = 0.0
    """Decoupled weight decay, times the learning rate, on matrices only. 0 by default, as PaLI's."""
    average_decay: float = 0.0
    """Decay of an exponential moving average of the trained weights, such as 0.999: after each update it is `decay` x
    average + (1 - `decay`) x weights, in fp32. Checkpoints hold it; `evaluation.average` and `train.export` with
    `average=true` use it. 0 by default: none, as PaLI's."""
    gradient_clipping: float | None = None
    """Bound of the global norm of gradients. Null by default: off, as Adafactor clips updates."""
    groups: list[ParameterGroup] = field(default_factory=list)
    """Tensors that are updated in a way of their own, by patterns; the last pattern that matches holds. None by
    default."""

    def __post_init__(self) -> None:
        one_of("optimizer.name", self.name, tuple(OPTIMIZERS))
        one_of("optimizer.factoring", self.factoring, FACTORINGS)
        above("optimizer.", 0, decay_exponent=self.decay_exponent)
        above("optimizer.", 0, epsilon=self.epsilon, epsilon_scale=self.epsilon_scale)
        if not 0 < self.beta2_cap <= 1:
            raise ConfigurationError(f"optimizer.beta2_cap={self.beta2_cap} must lie in (0, 1].")
        for name in ("beta1", "beta2", "momentum", "average_decay"):
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
