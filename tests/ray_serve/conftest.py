"""Simulated nodes for the tests that have Ray."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest


@pytest.fixture(scope="module")
def make_cluster(
    monkeypatch_module: pytest.MonkeyPatch,
) -> Iterator[Callable[..., Any]]:
    """A function that starts a head, with so many cores in Ray's books, and returns the cluster."""
    import ray
    from ray.cluster_utils import Cluster

    monkeypatch_module.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # Half a second instead of ten, of which a test of scaling would wait several.
    monkeypatch_module.setenv("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "0.5")
    made = []

    def make(num_cpus: int) -> Any:
        head = {"num_cpus": num_cpus, "resources": {"edge": 1}}
        made.append(Cluster(initialize_head=True, head_node_args=head))
        return made[-1]

    yield make
    ray.shutdown()
    for cluster in made:
        cluster.shutdown()


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def free_port() -> int:
    """One that nobody listens on; Ray's proxies take no 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
