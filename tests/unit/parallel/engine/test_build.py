"""The engine is built from the plan that the checks made, and starts with the optimizer bound to its shards."""

from dataclasses import replace

import pytest

from common.errors import ConfigurationError
from parallel.config import OptimizerConfig, ParallelConfig, ParameterGroup
from parallel.distributed import launch
from parallel.engine.build import DTYPES, build_engine
from parallel.layout import Layout
from parallel.plan.blueprint import plan_stages
from parallel.plan.memory import MemoryModel, StepShape
from tests.distributed.problem import FROZEN_VIT, PALI
from tests.unit.model.examples import PALI as SMALL
from tests.unit.model.examples import example, micro_batch
from tests.unit.test_imports import imported_at_once


@pytest.fixture(scope="module")
def layout() -> Layout:
    return Layout.start(ParallelConfig(recompute="block"), launch())


@pytest.mark.parametrize("precision", list(DTYPES))
def test_the_built_plan_is_the_checked_one(layout: Layout, precision: str) -> None:
    """`plan_stages` without a layout is the check on a login node."""
    step = StepShape.from_one_example(PALI, layout.config, DTYPES[precision])
    checked, stages = plan_stages(PALI, FROZEN_VIT, MemoryModel(layout.config, OptimizerConfig(), step, 1))
    engine = build_engine(PALI, OptimizerConfig(), layout, precision=precision, freeze=FROZEN_VIT)
    assert engine.blueprint.stages == stages
    built = dict(engine.blueprint.plan.named_parameters())
    assert {name: (p.shape, p.requires_grad) for name, p in checked.named_parameters()} == {
        name: (p.shape, p.requires_grad) for name, p in built.items()
    }
    assert [unit.recompute for _, unit in checked.units()] == [unit.recompute for _, unit in engine.model.units()]
    assert all(p.is_meta for p in checked.parameters()) and not any(p.is_meta for p in built.values())
    trained = {name for shard in engine.optimizer.shards for name in [r.name for r in shard.rectangles]}
    assert (
        trained
        == engine.optimizer.ages.keys()
        == {r.name for r, _ in engine.held_weights()} - {r.name for r, _ in engine.frozen_rectangles()}
    )


@pytest.mark.parametrize(
    ("freeze", "group", "message"),
    [
        (["*"], None, r"The freeze patterns \['\*'\] leave nothing to train; remove one."),
        (["vit_blok_*"], None, "The freeze pattern 'vit_blok_\\*' matches no parameter"),
        ([], "vit_blok_*", "optimizer.groups: the pattern 'vit_blok_\\*' matches no parameter"),
    ],
)
def test_patterns_that_match_nothing_or_all(layout: Layout, freeze: list[str], group: str | None, message: str) -> None:
    groups = [ParameterGroup(group)] if group else []
    with pytest.raises(ConfigurationError, match=message):
        build_engine(PALI, replace(OptimizerConfig(), groups=groups), layout, freeze=freeze)


def test_the_gradient_of_a_sum_is_that_of_the_mean_times_the_targets(layout: Layout) -> None:
    batch, norms = micro_batch([[example(1), example(2, images=0)]], 60, 20), []
    targets = int((batch.decoder_targets > 0).sum())
    for reduction in ("mean", "sum"):
        config = replace(SMALL, model=replace(SMALL.model, loss_reduction=reduction))
        engine = build_engine(config, OptimizerConfig(), layout, precision="fp32", seed=0)
        engine.forward_backward([batch], targets)
        norms.append(engine.update(0.0))
    assert norms[1] == pytest.approx(targets * norms[0], rel=1e-5) and norms[0] > 0


def test_only_zero_3_imports_deepspeed() -> None:
    assert "deepspeed" not in imported_at_once("parallel.engine.build", set())
    assert "deepspeed" in imported_at_once("parallel.engine.zero3", set())
