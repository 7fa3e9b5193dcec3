"""Files of conf/hardware are read with every key; times have the dimensions and the limits of a roofline."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.errors import ConfigurationError
from parallel.plan.hardware import FOLDER, Hardware, Link, MatrixProducts, Rate, read_hardware
from tests.unit.parallel.plan.tiny import only

H100 = read_hardware("h100_sxm")


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_every_file_reads_and_every_number_has_its_source(name: str) -> None:
    read_hardware(name)
    for line in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[2:]:
        assert " # " in line, line


def test_a_wrong_name_or_key_is_one_sentence() -> None:
    with pytest.raises(ConfigurationError, match=r"hardware=h100 does not exist; did you mean"):
        read_hardware("h100")
    with pytest.raises(ConfigurationError, match=r"hardware"):
        read_hardware("h100_sxm", ["memory=40"])
    with pytest.raises(ConfigurationError, match=r"hardware\.node\.efficiency=2\.0 is a share"):
        read_hardware("h100_sxm", ["node.efficiency=2.0"])


def test_a_large_product_takes_its_flops_at_the_reached_rate() -> None:
    seconds = H100.product_s(16384, 16384, 16384, 2)
    assert 2 * 16384**3 / seconds == pytest.approx(989.4e12 * 0.80, rel=0.02)


def test_a_small_product_takes_a_launch_and_a_thin_one_its_traffic() -> None:
    assert H100.product_s(1, 1, 1, 2) < 6e-6
    thin = H100.product_s(1, 8192, 8192, 2) - 4e-6
    assert thin == pytest.approx(2 * 8192 * (8192 + 2) / (3350e9 * 0.9), rel=0.05)


@pytest.mark.parametrize("shape", [(8192, 8192, 1), (8192, 1, 8192), (1, 8192, 8192)])
def test_traffic_is_both_factors_and_the_result(shape: tuple[int, int, int]) -> None:
    rows, columns, inner = shape
    moved = 2 * (8192 * 8192 + 2 * 8192)
    slow = replace(H100, memory_gb_per_s=1.0)  # so slow that nothing else counts
    assert slow.product_s(rows, columns, inner, 2) == pytest.approx(moved / (1e9 * slow.memory_efficiency), rel=1e-4)


def test_every_kernel_takes_a_launch() -> None:
    slow = replace(H100, launch_us=1e6)
    launched = (slow.product_s(1, 1, 1, 2), slow.attention_s(1, 1, 2, launches=3), slow.elementwise_s(1, launches=2))
    assert launched == pytest.approx((1, 3, 2), rel=1e-3)


def test_time_grows_with_every_dimension_and_falls_with_every_rate() -> None:
    base = H100.product_s(4096, 4096, 4096, 2)
    assert H100.product_s(4096, 4096, 4096, 4) > base
    for shape in ((8192, 4096, 4096), (4096, 8192, 4096), (4096, 4096, 8192)):
        assert H100.product_s(*shape, 2) > base
    faster = replace(H100, bf16=replace(H100.bf16, peak_tflops=2 * H100.bf16.peak_tflops))
    assert faster.product_s(4096, 4096, 4096, 2) < base
    assert replace(H100, memory_gb_per_s=1e9).elementwise_s(1e9) < H100.elementwise_s(1e9)


def test_numbers_are_scaled_from_the_units_of_a_data_sheet() -> None:
    """TFLOP/s, GB/s and microseconds; shares of them are reached. Fp32 has a rate of its own."""
    hardware = only(
        bf16=Rate(8.0, 0.5), fp32=Rate(2.0, 0.25), attention_efficiency=0.125, memory_gb_per_s=4.0,
        memory_efficiency=0.5,
    )  # fmt: skip
    assert hardware.product_s(1e4, 1e4, 1e4, 2) == pytest.approx(2e12 / 4e12)
    assert hardware.product_s(1e4, 1e4, 1e4, 4) == pytest.approx(2e12 / 0.5e12)
    assert hardware.attention_s(1e12, 0, 2) == pytest.approx(1.0)
    assert hardware.attention_s(1e12, 0, 4) == pytest.approx(4.0)
    assert hardware.attention_s(0, 1e9, 2) == hardware.elementwise_s(1e9) == pytest.approx(0.5)
    assert hardware.attention_s(1e12, 3e9, 2) == pytest.approx(1.5)  # the longer of the two
    assert Link(8.0, 0.5, 1.0).bytes_per_s == 4e9
    launched = replace(hardware, launch_us=2e6)
    assert launched.elementwise_s(1e9) == launched.attention_s(0, 1e9, 2) == pytest.approx(2.5)
    assert launched.elementwise_s(1e9, 3) == launched.attention_s(0, 1e9, 2, 3) == pytest.approx(6.5)


@pytest.mark.parametrize(
    ("shape", "count", "tiles"),
    [  # tiles of 4 x 4, three units
        ((8, 12, 8), 1, 6), ((5, 9, 8), 1, 6), ((4, 4, 8), 1, 3), ((4, 4, 8), 2, 3), ((4, 4, 8), 5, 5),
        ((12, 4, 8), 1, 3), ((13, 4, 8), 1, 4), ((4, 13, 8), 1, 4),
    ],
)  # fmt: skip
def test_products_count_whole_tiles_and_idle_units(shape: tuple[int, int, int], count: int, tiles: int) -> None:
    hardware = only(flops=1.0, matmul=MatrixProducts(4, 3, 8))
    assert hardware.product_s(*shape, 2, count) == pytest.approx(
        2 * tiles * 4 * 4 * 8 * 2
    )  # the ramp doubles a sum of 8
    rows, columns, _ = shape
    longer = hardware.product_s(rows, columns, 24, 2, count)
    assert longer == pytest.approx(2 * tiles * 16 * 24 * (1 + 8 / 24))
    assert hardware.product_s(rows, columns, 24, 4, count) == pytest.approx(longer / 2)
    slow = only(memory=1.0, launch_s=1.0, matmul=MatrixProducts(4, 3, 8))
    moved = 4 * count * (rows * 24 + 24 * columns + rows * columns)
    assert slow.product_s(rows, columns, 24, 4, count) == pytest.approx(moved + 1)


def test_a_product_of_nothing_is_not_launched() -> None:
    slow = only(launch_s=1.0)
    assert [slow.product_s(*shape, 2) for shape in ((0, 1, 1), (1, 0, 1), (1, 1, 0))] == [0, 0, 0]
    assert slow.product_s(1, 1, 1, 2, count=0) == 0 and slow.product_s(1, 1, 1, 2) == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"attention_efficiency": 0.0},
            "hardware.attention_efficiency=0.0 is a share; set it above 0 and to 1 at most.",
        ),
        ({"memory_efficiency": 1.01}, "hardware.memory_efficiency=1.01 is a share; set it above 0 and to 1 at most."),
        ({"bf16": Rate(1.0, 0.0)}, "hardware.bf16.efficiency=0.0 is a share; set it above 0 and to 1 at most."),
        ({"fp32": Rate(1.0, -1.0)}, "hardware.fp32.efficiency=-1.0 is a share; set it above 0 and to 1 at most."),
        ({"network": Link(1, 1.5, 1)}, "hardware.network.efficiency=1.5 is a share; set it above 0 and to 1 at most."),
        ({"memory_gib": 0}, "hardware.memory_gib=0 must be greater than 0."),
        ({"memory_gb_per_s": -1}, "hardware.memory_gb_per_s=-1 must be greater than 0."),
        ({"devices_per_node": 0}, "hardware.devices_per_node=0 must be at least 1."),
    ],
)
def test_impossible_hardware_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        replace(H100, **change)
    assert str(caught.value) == sentence


def test_the_least_and_the_most_that_hardware_may_be() -> None:
    edge = {"attention_efficiency": 1.0, "memory_efficiency": 1e-9, "memory_gib": 0.1, "memory_gb_per_s": 0.1}
    assert isinstance(replace(H100, devices_per_node=1, node=Link(1, 1.0, 1), **edge), Hardware)


def test_a_file_anywhere_is_read(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((FOLDER / "h100_sxm.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert read_hardware(str(file)) == H100
    assert read_hardware(str(file), ["memory_gib=40", "node.latency_us=7"]) == replace(
        H100, memory_gib=40.0, node=replace(H100.node, latency_us=7.0)
    )
    with pytest.raises(ConfigurationError) as caught:
        read_hardware("zx81")
    assert str(caught.value) == (
        "hardware=zx81 does not exist; choose a100_80, b200, cpu, h100_sxm, h200_sxm, tpu_v4, or a file ending in "
        ".yaml."
    )
