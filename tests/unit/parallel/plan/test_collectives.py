"""Collectives cost their bytes over the slowest link, and their steps."""

from dataclasses import replace

import pytest

from parallel.plan.collectives import Group, Placement, all_gather_s, all_reduce_s, message_s, reduce_scatter_s
from parallel.plan.hardware import read_hardware

H100 = read_hardware("h100_sxm")
GB = 1e9


def test_groups_lie_on_nodes_as_ranks_are_numbered() -> None:
    place = Placement.from_degrees(tensor=4, data=128, pipeline=2, devices_per_node=8)
    assert (place.tensor.per_node, place.data.per_node, place.stage.per_node) == (4, 2, 8)
    assert (place.tensor.nodes, place.data.nodes, place.pipeline.nodes) == (1, 64, 2)
    small = Placement.from_degrees(tensor=2, data=2, pipeline=2, devices_per_node=8)
    assert small.pipeline.nodes == 1 and small.data.nodes == 1


def test_bandwidth_is_that_of_the_slowest_link() -> None:
    within, between = Group(8, 8), Group(16, 8)
    assert all_gather_s(GB, within, H100) == pytest.approx(7 / 8 / 360, rel=0.01)
    assert all_gather_s(GB, between, H100) == pytest.approx(15 / 16 / min(360, 8 * 42.5), rel=0.05)
    assert all_gather_s(GB, Group(16, 1), H100) == pytest.approx(15 / 16 / 42.5, rel=0.01)
    assert all_reduce_s(GB, within, H100) == pytest.approx(2 * reduce_scatter_s(GB, within, H100), rel=0.01)


def test_one_rank_needs_no_message_and_more_ranks_need_more_steps() -> None:
    assert all_reduce_s(GB, Group(1, 1), H100) == all_gather_s(GB, Group(1, 1), H100) == 0
    empty = [all_gather_s(0, Group(n, min(n, 8)), H100) for n in (2, 8, 64, 1024)]
    assert empty == sorted(empty) and empty[0] > 0
    ring = 2 * all_gather_s(0, Group(1024, 8), H100)
    assert 0 < all_reduce_s(0, Group(1024, 8), H100) < ring  # a tree


def test_faster_links_never_cost_more() -> None:
    faster = replace(H100, network=replace(H100.network, gb_per_s=100), node=replace(H100.node, gb_per_s=900))
    for group in (Group(4, 4), Group(64, 8), Group(64, 1)):
        assert all_gather_s(GB, group, faster) <= all_gather_s(GB, group, H100)
        assert message_s(GB, group, faster) <= message_s(GB, group, H100)
