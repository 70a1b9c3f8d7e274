"""Fixtures of the whole suite: fixed seeds, few threads, no network, models made once.

The default model is fetched once into the user's own cache (or given by POLYADAPT_TEST_MODEL);
everything else is made in temporary directories.
"""

from __future__ import annotations

import os

# Before torch and transformers are imported by anyone.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# An OpenMP worker that spins stalls the other processes of the machine.
os.environ["OMP_WAIT_POLICY"] = "passive"
# Triton's kernels are tried on the host; 0 tries them on the CUDA device that there has to be.
os.environ.setdefault("TRITON_INTERPRET", "1")

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

# What has tests of many seconds begins first, so that no process is left with such a file while the
# others have nothing to do any more.
_LONG = ("e2e", "demo", "engine", "api", "deploy", "bench", "test_mark_cli.py", "test_cli.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what has long tests first; within a folder nothing changes its place."""
    root = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(root).parts[0]
        return _LONG.index(name) if name in _LONG else len(_LONG)

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def _torch_threads() -> None:
    """Use at most two threads, which is what the smallest supported machine has, or one where
    several processes share the tests.
    """
    import torch

    num_processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(min(2, os.cpu_count() or 1) if num_processes == 1 else 1)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Start every test from the same random state, whatever ran before it."""
    import torch

    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The directory of the default model, fetched into the default home if it is not there yet."""
    if given := os.environ.get("POLYADAPT_TEST_MODEL"):
        path = Path(given)
        assert (path / "config.json").is_file(), f"POLYADAPT_TEST_MODEL={given} holds no model"
        return path
    from polyadapt.config import default_home
    from polyadapt.models.fetch import fetch_model

    return fetch_model("smollm2", default_home(os.environ))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from an architecture's name (tests/oracle/tiny.py) to its directory, made once."""
    from tests.oracle import tiny

    root = tmp_path_factory.mktemp("tiny")

    @cache
    def directory(architecture: str) -> Path:
        return tiny.build(architecture, root / architecture)

    return directory
