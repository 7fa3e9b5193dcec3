"""Files of conf/hardware are read with every key; times have the dimensions and the limits of a roofline."""

from dataclasses import replace

import pytest

from common.errors import ConfigurationError
from parallel.plan.hardware import FOLDER, read_hardware

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
