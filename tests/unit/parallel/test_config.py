"""What does not combine is said in one sentence, before anything starts."""

from typing import Any

import pytest

from errors import ConfigurationError
from parallel.config import ParallelConfig
from parallel.launch import launch
from parallel.layout import Layout, check
from tests.distributed.problem import MT5, VIT

ZERO3: dict[str, Any] = {"zero_stage": 3}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gather": "never"}, "choose micro_batch or step"),
        ({"zero_stage": 2, "gather": "step"}, r"set parallel.zero_stage=3 \(it is 2\)"),
        ({"offload_optimizer": "cpu"}, r"set parallel.zero_stage=1 \(it is 0\)"),
        ({"zero_stage": 2, "offload_parameters": "cpu"}, "set parallel.zero_stage=3"),
        ({"zero_stage": 1, "hpz_partition_size": 2}, "set parallel.zero_stage=3"),
        ({"zero_stage": 1, "quantized_weights": True}, "set parallel.zero_stage=3"),
        (ZERO3 | {"offload_optimizer": "nvme"}, "set parallel.offload_folder"),
        (ZERO3 | {"offload_parameters": "nvme"}, "offload_parameters=nvme needs a place; set parallel.offload_folder"),
        (ZERO3 | {"offload_parameters": "disk"}, "choose none, cpu or nvme"),
        (ZERO3 | {"quantized_gradients": True, "tensor": 2}, "set parallel.tensor=1"),
    ],
)
def test_impossible_on_their_own(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        ParallelConfig(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hpz_partition_size": 3}, "does not divide the data-parallel size 4"),
    ],
)
def test_impossible_in_this_world(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        check(ParallelConfig(**ZERO3, **options), VIT, MT5, 4)


@pytest.mark.parametrize("option", ["quantized_weights", "quantized_gradients"])
def test_a_machine_without_gpus_may_submit_what_it_cannot_run(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    parallel = ParallelConfig(**ZERO3, **{option: True})
    check(parallel, VIT, MT5, 4)
    monkeypatch.setattr("parallel.layout.start", lambda *_: pytest.fail("process groups were started"))
    with pytest.raises(ConfigurationError, match="need DeepSpeed's CUDA kernels; set both to false here"):
        Layout(parallel, launch({}))
