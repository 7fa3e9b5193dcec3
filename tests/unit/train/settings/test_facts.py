"""Settings that differ between ranks are found before any process group is made."""

from dataclasses import replace

import pytest

from common.errors import ConfigurationError
from parallel.config import ParallelConfig
from parallel.distributed import Launch
from tests.unit.train.ranks import Ranks
from train.config import RunConfig, WeightsConfig
from train.settings.facts import check_settings_of_ranks

CONFIG = RunConfig()


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        (replace(CONFIG, parallel=ParallelConfig(tensor=2)), "parallel.tensor=2, rank 0 with parallel.tensor=1;"),
        (replace(CONFIG, weights=WeightsConfig(vit="v")), "weights.vit=v, rank 0 with weights.vit=None;"),
        (replace(CONFIG, weights=WeightsConfig(mt5="other")), None),
    ],
)
def test_ranks_with_other_settings_end_alike(
    own: RunConfig, sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = replace(CONFIG, weights=WeightsConfig(mt5=own.weights.mt5 and "one"))
    world = Ranks(2, monkeypatch)
    ended = world.run(lambda rank: check_settings_of_ranks(own if rank else first, Launch(rank, 2, 0)))
    if sentence is None:
        assert ended == [None, None]
    for error in ended if sentence else []:
        assert isinstance(error, ConfigurationError) and str(error).startswith("rank 1 on ")
        assert f"was started with {sentence}" in str(error)
