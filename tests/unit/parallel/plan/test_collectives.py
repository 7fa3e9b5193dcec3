"""Collectives cost their bytes over the slowest link, and their steps."""

from dataclasses import replace

import pytest

from parallel.plan.collectives import Group, Placement, all_gather_s, all_reduce_s, message_s, reduce_scatter_s
from parallel.plan.hardware import read_hardware
from tests.unit.parallel.plan.tiny import only

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


@pytest.mark.parametrize(
    ("size", "stride", "devices", "per_node", "nodes"),
    [(8, 1, 8, 8, 1), (16, 1, 8, 8, 2), (12, 1, 8, 8, 2), (4, 4, 8, 2, 2), (4, 3, 8, 2, 2), (4, 8, 8, 1, 4),
     (2, 16, 8, 1, 2), (3, 2, 8, 3, 1), (1, 32, 8, 1, 1)],
)  # fmt: skip
def test_ranks_of_a_node(size: int, stride: int, devices: int, per_node: int, nodes: int) -> None:
    group = Group.from_stride(size, stride, devices)
    assert (group, group.nodes) == (Group(size, per_node), nodes)


@pytest.mark.parametrize(
    ("group", "moved", "ring", "tree"),
    [  # links: 100 B/s in a node, 30 B/s between nodes. Seconds of 480 bytes; steps (within, between) of ring and tree
        (Group(8, 8), 480 * 7 / 8 / 100, (7, 0), (14, 0)),
        (Group(2, 2), 480 / 2 / 100, (1, 0), (2, 0)),
        (Group(16, 8), 480 * 15 / 16 / 100, (14, 1), (14, 2)),  # eight ports of 30 B/s carry more than a node's 100
        (Group(4, 2), 480 * 3 / 4 / 60, (2, 1), (2, 2)),  # two ports
        (Group(5, 2), 480 * 4 / 5 / 60, (2, 2), (2, 4)),  # three nodes, the last one with one rank
        (Group(8, 1), 480 * 7 / 8 / 30, (0, 7), (0, 6)),
        (Group(1, 1), 0.0, (0, 0), (0, 0)),
    ],
)
def test_seconds_are_bytes_over_the_slowest_link_and_steps(
    group: Group, moved: float, ring: tuple[int, int], tree: tuple[int, int]
) -> None:
    links = only(node=100.0, network=30.0)
    assert all_gather_s(480, group, links) == reduce_scatter_s(480, group, links) == pytest.approx(moved)
    assert all_reduce_s(480, group, links) == pytest.approx(2 * moved)
    for node_s, network_s in ((1.0, 0.0), (0.0, 1.0), (1.0, 5.0)):
        steps = only(node_s=node_s, network_s=network_s)
        ring_s, tree_s = (within * node_s + between * network_s for within, between in (ring, tree))
        assert all_gather_s(480, group, steps) == reduce_scatter_s(480, group, steps) == pytest.approx(ring_s)
        assert all_reduce_s(480, group, steps) == pytest.approx(min(2 * ring_s, tree_s))


def test_ranks_on_nodes_of_their_own_use_no_link_within_a_node() -> None:
    fast = only(node=100.0, network=300.0)
    assert all_gather_s(480, Group(8, 1), fast) == pytest.approx(480 * 7 / 8 / 300)
    assert all_gather_s(480, Group(8, 2), fast) == pytest.approx(480 * 7 / 8 / 100)


@pytest.mark.parametrize(
    ("group", "seconds"),
    [
        (Group(2, 2), 4.8 + 1),
        (Group(8, 8), 4.8 + 1),
        (Group(2, 1), 16 + 5),
        (Group(4, 2), 16 + 5),
        (Group(1, 1), 16 + 5),
    ],
)
def test_a_message_takes_the_link_of_its_neighbors(group: Group, seconds: float) -> None:
    links = only(node=100.0, network=30.0, node_s=1.0, network_s=5.0)
    assert message_s(480, group, links) == pytest.approx(seconds)
