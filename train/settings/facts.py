"""Compare settings and shards of all ranks: ranks that differ would train on different data.

Every rank opens its own copy of the shards and shuffles by their number. With one shard more or less on one node, its
ranks would read other examples, without any error.
"""

import socket
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from common.errors import ConfigurationError
from common.values import flat
from data.stream import Stream
from data.tokenizer import checksum
from parallel.distributed import Launch, gather_objects
from parallel.layout import Layout, start_world
from train.config import RunConfig, to_dict

Facts = dict[str, dict[str, Any]]  # source -> records, shards and fingerprint
# Settings that may differ between nodes, because they are paths; the data there is compared, or loaded by every rank.
FIRST_WEIGHTS = ("run.initial", "weights")
NODE_KEYS = ("data.root", "data.sources", "data.tokenizer", "data.index_folder", "data.cache_folder",
             "parallel.offload_folder", *FIRST_WEIGHTS)  # fmt: skip


def check_settings_of_ranks(config: RunConfig, this: Launch) -> None:
    """Raise ConfigurationError on every rank if one was started with other settings. A collective.

    It comes before the groups of a `Layout`, because ranks with other `parallel` settings would wait there forever.
    """
    start_world(config.parallel, this)
    mine = flat(to_dict(config))
    sent = [mine if this.rank == 0 else None]
    dist.broadcast_object_list(sent, device=torch.device("cpu"))
    first = sent[0] or {}
    different = [key for key in sorted(mine.keys() | first.keys()) if mine.get(key) != first.get(key)]
    different = [key for key in different if not _may_differ(key, mine.get(key), first.get(key))]
    mistake = None
    if different:
        key = different[0]
        mistake = (
            f"{_name(this)} was started with {key}={mine.get(key)}, rank 0 with {key}={first.get(key)}; start all "
            "ranks with the same settings."
        )
    _raise_anywhere(mistake)


def _may_differ(key: str, mine: Any, first: Any) -> bool:
    """Return whether a setting names places of a node; first weights are loaded by all ranks together, or by none."""
    if not any(f"{key}.".startswith(f"{own}.") for own in NODE_KEYS):
        return False
    return not key.startswith(FIRST_WEIGHTS) or (mine is None) == (first is None)


def facts_of_all(stream: Stream | None, config: RunConfig, layout: Layout, split: str) -> Facts:
    """Return the facts of a stream's sources, the same on every rank. A collective.

    `stream`: None on the ranks that read none; the main rank reads one.

    Raises ConfigurationError on every rank if one has other shards, or another tokenizer, than the main rank.
    """
    facts = {name: asdict(found) for name, found in stream.facts().items()} if stream is not None else None
    own = checksum(config.data.tokenizer)
    found, tokenizer = layout.broadcast_from_main(lambda: (facts, own))
    assert found is not None
    mine = (found if facts is None else facts, own)
    _raise_anywhere(_difference(mine, (found, tokenizer), layout, split))
    return found


def described(facts: Mapping[str, Any]) -> str:
    """Describe the records of a source: their number, shards and fingerprint."""
    shards = f"{facts['shards']:,} shard{'s' * (facts['shards'] != 1)}"
    return f"{facts['records']:,} records in {shards} (fingerprint {str(facts['fingerprint'])[:12]})"


def _difference(mine: tuple[Facts, str], first: tuple[Facts, str], layout: Layout, split: str) -> str | None:
    for source in sorted(mine[0].keys() | first[0].keys()):
        own, other = mine[0].get(source), first[0].get(source)
        if own != other and own and other:
            return (
                f"{_name(layout)} has {described(own)} of {source} ({split}), rank 0 has {described(other)}; give "
                "every node the same shards, or point data.root at a folder that all share."
            )
    if mine[1] != first[1]:
        return (
            f"{_name(layout)} has another data.tokenizer (SHA-256 {mine[1][:12]}) than rank 0 ({first[1][:12]}); give "
            "every node the same file."
        )
    return None


def _name(this: Launch | Layout) -> str:
    return f"rank {this.rank} on {socket.gethostname()}"


def _raise_anywhere(mistake: str | None) -> None:
    for found in filter(None, gather_objects([mistake])):
        raise ConfigurationError(found)
