"""Parameter groups: the step of a tensor is scaled and warmed up by the last group that matches its name."""

import pytest
import torch
from torch import Tensor

from common.errors import ConfigurationError
from parallel.config import OptimizerConfig, ParallelConfig, ParameterGroup
from parallel.distributed import launch
from parallel.engine.build import build_engine
from parallel.layout import Layout
from tests.distributed.problem import PALI, train, weights

HALF, NONE, SLOW = "encoder_block_0.*", "vit_block_*", "head.output.weight"


def steps_of(optimizer: OptimizerConfig, steps: int = 1) -> dict[str, Tensor]:
    """How far each weight has moved."""
    layout = Layout.start(ParallelConfig(), launch())
    engine = build_engine(PALI, optimizer, layout, seed=1)
    before = weights(engine)
    train(engine, range(steps))
    return {name: after - before[name] for name, after in weights(engine).items()}


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_steps_are_scaled_and_warmed_up(name: str) -> None:
    groups = [
        ParameterGroup("*", learning_rate_factor=3.0),  # overruled by those after it where they match
        ParameterGroup(HALF, learning_rate_factor=0.5),
        ParameterGroup(NONE, learning_rate_factor=0.0),
        ParameterGroup(SLOW, warmup_steps=4),
    ]
    plain, grouped = steps_of(OptimizerConfig(name)), steps_of(OptimizerConfig(name, groups=groups))
    for key, moved in grouped.items():
        factor = 3.0
        for prefix, own in (("encoder_block_0", 0.5), ("vit_block_", 0.0), ("head.output", 0.25)):
            factor = own if key.startswith(prefix) else factor
        assert torch.allclose(moved, factor * plain[key], rtol=1e-4, atol=2e-6), key
        assert bool(moved.any()) == (factor > 0), key


def test_weight_decay_of_a_group() -> None:
    name = "encoder_block_0.mlp_out.out.weight"
    plain = steps_of(OptimizerConfig("adamw", weight_decay=0.5, groups=[ParameterGroup("vit*", weight_decay=0.0)]))
    without = steps_of(OptimizerConfig("adamw"))
    assert torch.equal(plain["vit_block_0.mlp_in.hidden.weight"], without["vit_block_0.mlp_in.hidden.weight"])
    assert not torch.equal(plain[name], without[name])
    assert torch.equal(plain["encoder_norm.norm.weight"], without["encoder_norm.norm.weight"])


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"'vit_blok_\*' matches no parameter"):
        steps_of(OptimizerConfig(groups=[ParameterGroup("vit_blok_*")]))
    with pytest.raises(ConfigurationError, match=r"learning_rate_factor=-1 of 'head\.\*' must not be negative"):
        ParameterGroup("head.*", learning_rate_factor=-1)
