"""Fixtures that several test files share: tiny pools, and torch on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pools
import pytest

from poolreg import Pool


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Run torch on one thread, so that bits can be compared."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> pools.Tiny:
    """A pool with the partitions alpha (1 unit), beta (2) and gamma (3); never change it."""
    return pools.tiny_pool(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def pool(tiny, tmp_path) -> Iterator[Pool]:
    """A copy of the tiny pool, to be changed at will."""
    with Pool.open(tiny.copy(tmp_path / "pool")) as opened:
        yield opened
