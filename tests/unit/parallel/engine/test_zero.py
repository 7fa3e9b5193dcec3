"""ZeRO of every stage in one process trains, evaluates and answers as the replicated engine does.

Worlds of several processes are in tests/distributed; most calls into DeepSpeed are made here too.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import groups
from torch import Tensor

from parallel.config import OptimizerConfig, ParallelConfig
from parallel.distributed import launch
from parallel.engine import zero3
from parallel.engine.base import Engine
from parallel.engine.build import build_engine
from parallel.layout import Layout
from tests.distributed.problem import (
    FROZEN_VIT,
    PALI,
    micro_batches,
    train,
    validate,
    weight_deviation,
    weights,
)


@pytest.fixture(autouse=True)
def local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine sets it for DeepSpeed; no other test shall find it."""
    monkeypatch.setenv("LOCAL_RANK", "0")


def engine_of(freeze: list[str], precision: str, **parallel: Any) -> Engine:
    return build_engine(
        PALI,
        OptimizerConfig(gradient_clipping=0.5),
        Layout.start(ParallelConfig(**parallel), launch()),
        precision=precision,
        freeze=freeze,
        seed=1,
    )


def trained(freeze: list[str], precision: str = "fp32", **parallel: Any) -> tuple[list[Any], dict[str, Tensor]]:
    """Losses, gradient norms, validation totals and answers of two steps, and the weights after them."""
    engine = engine_of(freeze, precision, **parallel)
    curve = train(engine, range(2))
    engine.forward_backward(micro_batches(0)[:1], num_targets=1)
    engine.discard()  # leaves nothing in the next step
    curve += train(engine, range(2, 3))
    answers = engine.generate(micro_batches(0)[0], 4)
    return [curve, validate(engine), answers], weights(engine)


@pytest.fixture(scope="module")
def replicated() -> dict[str, Any]:
    return {str(freeze): trained(freeze) for freeze in ([], FROZEN_VIT)}


@pytest.mark.parametrize(
    ("parallel", "freeze"),
    [
        ({"zero_stage": 1}, []),
        ({"zero_stage": 2, "reduce": "micro_batch"}, FROZEN_VIT),
        ({"zero_stage": 3, "param_persistence_threshold": 0, "recompute": "elementwise"}, FROZEN_VIT),
        ({"zero_stage": 3, "param_persistence_threshold": 100, "gather": "step"}, []),
    ],
)
def test_every_stage_is_the_replicated_engine(
    replicated: dict[str, Any], parallel: dict[str, Any], freeze: list[str]
) -> None:
    (curve, totals, answers), expected_weights = replicated[str(freeze)]
    (found, found_totals, found_answers), found_weights = trained(freeze, **parallel)
    for pair, wanted in zip(found, curve, strict=True):
        assert pair == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(found_totals, totals, rtol=1e-5, atol=0.0)
    assert torch.equal(found_answers, answers)
    for name, values in expected_weights.items():
        assert weight_deviation(name, found_weights[name], values) <= 1e-5, name


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_step_without_targets_has_a_gradient_norm_of_zero(zero_stage: int) -> None:
    engine = engine_of([], "fp32", zero_stage=zero_stage)
    totals = engine.forward_backward([micro_batches(0)[0].emptied()], num_targets=0)
    assert float(totals.loss) == 0.0
    assert engine.update(0.1) == 0.0


def test_nearby_ranks_are_those_next_to_each_other_among_the_data_parallel_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Four data-parallel ranks, two tensor-parallel ones each, in groups of two."""
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: group)
    monkeypatch.setattr(dist, "new_group", lambda ranks, timeout, use_local_synchronization: ranks)
    monkeypatch.setattr(groups, "_ZERO_PARAM_INTRA_PARALLEL_GROUP", None)

    def nearby(rank: int, size: int) -> Any:
        config = ParallelConfig(tensor=2, zero_stage=3, hpz_partition_size=size)
        layout: Any = SimpleNamespace(config=config, data_group=[0, 2, 4, 6], data_parallel_rank=rank)
        return zero3._start_nearby_group(layout)

    assert [nearby(rank, 1) for rank in range(4)] == [None] * 4
    assert groups._ZERO_PARAM_INTRA_PARALLEL_GROUP is None
    assert [nearby(rank, 2) for rank in range(4)] == [[0, 2], [0, 2], [4, 6], [4, 6]]
    assert groups._ZERO_PARAM_INTRA_PARALLEL_GROUP == [4, 6]
    assert nearby(3, 4) == [0, 2, 4, 6]
