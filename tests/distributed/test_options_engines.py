"""Options within a layout change memory, speed or the requested update, and nothing else."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.parallel.traffic import counted
from benchmarks.world import results_file, run_world
from model.pali import build
from model.weights.files import write_tensors
from model.weights.stored import open_tensors
from parallel.checkpoint.initial_weights import FileWeights, load_first_weights
from parallel.config import OptimizerConfig, ParallelConfig, ParameterGroup
from parallel.distributed import launch
from parallel.engine.base import Engine
from parallel.engine.build import build_engine
from parallel.engine.gathers import sharded_parameters
from parallel.layout import Layout
from parallel.optimizer.base import Update
from tests.distributed.problem import (
    EPSILON,
    FROZEN_VIT,
    MODEL,
    PALI,
    all_gathers,
    initial_weights,
    micro_batches,
    train,
    weight_deviation,
    weights,
)


@dataclass
class Options:
    """Settings of `parallel` and of `optimizer`, and the case whose curve they must give."""

    parallel: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    same_as: str | None = None
    ranks: int = 2
    loss_reduction: str = "mean"
    precision: str = "fp32"
    freeze: list[str] = field(default_factory=list)
    from_file: bool = False  # its first weights are other ones, and then read from a file

    def engine(self) -> Engine:
        layout = Layout.start(ParallelConfig(**self.parallel, timeout_s=120), launch())
        optimizer = OptimizerConfig(**{"gradient_clipping": 0.5, **self.optimizer})
        model = replace(MODEL, loss_reduction=self.loss_reduction)
        engine = build_engine(
            replace(PALI, model=model),
            optimizer,
            layout,
            precision=self.precision,
            freeze=self.freeze,
            seed=2 if self.from_file else 1,
        )
        if self.from_file:
            load_first_weights(engine, [FileWeights(open_tensors("initial.safetensors"))])
        return engine


SEQUENCE = {"tensor": 2, "sequence": True}
ZERO3 = {"zero_stage": 3, "param_persistence_threshold": 100}
CPU = {"offload_optimizer": "cpu", "offload_parameters": "cpu"}
DISK = {"offload_optimizer": "nvme", "offload_folder": "offloaded"}
GROUPS = {
    "weight_decay": 0.1,
    "groups": [
        ParameterGroup("vit_block_*", learning_rate_factor=0.0),
        ParameterGroup("encoder_block_*", learning_rate_factor=0.5, warmup_steps=3),
        ParameterGroup("head.*", weight_decay=0.0),
    ],
}
ADAMW = {**GROUPS, "name": "adamw", "epsilon": EPSILON}
BIG_VISION = {"multiply_by_parameter_scale": False, "update_clipping": None, "beta2_cap": 0.9, "momentum": 0.9}
CASES = {
    "sequence": Options(SEQUENCE),
    "sequence_attention": Options({**SEQUENCE, "recompute": "attention"}, same_as="sequence"),
    "sequence_block": Options({**SEQUENCE, "recompute": "block"}, same_as="sequence"),
    "sequence_every_2_of_the_decoder": Options(
        {**SEQUENCE, "recompute": "every_n", "recompute_stacks": ["decoder"]}, same_as="sequence"
    ),
    "data_groups": Options(optimizer=GROUPS),
    "zero3_groups": Options(ZERO3, GROUPS, same_as="data_groups"),
    "data_adamw": Options(optimizer=ADAMW),
    "zero1_adamw": Options({"zero_stage": 1}, ADAMW, same_as="data_adamw"),
    "data_big_vision": Options(optimizer=BIG_VISION),
    "sequence_big_vision": Options(SEQUENCE, BIG_VISION, same_as="data_big_vision"),
    "zero2_big_vision": Options({"zero_stage": 2}, BIG_VISION, same_as="data_big_vision"),
    "zero1_on_disk": Options({"zero_stage": 1, **DISK}, ADAMW, same_as="data_adamw"),
    "zero2_on_the_cpu": Options({"zero_stage": 2, "offload_optimizer": "cpu"}, GROUPS, same_as="data_groups"),
    "zero3_on_the_cpu": Options({**ZERO3, **CPU}, GROUPS, same_as="data_groups"),
    "zero3_on_disk": Options({**ZERO3, **DISK, "offload_parameters": "nvme"}, BIG_VISION, same_as="data_big_vision"),
    "pipeline_zero3_step": Options({"pipeline": 2, **ZERO3, "gather": "step"}, same_as="zero3"),
    "zero3": Options(ZERO3),
    "zero3_step": Options({**ZERO3, "gather": "step"}, same_as="zero3"),
    "zero3_step_whatever_persists": Options(
        {"zero_stage": 3, "param_persistence_threshold": 10**6, "gather": "step"}, same_as="zero3"
    ),
    "zero2_each": Options({"zero_stage": 2, "reduce": "micro_batch"}, same_as="zero3"),
    "zero3_each_frozen": Options(
        {**ZERO3, "reduce": "micro_batch", "shard_frozen": True, "pipeline": 2},
        same_as="data_frozen",
        freeze=FROZEN_VIT,
    ),
    "zero3_frozen_from_file": Options(ZERO3, same_as="data_frozen", freeze=FROZEN_VIT, from_file=True),
    "zero3_nearby": Options({**ZERO3, "hpz_partition_size": 2}, same_as="zero3"),
    "data_frozen": Options(freeze=FROZEN_VIT),
    "zero3_nearby_frozen_from_file": Options(
        {**ZERO3, "hpz_partition_size": 2, "gather": "step", "shard_frozen": True},
        same_as="data_frozen",
        freeze=FROZEN_VIT,
        from_file=True,
    ),
    "data_bf16_sums": Options({"reduce_dtype": "bf16"}),
    "zero1_bf16_sums": Options({"zero_stage": 1, "reduce_dtype": "bf16"}),
    "zero2_bf16_sums": Options({"zero_stage": 2, "reduce_dtype": "bf16"}),
    "zero3_bf16_sums": Options({**ZERO3, "reduce_dtype": "bf16"}),
    "zero3_attention": Options({**ZERO3, "recompute": "attention"}, same_as="zero3"),
    "zero3_every_2": Options({**ZERO3, "recompute": "every_n"}, same_as="zero3"),
    "data_sum": Options(loss_reduction="sum"),
    "zero2_sum": Options({"zero_stage": 2}, same_as="data_sum", loss_reduction="sum"),
    "zero3_sum": Options(ZERO3, same_as="data_sum", loss_reduction="sum"),
    "sequence_data_zero2_each": Options(
        {**SEQUENCE, "zero_stage": 2, "reduce": "micro_batch"}, same_as="zero3", ranks=4
    ),
    "interleaved_data_zero3_each": Options(
        {"pipeline": 2, "virtual_stages": 2, **ZERO3, "reduce": "micro_batch"}, same_as="zero3", ranks=4
    ),
    "pipeline_data_zero3_step": Options({"pipeline": 2, **ZERO3, "gather": "step"}, same_as="zero3", ranks=4),
    "pipeline_data_zero3_on_the_cpu": Options({"pipeline": 2, **ZERO3, **CPU}, GROUPS, "data_groups", ranks=4),
    "sequence_data_zero2_on_disk": Options({**SEQUENCE, "zero_stage": 2, **DISK}, ADAMW, "data_adamw", ranks=4),
    "sequence_data_zero3_nearby": Options({**SEQUENCE, **ZERO3, "hpz_partition_size": 2}, same_as="zero3", ranks=4),
}


SUMS = [{"zero_stage": stage} for stage in range(4)]
SUMS += [{"zero_stage": stage, "reduce": "micro_batch"} for stage in (2, 3)]
SUMS += [{"zero_stage": stage, "offload_optimizer": "cpu"} for stage in (1, 2, 3)]
BF16_SUMS = [name for name in CASES if name.endswith("bf16_sums")]
ONCE_A_STEP = [n for n, options in CASES.items() if options.parallel.get("gather") == "step" and not options.freeze]


def train_all(folder: Path, ranks: int) -> None:
    os.chdir(folder)
    if ranks == 2:
        torch.save([copies(parallel) for parallel in SUMS], results_file(folder, "copies"))
    for name, options in CASES.items():
        if options.ranks != ranks:
            continue
        engine = options.engine()
        result: dict[str, Any] = {"curve": train(engine, range(3)), "weights": weights(engine)}
        if name in ("zero3", "zero3_step"):
            result["gathers"] = [gathers(engine, number) for number in (1, 2, 4)]
        if name in ("zero3", *ONCE_A_STEP):
            result["evaluated"] = float(engine.evaluate(micro_batches(0)[:2]).loss)
            result["generated"] = engine.generate(micro_batches(0)[0], 4)
        if name in ("zero3", *BF16_SUMS):
            with counted({"data": engine.layout.data_group}) as sent:
                engine.forward_backward(micro_batches(0)[:1], num_targets=100)
                engine.discard()
            result["sent"] = dict(sent)
        if name == "sequence":
            result["lengths"] = [evaluated_and_trained(engine, multiple) for multiple in (1, 17)]
        if name == "zero3_on_disk":
            shards = sharded_parameters(engine.model)
            assert shards
            result["in files"] = [
                in_file(x, folder / "offloaded")
                for x in [*(p.ds_tensor for p in shards), *engine.optimizer.momenta.values()]
            ]
        if engine.layout.rank == 0:
            torch.save(result, results_file(folder, name))


def copies(parallel: dict[str, Any]) -> float:
    """Under bf16: how far the gradient of 13 equal micro-batches is from 13 times that of one, relative."""
    engine = Options({**ZERO3, **parallel}, {"gradient_clipping": None}, precision="bf16").engine()
    batch, found = micro_batches(0)[engine.layout.data_parallel_rank], []

    def keep(pieces: list[Update]) -> None:
        found.append(torch.cat([gradient.float().flatten() for *_, gradient in pieces]))

    engine.optimizer.update = keep  # type: ignore[method-assign]
    for number in (1, 13):
        engine.forward_backward([batch] * number, num_targets=100)
        engine.update(0.0)
    norm = torch.linalg.vector_norm
    return float(norm(found[1] - 13 * found[0]) / norm(13 * found[0]))


def gathers(engine: Engine, number: int) -> int:
    """All-gathers in a step of so many micro-batches."""
    found = all_gathers(lambda: engine.forward_backward(micro_batches(0)[:number], num_targets=100))
    engine.discard()
    return found


def evaluated_and_trained(engine: Engine, multiple: int) -> list[float]:
    """Losses and gradient norm of the same examples in rows that are padded to a multiple of so many positions."""
    batches = [batch.padded(multiple) for batch in micro_batches(0)[:2]]
    evaluated = engine.evaluate(batches)
    totals = engine.forward_backward(batches, 50)
    return [float(evaluated.loss), float(totals.loss), engine.update(0.0)]


def in_file(x: Tensor, folder: Path) -> bool:
    """Whether the tensor's memory is a mapped file of the folder."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        first, end = (int(address, 16) for address in line.split()[0].split("-"))
        if first <= x.data_ptr() < end:
            return str(folder) in line
    return False


@pytest.fixture(scope="module")
def results(initial: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    write_tensors({name: values.contiguous() for name, values in initial.items()}, folder / "initial.safetensors")
    for ranks in (2, 4):
        run_world(ranks, train_all, folder, ranks)
    return folder


@pytest.fixture(scope="module")
def initial() -> dict[str, Tensor]:
    return initial_weights()


@pytest.mark.parametrize("name", [name for name, options in CASES.items() if options.same_as])
def test_curve_and_weights_are_the_same(results: Path, initial: dict[str, Tensor], name: str) -> None:
    expected, found = (torch.load(results_file(results, n)) for n in (CASES[name].same_as, name))
    for pair, wanted in zip(found["curve"], expected["curve"], strict=True):
        assert pair == pytest.approx(wanted, rel=1e-5)
    for key, values in expected["weights"].items():
        if not CASES[name].optimizer.get("momentum"):
            assert weight_deviation(key, found["weights"][key], values) <= 1e-5, key
        elif not key.endswith("key.bias"):
            assert moved_alike(found["weights"][key], values, initial[key]), key


def moved_alike(found: Tensor, expected: Tensor, initial: Tensor) -> bool:
    """Whether a weight moved as it should but for the last bit of a momentum in bf16, which rounding decides."""
    norm = torch.linalg.vector_norm
    return bool(norm(found - expected) <= 2**-8 * norm(expected - initial))


def test_a_summed_loss_has_the_gradient_of_all_target_tokens(results: Path) -> None:
    (mean, *_), (summed, *_) = (torch.load(results_file(results, name))["curve"] for name in ("zero3", "data_sum"))
    assert summed == pytest.approx((mean[0], mean[1] * sum(batch.num_targets for batch in micro_batches(0))), rel=1e-5)


@pytest.mark.parametrize("number", range(len(SUMS)))
def test_gradients_are_accumulated_in_fp32_under_bf16(results: Path, number: int) -> None:
    assert torch.load(results_file(results, "copies"))[number] <= 1e-5


def test_zero3_gathers_for_every_micro_batch_or_once_a_step(results: Path) -> None:
    each, once = (torch.load(results_file(results, name))["gathers"] for name in ("zero3", "zero3_step"))
    assert each == [each[0], 2 * each[0], 4 * each[0]]
    assert once == [once[0]] * 3
    assert once[0] > 0


@pytest.mark.parametrize("name", ONCE_A_STEP)
def test_zero3_that_gathers_once_a_step_evaluates_and_generates_too(results: Path, name: str) -> None:
    each, once = (torch.load(results_file(results, n)) for n in ("zero3", name))
    assert once["evaluated"] == pytest.approx(each["evaluated"], rel=1e-6)
    assert torch.equal(once["generated"], each["generated"])


def test_lengths_that_sequence_parallelism_cannot_divide(results: Path) -> None:
    assert micro_batches(0)[0].padded(17).encoder_tokens.shape[1] == 17
    even, odd = torch.load(results_file(results, "sequence"))["lengths"]
    assert odd == pytest.approx(even, rel=1e-6)


def test_parameters_and_state_are_files(results: Path) -> None:
    assert all(torch.load(results_file(results, "zero3_on_disk"))["in files"])


def test_the_benchmark_counts_what_zero_sends(results: Path) -> None:
    elements = sum(p.numel() for p in build(PALI).parameters())
    sent = torch.load(results_file(results, "zero3"))["sent"]
    assert sent["data", "reduce-scatter"] == pytest.approx(4 * elements / 2, rel=0.05)  # half of all gradients
    assert sent["data", "all-gather"] > 0


@pytest.mark.parametrize("name", BF16_SUMS)
def test_sums_in_bf16_send_half_the_bytes_and_round_to_8_bits(results: Path, name: str) -> None:
    elements = sum(p.numel() for p in build(PALI).parameters())
    fp32, bf16 = (torch.load(results_file(results, n)) for n in ("zero3", name))
    gradients = sum(size for (_, kind), size in bf16["sent"].items() if kind != "all-gather")
    of_all_reduce = 2 if name == "data_bf16_sums" else 1
    assert gradients == pytest.approx(of_all_reduce * 2 * elements / 2, rel=0.05)
    for (loss, norm), (expected_loss, expected_norm) in zip(bf16["curve"], fp32["curve"], strict=True):
        assert loss == pytest.approx(expected_loss, rel=2**-8) and norm == pytest.approx(expected_norm, rel=2**-7)
    assert bf16["curve"] != fp32["curve"]


def test_nothing_is_left_on_the_disk(results: Path) -> None:
    assert list((results / "offloaded").iterdir()) == []


@pytest.mark.parametrize("name", ["zero3_groups", "zero1_adamw"])
def test_a_group_of_factor_0_does_not_move(results: Path, initial: dict[str, Tensor], name: str) -> None:
    found = torch.load(results_file(results, name))["weights"]
    for key, values in found.items():
        assert torch.equal(values, initial[key]) == key.startswith("vit_block_"), key
