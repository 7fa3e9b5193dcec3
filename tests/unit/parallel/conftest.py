"""The optimizers' collectives need a process group: one of this process alone."""

from collections.abc import Iterator

import pytest

from parallel.distributed import Launch, start, stop


@pytest.fixture(scope="session", autouse=True)
def process_group() -> Iterator[None]:
    start(Launch(0, 1, 0), timeout_s=60)
    yield
    stop()
