"""Train with ZeRO stages 1, 2 and 3: one DeepSpeed engine over the data-parallel ranks.

DeepSpeed 0.19.8 shards memory, gathers and reduces. Schedule, loss scale, learning rate, optimizer and checkpoints are
ours. This file holds every workaround that this takes; comments below give the number of the workaround at its lines.
tests/distributed/test_options_workarounds.py fails when one is no longer needed.

1. Gradient accumulation: `managed_gradient_accumulation: false`, because the caller decides when a step ends and has
   scaled the loss already.
2. Averages: DeepSpeed averages gradients over the data-parallel ranks, but our loss is divided by the global number of
   targets -> the loss is scaled up.
3. Gradient norm: DeepSpeed counts a parameter on every model-parallel rank only if `parameter.model_parallel` is true
   -> it is set so that each logical element counts once. DeepSpeed reports a norm that is not finite as -1 and skips
   the step (`check_grad_overflow`).
4. Sub-groups: one only (`sub_group_size`), so that the optimizer sees all shards in one step and reduces its statistics
   in one collective.
5. Parameter ids: ZeRO-3 compares them over the whole world, but pipeline stages differ -> confined to the stage
   (common/library_patches.py).
6. Two backwards in a row (1F1B's cool-down, GPipe) would overwrite gradients, because DeepSpeed counts micro-batches in
   its forward -> `clear_backward_seen_flag` before each backward counts them there. `backward_prologue` clears 16-bit
   gradients, so DeepSpeed's forward is not needed.
7. Interleaved stages: ZeRO-3 overwrites gradients in the first backward of a step and adds in the others. On a rank
   with several stages, the first backward of the second stage is not the first of the step, and would add to old
   gradients -> gradients are zeroed and every backward adds.
8. `gather: step`: ZeRO-3 gathers and releases parameters module by module. Its hooks cost more than the work of a small
   module, and it releases parameters at the latest when the optimizer steps -> the hooks are removed, and units are
   gathered when a step begins, each in one collective. No tensor persists then, because DeepSpeed would gather
   persistent tensors one by one after every update.
9. ZeRO++ hpZ: we make the groups of nearby ranks, because DeepSpeed takes neighbors in the world, which may be
   tensor-parallel, and makes them anew for every unit that is sharded. Loading weights invalidates the second copies,
   so we drop all of them; DeepSpeed drops them only after an update, and only for trained parameters. Parameters with
   and without a second copy are never gathered in one collective.
10. NVMe offload: DeepSpeed reads state back sub-group by sub-group, but there is one sub-group, and our optimizers keep
    their own state -> DeepSpeed offloads to the CPU, and that memory is mapped into files. Offloaded parameters are
    mapped too, so one mechanism and one folder hold everything.
11. LOCAL_RANK: DeepSpeed takes the GPU of that number, and raises without it. A launcher may show a rank one GPU, or
    those of its socket -> the variable, and Open MPI's that must equal it, are this rank's device while DeepSpeed reads
    them.
12. Shards: found through `grad_position` (stage 3) or `_hp_mapping` (stages 1, 2); DeepSpeed has no public map.
13. Frozen stages: ZeRO-1 and 2 reduce after every backward, and fail if it has reached none of their parameters -> the
    backward of a pipeline stage without a trained parameter never calls this engine (parallel/pipeline/schedule.py).
"""

import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from common.library_patches import confine_zero3_comparison, set_secondary_group, skip_shared_memory_op
from model.batch import MicroBatch
from model.layers import Part, parameter_parts
from model.loss import LossTotals
from model.pali import PaLI
from parallel.config import ParallelConfig
from parallel.engine.base import Engine
from parallel.engine.model_parallel_unit import ModelParallelUnit
from parallel.file_backed import Disk
from parallel.layout import Layout
from parallel.optimizer.base import Shard, optimizer_class
from parallel.plan.blueprint import Blueprint, ShardUnit
from parallel.shards import Rectangle, is_counted, rectangles

WHOLE_MODEL = 10**15  # elements: larger than any model
# DeepSpeed 0.19.8's defaults (elements), written out because defaults have changed between versions.
# parallel/plan/peak.py counts the memory of these buffers.
BUFFERS = {
    "reduce_scatter": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": 500_000_000,
    "allgather_bucket_size": 500_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 10**9,
    "stage3_max_reuse_distance": 10**9,
}

for name in ("DeepSpeed", "deepspeed"):  # DeepSpeed logs its settings on every rank
    logging.getLogger(name).setLevel(logging.ERROR)


class ZeroEngine(Engine):
    """Shard over the data-parallel ranks: optimizer state and fp32 weights (1), gradients (2), parameters (3)."""

    def __init__(self, blueprint: Blueprint, model: PaLI) -> None:
        """Hand the units to DeepSpeed; `prepare` has run, and has sharded them for stage 3."""
        super().__init__(blueprint, model)
        self.zero_stage, self.sharing_group = self.layout.config.zero_stage, self.layout.stage_group
        self.gradient_scale = float(self.layout.data_parallel_size)  # workaround 2
        for parameter in model.parameters():  # workaround 3
            parameter.model_parallel = is_counted(parameter, self.layout.tensor_parallel_rank)  # type: ignore[attr-defined]
        trained = [p for p in model.parameters() if p.requires_grad]
        with device_as_local_rank(self.layout.device):
            self.deepspeed_engine, self.zero_optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=optimizer_class(blueprint.optimizer)(trained, blueprint.optimizer),
                model_parameters=trained,
                mpu=ModelParallelUnit(self.layout),
                config=_deepspeed_config(blueprint),
            )
        self.optimizer = self.zero_optimizer.optimizer
        self.fresh = True  # no backward since the last update
        self.gather_once = self.zero_stage == 3 and self.layout.config.gather == "step"
        if self.gather_once:
            self.zero_optimizer.parameter_offload.destroy()  # workaround 8: removes the hooks
        self._map_into_files(model, self.layout.config)

    @classmethod
    def prepare(cls, blueprint: Blueprint) -> ShardUnit:
        """See Engine.prepare. Stage 3 shards units; the other stages leave them whole."""
        layout, config = blueprint.layout, _deepspeed_config(blueprint)
        skip_shared_memory_op()
        with device_as_local_rank(layout.device):
            deepspeed.init_distributed(dist_init_required=False, verbose=False)
        confine_zero3_comparison(layout.stage_group, layout.device)  # workaround 5
        nearby = _start_nearby_group(layout)
        if layout.config.zero_stage < 3:
            return lambda unit: None

        def shard(unit: nn.Module) -> None:
            with device_as_local_rank(layout.device):
                deepspeed.zero.Init(
                    module=unit,
                    data_parallel_group=layout.data_group,
                    zero_param_parallel_group=nearby,
                    config_dict_or_path=config,
                    dtype=blueprint.dtype,
                )

        return shard

    def _map_into_files(self, model: PaLI, config: ParallelConfig) -> None:
        """Map memory that is offloaded to "nvme" into files (workaround 10).

        Tensors are changed in place, because DeepSpeed holds several references to each.
        """
        disk = Disk(config.offload_folder or "")
        if config.offload_parameters == "nvme":
            for group, flat in enumerate(self.zero_optimizer.fp16_partitioned_groups_flat):
                flat.data = disk.copy(flat.data)
                self.zero_optimizer._unflatten_partitioned_parameters(group)
            self.zero_optimizer.param_groups_fp16_flat_cpu_memory.clear()
            for parameter in model.parameters():
                if not parameter.requires_grad and parameter.ds_tensor.is_cpu:  # type: ignore[attr-defined]
                    parameter.ds_tensor.data = disk.copy(parameter.ds_tensor.data)  # type: ignore[attr-defined]
        if config.offload_optimizer == "nvme":
            self.optimizer.disk = disk
            for flat in self._flat_weights():
                flat.data = disk.copy(flat.data)

    def shards(self) -> list[Shard]:
        """See Engine.shards."""
        shards = [Shard(flat, []) for flat in self._flat_weights()]
        for parameter, part in parameter_parts(self.model):
            if parameter.requires_grad and (where := self._locate(parameter)):
                group, start, first, count = where
                shards[group].rectangles += self._rectangles(parameter, part, first, count, start)
        return shards

    def _flat_weights(self) -> list[Tensor]:
        if self.zero_stage == 3:
            return self.zero_optimizer.fp32_partitioned_groups_flat
        if self.bf16_optimizer:
            return self.zero_optimizer.fp32_groups_flat_partition
        return self.zero_optimizer.single_partition_of_fp32_groups

    @property
    def bf16_optimizer(self) -> bool:
        """Return whether DeepSpeed runs its extra class for stage 1 with bf16 parameters and fp32 accumulation."""
        return isinstance(self.zero_optimizer, BF16_Optimizer)

    def _locate(self, parameter: Any) -> tuple[int, int, int, int] | None:
        """Locate this rank's shard of a parameter (workaround 12).

        Return (number of the flat tensor, start in it, first element of the flattened parameter, number of elements),
        or None where this rank holds nothing of the parameter.
        """
        if self.zero_stage == 3:
            group, start, count = self.zero_optimizer.grad_position[self.zero_optimizer.get_param_id(parameter)]
            return group, start, self.layout.data_parallel_rank * count, count
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        return (
            mapping.param_group_index,
            mapping.hp_fragment_address.start,
            mapping.lp_fragment_address.start,
            mapping.lp_fragment_address.numel,
        )

    def frozen_rectangles(self) -> list[tuple[Rectangle, Tensor]]:
        """See Engine.frozen_rectangles."""
        found = []
        for parameter, part in parameter_parts(self.model):
            if parameter.requires_grad:
                continue
            local: Any = parameter
            values = local.ds_tensor if self.zero_stage == 3 else parameter.detach().flatten()
            first = self.layout.data_parallel_rank * values.numel() if self.zero_stage == 3 else 0
            found += [(r, r.view(values)) for r in self._rectangles(parameter, part, first, values.numel(), 0)]
        return found

    def _rectangles(self, parameter: nn.Parameter, part: Part, first: int, count: int, start: int) -> list[Rectangle]:
        return rectangles([part], first, count, start, is_counted(parameter, self.layout.tensor_parallel_rank))

    @torch.no_grad()
    def publish(self) -> None:
        """Do as DeepSpeed after an optimizer step: fp32 shards -> 16-bit shards -> (stages 1, 2) all ranks."""
        if self.zero_stage == 3:
            for group in range(len(self.zero_optimizer.fp16_groups)):
                self.zero_optimizer._reassign_or_swap_out_partitioned_parameters(group)
            for parameter in self.model.parameters():
                parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]  # workaround 9
            return
        if self.bf16_optimizer:
            self.zero_optimizer.update_lp_params()
            return
        rank = self.layout.data_parallel_rank
        for flats, weights, flat in zip(
            self.zero_optimizer.parallel_partitioned_bit16_groups,
            self.zero_optimizer.single_partition_of_fp32_groups,
            self.zero_optimizer.bit16_groups_flat,
            strict=True,
        ):
            flats[rank].copy_(weights)
            dist.all_gather_into_tensor(flat, flats[rank].clone(), group=self.layout.data_group)

    def forward_backward(self, micro_batches: Sequence[MicroBatch], num_targets: int) -> LossTotals:
        """See Engine.forward_backward."""
        if self.gather_once:
            self._gather()  # workaround 8: gathered until the optimizer steps
        return super().forward_backward(micro_batches, num_targets)

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> LossTotals:
        """See Engine.evaluate."""
        with self._gathered():
            return super().evaluate(micro_batches)

    def generate(self, batch: MicroBatch, max_new_tokens: int, **search: Any) -> Tensor:
        """See Engine.generate."""
        with self._gathered():
            return super().generate(batch, max_new_tokens, **search)

    def score(self, batch: MicroBatch, targets: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """See Engine.score."""
        with self._gathered():
            return super().score(batch, targets)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Gather all parameters for the body, where the hooks that would gather them are removed."""
        if not self.gather_once:
            yield
            return
        gathered = self._gather()
        try:
            yield
        finally:
            for parameter in gathered:
                parameter.partition()

    def _gather(self) -> list[Any]:
        """Gather the sharded parameters and return them; those of one form in a unit take one collective."""
        gathered: list[Any] = []
        for unit in self.model.children():
            by_form: dict[tuple[bool, bool], list[Any]] = defaultdict(list)  # workaround 9: forms are not mixed
            for parameter in filter(_is_sharded, unit.parameters()):
                by_form[_form(parameter)].append(parameter)
            for (quantized, _), sharded in by_form.items():
                sharded[0].all_gather_coalesced(sharded, quantize=quantized).wait()
                gathered += sharded
        return gathered

    def backward(self, loss: Tensor) -> None:
        """See Engine.backward."""
        self.zero_optimizer.clear_backward_seen_flag()  # workaround 6
        self.zero_optimizer.backward_prologue()
        if self.fresh and self.zero_stage == 3 and len(self.blueprint.local_stages) > 1:
            self._zero_gradients()  # workaround 7
        self.fresh = False
        self.deepspeed_engine.backward(loss, scale_wrt_gas=False)

    def _zero_gradients(self) -> None:
        for gradient in self.zero_optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values():
            gradient.zero_()
        self.zero_optimizer.micro_step_id = 1  # not 0 -> DeepSpeed adds to the gradients

    def apply_update(self) -> float:
        """See Engine.apply_update."""
        self.deepspeed_engine.step()
        self.fresh = True
        norm = float(self.zero_optimizer._global_grad_norm)
        # workaround 3: -1 is a norm that is not finite
        return norm if norm >= 0 and not self.zero_optimizer.overflow else math.nan


@contextmanager
def device_as_local_rank(device: torch.device) -> Iterator[None]:
    """Set the variables from which DeepSpeed takes the number of this rank's GPU (workaround 11)."""
    names = {"LOCAL_RANK", *(name for name in ("OMPI_COMM_WORLD_LOCAL_RANK",) if name in os.environ)}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, str(device.index or 0)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _is_sharded(parameter: Any) -> bool:
    return parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE  # type: ignore[no-any-return]


def _form(parameter: Any) -> tuple[bool, bool]:
    """Return (whether its shard is quantized, whether nearby ranks hold a second copy), both of ZeRO++."""
    return hasattr(parameter.ds_tensor, "ds_quant_scale"), parameter.ds_secondary_tensor is not None


def _start_nearby_group(layout: Layout) -> dist.ProcessGroup | None:
    """Start the group of data-parallel ranks that share a second copy of parameters (workaround 9).

    Return None where `hpz_partition_size` is 1. A collective of the group.
    """
    size, ranks = layout.config.hpz_partition_size, dist.get_process_group_ranks(layout.data_group)
    if size == 1:
        return None
    first = layout.data_parallel_rank // size * size
    timeout = timedelta(seconds=layout.config.timeout_s)  # the default would be DeepSpeed's or torch's own
    group = dist.new_group(ranks[first : first + size], timeout, use_local_synchronization=True)
    set_secondary_group(group)
    return group


def _deepspeed_config(blueprint: Blueprint) -> dict[str, Any]:
    layout, dtype, clipping = blueprint.layout, blueprint.dtype, blueprint.optimizer.gradient_clipping
    stage, gather_once = layout.config.zero_stage, layout.config.gather == "step"
    offload, on_gpu = (layout.config.offload_optimizer, layout.config.offload_parameters), layout.device.type == "cuda"
    # workaround 10: to DeepSpeed, "nvme" is the CPU; pinned memory cannot be mapped into files
    optimizer, parameters = ({"device": "cpu", "pin_memory": on_gpu and where == "cpu"} for where in offload)
    return {
        "train_micro_batch_size_per_gpu": 1,  # required by DeepSpeed, but rows are counted by the caller
        "zero_force_ds_cpu_optimizer": False,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # workaround 1
        "gradient_clipping": clipping or 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},  # workaround 3
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": layout.config.reduce_dtype,
        "zero_optimization": {
            "stage": stage,
            # With workaround 1, DeepSpeed allows it where gradients are partitioned; a CPU has no streams.
            "overlap_comm": stage >= 2 and on_gpu,
            **BUFFERS,
            "sub_group_size": WHOLE_MODEL,  # workaround 4
            # workaround 8: no tensor persists under `gather: step`
            "stage3_param_persistence_threshold": 0 if gather_once else layout.config.param_persistence_threshold,
            "round_robin_gradients": False,
            **({"offload_optimizer": optimizer} if offload[0] != "none" else {}),
            **({"offload_param": parameters} if offload[1] != "none" else {}),
            "zero_hpz_partition_size": layout.config.hpz_partition_size,
            "zero_quantized_weights": layout.config.quantized_weights,
            "zero_quantized_gradients": layout.config.quantized_gradients,
        },
    }
