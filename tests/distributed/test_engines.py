"""The law of `parallel/`: every layout gives one process's losses, gradient norms and updated weights."""

import math
from pathlib import Path

import pytest
import torch

from tests.distributed.problem import FROZEN_VIT, STEPS, Case, micro_batches, train, weights
from tests.distributed.world import results_file, run_world

REFERENCES = {
    "adafactor": Case(),
    "adamw": Case(optimizer="adamw"),
    "frozen": Case(freeze=FROZEN_VIT),
    "bf16": Case(precision="bf16"),
}
LAYOUTS = {
    2: {
        "data2": Case(),
        "data2_zero1": Case(zero_stage=1, optimizer="adamw"),
        "data2_zero3_frozen": Case(zero_stage=3, freeze=FROZEN_VIT),
        "tensor2": Case(tensor=2, optimizer="adamw"),
        "tensor2_sequence_recompute": Case(tensor=2, sequence=True, recompute="block"),
        "tensor2_zero1_frozen": Case(tensor=2, zero_stage=1, freeze=FROZEN_VIT),
        "data2_zero3_bf16": Case(zero_stage=3, precision="bf16"),
        "data2_zero2_bf16": Case(zero_stage=2, precision="bf16"),
        "data2_zero1_bf16": Case(zero_stage=1, precision="bf16"),
    },
    4: {
        "data4_zero1": Case(zero_stage=1),
        "data4_zero2_frozen": Case(zero_stage=2, freeze=FROZEN_VIT),
        "data4_zero3": Case(zero_stage=3, optimizer="adamw"),
        "data4_zero3_recompute": Case(zero_stage=3, recompute="block"),
        "tensor2_data2": Case(tensor=2, freeze=FROZEN_VIT),
        "tensor2_data2_sequence_zero1": Case(tensor=2, sequence=True, zero_stage=1, optimizer="adamw"),
        "tensor2_data2_zero2": Case(tensor=2, zero_stage=2),
        "tensor2_data2_sequence_zero3": Case(tensor=2, sequence=True, zero_stage=3),
        "tensor4": Case(tensor=4),
        "tensor4_sequence_frozen": Case(tensor=4, sequence=True, freeze=FROZEN_VIT),
    },
}
NAMES = [(size, name) for size, cases in LAYOUTS.items() for name in cases]


def train_all(folder: Path, cases: dict[str, Case]) -> None:
    """Train every case in this world; rank 0 leaves the curve and the weights."""
    for name, case in cases.items():
        layout = case.layout()
        engine = case.engine(layout)
        result = {"curve": train(engine), "weights": weights(engine)}
        if layout.rank == 0:
            torch.save(result, results_file(folder, name))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    run_world(1, train_all, folder, REFERENCES)
    for size, cases in LAYOUTS.items():
        run_world(size, train_all, folder, cases)
    return folder


def reference(case: Case) -> str:
    return "bf16" if case.precision == "bf16" else "frozen" if case.freeze else case.optimizer


@pytest.mark.parametrize(("size", "name"), NAMES)
def test_equals_one_process(results: Path, size: int, name: str) -> None:
    case = LAYOUTS[size][name]
    expected, found = (torch.load(results_file(results, n)) for n in (reference(case), name))
    tolerance = {"fp32": 1e-5, "bf16": 5e-3}[case.precision]
    for step in range(STEPS):
        assert found["curve"][step] == pytest.approx(expected["curve"][step], rel=tolerance), f"step {step}"
    if case.precision == "bf16":
        return
    assert found["weights"].keys() == expected["weights"].keys()
    for key, values in expected["weights"].items():
        difference = torch.linalg.vector_norm(found["weights"][key] - values)
        # Keys' biases have no gradient but rounding (softmax ignores a shift), which Adafactor and AdamW turn into steps.
        bound = math.inf if key.endswith("key.bias") else max(1e-5 * float(torch.linalg.vector_norm(values)), 1e-6)
        assert float(difference) <= bound, key


def test_training_changes_every_trained_weight_and_no_frozen_one(results: Path) -> None:
    both = torch.load(results_file(results, "frozen"))["weights"]
    trained = torch.load(results_file(results, "adafactor"))["weights"]
    frozen = [name for name in both if name.startswith(("patches", "vit_block", "bridge.vit_norm"))]
    assert frozen
    assert all(not torch.equal(both[name], trained[name]) for name in frozen)
    initial = _initial_weights()
    assert all(torch.equal(both[name], initial[name]) for name in frozen)
    assert all(not torch.equal(both[name], initial[name]) for name in both if name not in frozen)


def _initial_weights() -> dict[str, torch.Tensor]:
    from model.layers import parts_of
    from model.pali import build, local_block
    from tests.distributed.problem import MODEL, MT5, VIT

    return {part.name: local_block(p, part) for p, part in parts_of(build(VIT, MT5, MODEL, 1, seed=1))}


def test_the_batches_hold_every_kind_of_row() -> None:
    batches = micro_batches(0)
    assert any(bool((batch.visual_index < 0).all()) for batch in batches), "a micro-batch without any image"
    assert all(int(batch.encoder_segments.max()) == 3 for batch in batches), "packed rows"
