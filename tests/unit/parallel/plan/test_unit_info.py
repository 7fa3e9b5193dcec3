"""Sizes of units' parameters, whole and on a tensor-parallel rank, and of the optimizer's shared state."""

from parallel.config import OptimizerConfig
from parallel.plan.unit_info import UnitInfo, unit_infos
from tests.unit.parallel.plan.tiny import UNITS, VIT, units

ELEMENTS = (136, 736, 1312, 1760, 16, 2544, 1040)


def test_units_are_counted_in_their_order() -> None:
    stacks = ("vit", "vit", "bridge", "encoder", "encoder", "decoder", "head")
    parameters = (3, 16, 7, 9, 1, 14, 2)
    largest, copied = (12 * 8, 24 * 8, 1024, 640, 16, 640, 1024), (136, 48, 160, 32, 16, 48, 16)
    adamw = OptimizerConfig("adamw")
    found = unit_infos(units().items(), adamw)
    assert [info.stack for info in found] == list(stacks)
    assert found == [
        UnitInfo(name, number, number, True, index > 0, tensors, largest[index], copied[index], copied[index])
        for index, (name, number, tensors) in enumerate(zip(UNITS, ELEMENTS, parameters, strict=True))
    ]
    frozen = unit_infos(units(VIT).items(), adamw)
    assert [info.copied_trained for info in frozen] == [0, 0, 144, *copied[3:]]
    assert [info.trained_elements for info in frozen] == [0, 0, 1296, 1760, 16, 2544, 1040]
    assert [info.trained for info in frozen] == [False, False, *[True] * 5]
    assert [info.below_trained for info in frozen] == [False, False, False, *[True] * 4]
    assert [info.elements for info in frozen] == list(ELEMENTS)


def test_adafactor_stores_means_of_rows_and_columns_on_every_rank() -> None:
    plain, with_state = (unit_infos(units().items(), OptimizerConfig(name)) for name in ("adamw", "adafactor"))
    assert {info.state_bytes for info in plain} == {0} and {info.summed for info in plain} == {()}
    config = OptimizerConfig("adafactor", min_dim_size_to_factor=16)
    (norm,) = [info for info in unit_infos(units().items(), config) if info.name == "encoder_norm"]
    (head,) = [info for info in unit_infos(units().items(), config) if info.name == "head"]
    assert (norm.state_bytes, norm.summed) == (0, (1, 1))
    assert (head.state_bytes, head.summed) == (16 * (64 + 16), (2 + 64 + 16, 2))
    assert all(info.state_bytes == 0 for info in with_state)  # sides below 128 are not factored
