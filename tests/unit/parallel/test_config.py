"""Settings that do not combine raise one sentence, before anything starts."""

from typing import Any

import pytest

from common.errors import ConfigurationError
from parallel.config import OptimizerConfig, ParallelConfig, ParameterGroup
from parallel.distributed import launch
from parallel.layout import Layout, check
from tests.distributed.problem import PALI

ZERO3: dict[str, Any] = {"zero_stage": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gather": "never"}, "choose micro_batch or step"),
        ({"zero_stage": 2, "gather": "step"}, r"set parallel.zero_stage=3 \(it is 2\)"),
        ({"offload_optimizer": "cpu"}, r"set parallel.zero_stage=1 \(it is 0\)"),
        ({"zero_stage": 2, "offload_parameters": "cpu"}, "set parallel.zero_stage=3"),
        ({"zero_stage": 1, "hpz_partition_size": 2}, "set parallel.zero_stage=3"),
        ({"zero_stage": 1, "quantized_weights": True}, "set parallel.zero_stage=3"),
        (ZERO3 | {"offload_optimizer": "nvme"}, "set parallel.offload_folder"),
        (ZERO3 | {"offload_parameters": "nvme"}, "offload_parameters=nvme writes files; set parallel.offload_folder"),
        (ZERO3 | {"offload_parameters": "disk"}, "choose none, cpu or nvme"),
        (ZERO3 | {"quantized_gradients": True, "tensor": 2}, "set parallel.tensor=1"),
    ],
)
def test_impossible_on_their_own(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ParallelConfig(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hpz_partition_size": 3}, "does not divide the data-parallel size 4"),
    ],
)
def test_impossible_in_this_world(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check(ParallelConfig(**ZERO3, **options), PALI, 4)


JUST_BELOW_ONE = 0.999999


@pytest.mark.parametrize(
    ("kind", "name", "least", "refused"),  # the least that is allowed, and what is not
    [
        *((ParallelConfig, name, 1, [0, -1]) for name in ("tensor", "pipeline", "virtual_stages", "micro_batch_size")),
        *((ParallelConfig, name, 1, [0, -1]) for name in ("recompute_every", "hpz_partition_size")),
        (ParallelConfig, "zero_stage", 0, [-1, 4]),
        (ParallelConfig, "zero_stage", 3, [5]),
        (ParallelConfig, "timeout_s", 1e-9, [0.0, -1.0]),
        (ParallelConfig, "memory_gib", 1e-9, [0.0, -1.0]),
        (ParallelConfig, "param_persistence_threshold", 0, [-1]),
        (ParallelConfig, "schedule", "gpipe", ["gpip", ""]),
        (ParallelConfig, "recompute", "attention", ["all"]),
        (ParallelConfig, "recompute_stacks", [], [["head"]]),
        *((OptimizerConfig, name, 1e-12, [0.0, -1.0]) for name in ("decay_exponent", "epsilon", "epsilon_scale")),
        *((OptimizerConfig, name, 0.0, [-1e-9, 1.0]) for name in ("beta1", "beta2", "momentum")),
        *((OptimizerConfig, name, JUST_BELOW_ONE, [1.0]) for name in ("beta1", "beta2", "momentum")),
        (OptimizerConfig, "beta2_cap", 1.0, [1.000001, 0.0]),
        (OptimizerConfig, "beta2_cap", 1e-9, [-1.0]),
        *((OptimizerConfig, name, 1e-9, [0.0, -1.0]) for name in ("update_clipping", "gradient_clipping")),
        (OptimizerConfig, "weight_decay", 0.0, [-1e-9]),
        (OptimizerConfig, "min_dim_size_to_factor", 1, [0]),
        (OptimizerConfig, "name", "adamw", ["adam"]),
        *((ParameterGroup, name, 0, [-1]) for name in ("learning_rate_factor", "weight_decay", "warmup_steps")),
    ],
)
def test_every_setting_has_its_bounds(kind: type, name: str, least: Any, refused: list[Any]) -> None:
    assert getattr(kind(**{"pipeline": 2} if name == "virtual_stages" else {}, **{name: least}), name) == least
    for value in refused:
        with pytest.raises(ConfigurationError, match=name):
            kind(**{name: value})


def test_null_turns_a_bound_off() -> None:
    assert OptimizerConfig(update_clipping=None, gradient_clipping=None).update_clipping is None
    assert ParallelConfig(memory_gib=None).memory_gib is None


def test_virtual_stages_need_a_pipeline_of_1f1b() -> None:
    assert ParallelConfig(pipeline=2, virtual_stages=2)
    for options in ({"pipeline": 1}, {"pipeline": 2, "schedule": "gpipe"}):
        with pytest.raises(ConfigurationError, match="interleaves the stages of a 1f1b pipeline"):
            ParallelConfig(virtual_stages=2, **options)


def test_adafactor_is_t5xs_by_default() -> None:
    """`t5x/adafactor.py` as T5 1.1 and mT5 are trained; no clipping of the global norm, no decay."""
    assert vars(OptimizerConfig()) | vars(OptimizerConfig("adafactor")) == vars(
        OptimizerConfig(
            name="adafactor", decay_exponent=0.8, update_clipping=1.0, multiply_by_parameter_scale=True,
            epsilon_scale=1e-3, min_dim_size_to_factor=128, beta2_cap=1.0, momentum=0.0, weight_decay=0.0, groups=[],
        )
    )  # fmt: skip


@pytest.mark.parametrize("option", ["quantized_weights", "quantized_gradients"])
def test_a_machine_without_gpus_may_submit_what_it_cannot_run(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    parallel = ParallelConfig(**ZERO3, **{option: True})
    check(parallel, PALI, 4)
    monkeypatch.setattr("parallel.layout.start", lambda *_: pytest.fail("process groups were started"))
    with pytest.raises(ConfigurationError, match="need DeepSpeed's CUDA kernels; set both to false here"):
        Layout.start(parallel, launch({}))
