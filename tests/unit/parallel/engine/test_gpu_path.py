"""The replicated engine's path on a GPU, with `meta` in its place: the waits for the device of a step, line by line."""

import pytest

from parallel.config import OptimizerConfig, ParallelConfig
from parallel.engine.build import build_engine
from parallel.layout import Layout
from tests.unit.gpu_on_meta import META, Waits, fake_group
from tests.unit.model.examples import PALI, example, micro_batch

FROZEN_VIT = ["patches.*", "vit_block_*", "bridge.vit_norm.*"]
# Each line waits for all work that the device has queued: a new one needs a reason.
UPDATE = {
    "parallel/engine/replicated.py: return float(squares.sqrt())": 1,  # the norm decides whether to update
}
ADAFACTOR = {
    "parallel/optimizer/adafactor.py: " + line: times
    for line, times in {
        "both = torch.stack([steps, clips]).tolist()": 1,
        # Lists of the host, copied from pageable memory.
        "counts = weight_sums.new_tensor([shape.numel() for shape in self.shapes.values()])": 1,
        "steps = weight_sums.new_tensor([self.learning_rate(name) for name in self.shapes])": 1,
        "sums.index_put_((torch.tensor(index, device=sums.device),), _squared_sums(tensors), accumulate=True)": 2,
    }.items()
}


def layout(tensor: int, sequence: bool) -> Layout:
    """Two replicas of `tensor` ranks; collectives do nothing."""
    parallel = ParallelConfig(tensor=tensor, sequence=sequence, recompute="block")
    one, data, all_ranks = fake_group(0, 1), fake_group(0, 2), fake_group(0, 2 * tensor)
    group = fake_group(0, tensor)
    return Layout(parallel, META, 0, 2 * tensor, group, one, data, group, all_ranks)


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, True)])
def test_waits_of_a_step(waits: Waits, tensor: int, sequence: bool, optimizer: str) -> None:
    engine = build_engine(PALI, OptimizerConfig(name=optimizer, gradient_clipping=1.0), layout(tensor, sequence),
                          precision="bf16", freeze=FROZEN_VIT, seed=None)  # fmt: skip
    batches = [micro_batch([[example(1), example(2, images=0)], [example(3, images=2)]], 60, 20) for _ in range(2)]
    waits.lines.clear()
    engine.forward_backward(batches, 64)
    assert waits.lines == {}, "forward and backward"
    engine.update(1e-3)
    assert waits.lines == UPDATE | (ADAFACTOR if optimizer == "adafactor" else {}), "update"
    waits.lines.clear()
    engine.evaluate(batches)
    assert waits.lines == {}, "evaluation"
