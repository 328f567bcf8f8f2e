"""One thread, a cache of its own for each session, and no number that nobody wrote."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports Triton: its kernels run on the processor here.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    cache = tmp_path_factory.mktemp("cache")
    before = os.environ.get("LMTRAIN_CACHE")
    os.environ["LMTRAIN_CACHE"] = str(cache)
    yield cache
    if before is None:
        del os.environ["LMTRAIN_CACHE"]
    else:
        os.environ["LMTRAIN_CACHE"] = before


@pytest.fixture(autouse=True)
def strict_torch() -> Iterator[None]:
    """One thread; torch.empty filled with NaN, so that reading it unwritten is seen.

    Warnings that torch gives once in a process come every time, whatever the order of the tests.
    """
    torch.set_warn_always(True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shakespeare() -> Path:
    path = SHARED / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip("tinyshakespeare.txt is not here")
    return path


@pytest.fixture(scope="session")
def ptb() -> Path:
    path = SHARED / "ptb"
    if not path.exists():
        pytest.skip("the Penn Treebank is not here")
    return path


@pytest.fixture(scope="session")
def public_data() -> Path:
    if not (SHARED / "snips").exists():
        pytest.skip("the public data sets are not here")
    return SHARED
