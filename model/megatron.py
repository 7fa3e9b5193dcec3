"""The seam to Megatron-Core: the only file that imports it."""

from common.library_patches import let_megatron_plan, let_megatron_use_cpus, without_compilers_and_loggers

with without_compilers_and_loggers():
    from megatron.core import ModelParallelConfig, parallel_state
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
        copy_to_tensor_model_parallel_region,
        gather_from_sequence_parallel_region,
        layers,
        scatter_to_sequence_parallel_region,
    )

let_megatron_plan(layers)
let_megatron_use_cpus()

__all__ = [
    "ColumnParallelLinear",
    "ModelParallelConfig",
    "RowParallelLinear",
    "VocabParallelEmbedding",
    "copy_to_tensor_model_parallel_region",
    "gather_from_sequence_parallel_region",
    "parallel_state",
    "scatter_to_sequence_parallel_region",
]
