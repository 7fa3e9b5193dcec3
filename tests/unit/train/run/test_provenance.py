"""The machines of a run are described from the hosts of its ranks."""

import torch

from train.run.provenance import hardware


def test_machines_are_counted_from_the_hosts_of_all_ranks() -> None:
    found = hardware(torch.device("cpu"), ["a", "a", "b", "b"])
    assert found["hosts"] == ["a", "b"] and found["ranks_per_host"] == 2
    assert found["memory_gib"] > 0 and found["cores"] > 0 and found["device_memory_gib"] is None
