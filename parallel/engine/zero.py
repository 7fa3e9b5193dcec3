"""ZeRO stages 1, 2 and 3: one DeepSpeed engine over the data-parallel ranks. Every DeepSpeed peculiarity lives in this
file.

DeepSpeed 0.19.8 shards memory, gathers and reduces; schedule, loss scale, learning rate, optimizer and checkpoints are
ours. What that takes (tests/distributed/test_options_workarounds.py tells when one of these is no longer needed):

1. `managed_gradient_accumulation: false`: the caller decides when a step is over, and has scaled the loss already.
2. Gradients are averaged over the data-parallel ranks; our loss is normalised by the global number of targets, so it
   is scaled up.
3. The gradient norm counts a parameter on every model-parallel rank only if `parameter.model_parallel` is true: it is
   set so that
   each logical element is counted once. A norm that is not finite is reported as -1 and the step is skipped
   (`check_grad_overflow`).
4. One sub-group (`sub_group_size`): the optimizer sees all shards in one step, and reduces its statistics in one
   collective.
5. ZeRO-3 compares parameter ids over the whole world, but pipeline stages differ: confined to the stage.
6. DeepSpeed counts micro-batches in `engine.forward`; two backwards in a row (1F1B's cool-down, GPipe) would overwrite
   gradients. `clear_backward_seen_flag` before each backward counts them there; with `backward_prologue`, which clears
   16-bit gradients, `engine.forward` is not needed.
7. ZeRO-3 overwrites gradients in the first backward of a step and adds in the others; where a rank holds several
   (interleaved) stages, the first backward of the second stage is not the first, so gradients are zeroed and added.
8. ZeRO-3 gathers and releases parameters module by module, in hooks that cost more than the work of a small module, and
   releases them at the latest when the optimizer steps. To keep parameters gathered over the micro-batches of a step
   (`gather: step`), the hooks are removed, and units are gathered when the step begins, each in one collective. Then
   no tensor persists: DeepSpeed would gather those one by one after every update.
9. ZeRO++'s groups of nearby ranks are made by us: DeepSpeed takes neighbours in the world, who may be tensor-parallel,
   and makes them anew for every unit that is sharded. Their second copies are dropped when weights are loaded, and made
   again from those: DeepSpeed drops those of trained parameters after an update, and no others ever. Parameters with a
   second copy and those without are never gathered together.
10. DeepSpeed's NVMe offload reads state back sub-group by sub-group, but there is one only, and our optimizers keep
   their state themselves. So it offloads to the CPU, and that memory is mapped into files; of parameters too, so that
   one mechanism, and one folder, holds everything.
11. It asks for LOCAL_RANK even where there is one process, which no launcher started.
12. Shards are found through `grad_position` (stage 3) or `_hp_mapping` (stages 1, 2): DeepSpeed has no public map.
13. Stages 1 and 2 reduce after every backward, and fail if it has reached none of their parameters: the backward of a
   pipeline stage in which nothing is trained never comes here (parallel/pipeline/schedule.py).
"""

import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero import partition_parameters, partitioned_param_coordinator, stage3
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import groups
from torch import Tensor, nn

from model.batch import MicroBatch
from model.layers import Part, parameter_parts
from model.loss import LossTotals
from model.pali import PaLI
from parallel.config import ParallelConfig
from parallel.engine.base import Engine, make_optimizer, reduce_partial_gradients
from parallel.file_backed import Disk
from parallel.layout import Layout
from parallel.optimizer.base import Shard
from parallel.plan.blueprint import Blueprint, materialize
from parallel.shards import Rectangle, count_once, rectangles

EVERYTHING = 10**15  # elements: larger than any model

for name in ("DeepSpeed", "deepspeed"):  # it announces itself on every rank
    logging.getLogger(name).setLevel(logging.ERROR)


class ModelParallelUnit:
    """What DeepSpeed asks of an `mpu`; its "model parallel" is tensor x pipeline."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.layout.data_group

    def get_data_parallel_rank(self) -> int:
        return self.layout.data_group.rank()

    def get_data_parallel_world_size(self) -> int:
        return self.layout.data_group.size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.layout.model_group

    def get_model_parallel_rank(self) -> int:
        return self.layout.model_group.rank()

    def get_model_parallel_world_size(self) -> int:
        return self.layout.model_group.size()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.layout.tensor_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self.layout.tensor_group.rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.layout.tensor_group.size()


class ZeroEngine(Engine):
    """Optimizer state and fp32 weights (1), gradients (2) and parameters (3) are sharded over the data-parallel
    ranks."""

    def __init__(self, blueprint: Blueprint) -> None:
        layout = blueprint.layout
        self.stage, self.gradient_scale = layout.config.zero_stage, float(layout.data_parallel_size)
        os.environ.setdefault("LOCAL_RANK", "0")
        deepspeed.init_distributed(dist_init_required=False, verbose=False)
        _compare_within(layout.stage_group)
        config = _deepspeed_config(blueprint)
        nearby = _nearby_ranks(layout)

        def shard(unit: nn.Module) -> None:
            deepspeed.zero.Init(
                module=unit,
                data_parallel_group=layout.data_group,
                zero_param_parallel_group=nearby,
                config_dict_or_path=config,
                dtype=blueprint.dtype,
            )

        pali = materialize(blueprint, **({"place": shard} if self.stage == 3 else {}))
        reduce_partial_gradients(pali, layout)
        for parameter in pali.parameters():
            parameter.model_parallel = count_once(parameter, layout.tensor_parallel_rank)  # type: ignore[attr-defined]
        trained = [p for p in pali.parameters() if p.requires_grad]
        self.engine, self.zero, _, _ = deepspeed.initialize(
            model=pali,
            optimizer=make_optimizer(trained, blueprint.optimizer),
            model_parameters=trained,
            mpu=ModelParallelUnit(layout),
            config=config,
        )
        self.fresh = True  # no backward since the last update
        self.gather_once = self.stage == 3 and layout.config.gather == "step"
        if self.gather_once:
            self.zero.parameter_offload.destroy()  # the hooks
        self._map_into_files(pali, layout.config)
        super().__init__(blueprint, pali, self.zero.optimizer, layout.stage_group)

    def _map_into_files(self, pali: PaLI, config: ParallelConfig) -> None:
        """What is offloaded to "nvme": in place, because DeepSpeed has several names for one tensor."""
        disk = Disk(config.offload_folder or "")
        if config.offload_parameters == "nvme":
            for group, flat in enumerate(self.zero.fp16_partitioned_groups_flat):
                flat.data = disk.copy(flat.data)
                self.zero._unflatten_partitioned_parameters(group)
            self.zero.param_groups_fp16_flat_cpu_memory.clear()
            for parameter in pali.parameters():
                if not parameter.requires_grad and parameter.ds_tensor.is_cpu:  # type: ignore[attr-defined]
                    parameter.ds_tensor.data = disk.copy(parameter.ds_tensor.data)  # type: ignore[attr-defined]
        if config.offload_optimizer == "nvme":
            self.zero.optimizer.disk = disk
            for flat in self._flat_weights():
                flat.data = disk.copy(flat.data)

    def shards(self) -> list[Shard]:
        shards = [Shard(flat, []) for flat in self._flat_weights()]
        for parameter, part in parameter_parts(self.model):
            if parameter.requires_grad and (place := self._place(parameter)):
                group, start, first, count = place
                shards[group].rectangles += self._rectangles(parameter, part, first, count, start)
        return shards

    def _flat_weights(self) -> list[Tensor]:
        if self.stage == 3:
            return self.zero.fp32_partitioned_groups_flat
        return (
            self.zero.fp32_groups_flat_partition if self.bf16_optimizer else self.zero.single_partition_of_fp32_groups
        )

    @property
    def bf16_optimizer(self) -> bool:
        """DeepSpeed runs stage 1 with bf16 parameters and fp32 accumulation in a class of its own."""
        return isinstance(self.zero, BF16_Optimizer)

    def _place(self, parameter: Any) -> tuple[int, int, int, int] | None:
        """(flat tensor, start in it, first element of the flattened parameter, number of elements) of this rank's
        shard."""
        if self.stage == 3:
            group, start, count = self.zero.grad_position[self.zero.get_param_id(parameter)]
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

    def frozen_pieces(self) -> list[tuple[Rectangle, Tensor]]:
        found = []
        for parameter, part in parameter_parts(self.model):
            if parameter.requires_grad:
                continue
            local: Any = parameter
            values = local.ds_tensor if self.stage == 3 else parameter.detach().flatten()
            first = self.layout.data_parallel_rank * values.numel() if self.stage == 3 else 0
            found += [(r, r.view(values)) for r in self._rectangles(parameter, part, first, values.numel(), 0)]
        return found

    def _rectangles(self, parameter: nn.Parameter, part: Part, first: int, count: int, start: int) -> list[Rectangle]:
        return rectangles([part], first, count, start, count_once(parameter, self.layout.tensor_parallel_rank))

    @torch.no_grad()
    def publish(self) -> None:
        """What DeepSpeed does after an optimizer step: fp32 shards -> 16-bit shards -> (stages 1, 2) all ranks."""
        if self.stage == 3:
            for group in range(len(self.zero.fp16_groups)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            for parameter in self.model.parameters():
                parameter.ds_secondary_tensor = None  # type: ignore[attr-defined]
            return
        if self.bf16_optimizer:
            self.zero.update_lp_params()
            return
        rank = self.layout.data_parallel_rank
        for flats, weights, flat in zip(
            self.zero.parallel_partitioned_bit16_groups,
            self.zero.single_partition_of_fp32_groups,
            self.zero.bit16_groups_flat,
            strict=True,
        ):
            flats[rank].copy_(weights)
            dist.all_gather_into_tensor(flat, flats[rank].clone(), group=self.layout.data_group)

    def forward_backward(self, micro_batches: Sequence[MicroBatch], num_targets: int) -> LossTotals:
        if self.gather_once:
            self._gather()  # until the optimizer steps
        return super().forward_backward(micro_batches, num_targets)

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> LossTotals:
        with self._gathered():
            return super().evaluate(micro_batches)

    def generate(self, batch: MicroBatch, max_new_tokens: int) -> Tensor:
        with self._gathered():
            return super().generate(batch, max_new_tokens)

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        """Whole parameters where no hooks gather them."""
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
        """Gather what is not there, all of one form in a unit in one collective; returns it."""
        gathered: list[Any] = []
        for unit in self.model.children():
            by_form: dict[tuple[bool, bool], list[Any]] = defaultdict(list)
            for parameter in filter(_is_sharded, unit.parameters()):
                by_form[_form(parameter)].append(parameter)
            for (quantized, _), sharded in by_form.items():
                sharded[0].all_gather_coalesced(sharded, quantize=quantized).wait()
                gathered += sharded
        return gathered

    def backward(self, loss: Tensor) -> None:
        self.zero.clear_backward_seen_flag()
        self.zero.backward_prologue()
        if self.fresh and self.stage == 3 and len(self.blueprint.local_stages) > 1:
            self._zero_gradients()
        self.fresh = False
        self.engine.backward(loss, scale_wrt_gas=False)

    def _zero_gradients(self) -> None:
        for gradient in self.zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition.values():
            gradient.zero_()
        self.zero.micro_step_id = 1  # anything but 0: add to the gradients

    def apply_update(self) -> float:
        self.engine.step()
        self.fresh = True
        norm = float(self.zero._global_grad_norm)
        return norm if norm >= 0 and not self.zero.overflow else math.nan


def _is_sharded(parameter: Any) -> bool:
    return parameter.ds_status == ZeroParamStatus.NOT_AVAILABLE  # type: ignore[no-any-return]


def _form(parameter: Any) -> tuple[bool, bool]:
    """Whether its shard is quantized, and whether nearby ranks hold a second copy (both of ZeRO++)."""
    return hasattr(parameter.ds_tensor, "ds_quant_scale"), parameter.ds_secondary_tensor is not None


def _compare_within(group: dist.ProcessGroup) -> None:
    """Confine ZeRO-3's comparison of parameter ids to the ranks that hold the same stage."""

    def compare(numbers: list[int]) -> None:
        mine = torch.tensor(numbers, dtype=torch.int64)
        if numbers:
            mine -= mine.min()  # DeepSpeed counts modules over the life of a process, and stages have different numbers
        least, largest = mine.clone(), mine.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN, group=group)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        if not torch.equal(least, largest):
            raise RuntimeError(f"ranks of one pipeline stage run different modules: {numbers} here")

    for module in (partition_parameters, partitioned_param_coordinator, stage3):
        module.assert_ints_same_as_other_ranks = compare


def _nearby_ranks(layout: Layout) -> dist.ProcessGroup | None:
    """The group of `hpz_partition_size` data-parallel ranks that this one shares a second copy of parameters with."""
    size, ranks = layout.config.hpz_partition_size, dist.get_process_group_ranks(layout.data_group)
    if size == 1:
        return None
    first = layout.data_parallel_rank // size * size
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = dist.new_group(
        ranks[first : first + size], use_local_synchronization=True
    )
    return groups._ZERO_PARAM_INTRA_PARALLEL_GROUP


def _deepspeed_config(blueprint: Blueprint) -> dict[str, Any]:
    layout, dtype, clipping = blueprint.layout, blueprint.dtype, blueprint.optimizer.gradient_clipping
    stage, gather_once = layout.config.zero_stage, layout.config.gather == "step"
    offload, on_gpu = (layout.config.offload_optimizer, layout.config.offload_parameters), layout.device.type == "cuda"
    optimizer, parameters = ({"device": "cpu", "pin_memory": on_gpu and where == "cpu"} for where in offload)
    return {
        "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants a number; rows are counted by us
        "zero_force_ds_cpu_optimizer": False,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clipping or 0.0,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16, "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": stage == 2 and on_gpu,  # DeepSpeed allows it with the caller's accumulation in stage 2 only
            "sub_group_size": EVERYTHING,
            "stage3_param_persistence_threshold": 0 if gather_once else layout.config.param_persistence_threshold,
            "round_robin_gradients": False,
            **({"offload_optimizer": optimizer} if offload[0] != "none" else {}),
            **({"offload_param": parameters} if offload[1] != "none" else {}),
            "zero_hpz_partition_size": layout.config.hpz_partition_size,
            "zero_quantized_weights": layout.config.quantized_weights,
            "zero_quantized_gradients": layout.config.quantized_gradients,
        },
    }
