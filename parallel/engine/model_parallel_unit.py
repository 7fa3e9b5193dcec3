"""Answer DeepSpeed's questions about process groups."""

import torch.distributed as dist

from parallel.layout import Layout


class ModelParallelUnit:
    """Give DeepSpeed our groups, as the `mpu` that it expects; its "model parallel" is tensor x pipeline."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Return the ranks that read different rows."""
        return self.layout.data_group

    def get_data_parallel_rank(self) -> int:
        """Return this rank's number among them."""
        return self.layout.data_group.rank()

    def get_data_parallel_world_size(self) -> int:
        """Return their number."""
        return self.layout.data_group.size()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Return the ranks of this replica."""
        return self.layout.model_group

    def get_model_parallel_rank(self) -> int:
        """Return this rank's number among them."""
        return self.layout.model_group.rank()

    def get_model_parallel_world_size(self) -> int:
        """Return their number."""
        return self.layout.model_group.size()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """Return the ranks that hold blocks of the same tensors."""
        return self.layout.tensor_group

    def get_tensor_model_parallel_rank(self) -> int:
        """Return this rank's number among them."""
        return self.layout.tensor_group.rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        """Return their number."""
        return self.layout.tensor_group.size()
