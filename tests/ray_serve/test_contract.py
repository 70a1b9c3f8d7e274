"""What this project uses of Ray's alpha API is there, under its names: `make test-ray` alone."""

from __future__ import annotations

import asyncio
import inspect
from types import SimpleNamespace

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

ray = pytest.importorskip("ray", reason="make test-ray installs polyadapt[ray]")


def test_ray_is_the_release_that_is_pinned():
    assert ray.__version__.split(".")[:2] == ["2", "60"]


def test_a_router_is_told_of_replicas_deaths_and_requests_as_ours_expects():
    from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

    def parameters(method: object) -> list[str]:
        return list(inspect.signature(method).parameters)  # type: ignore[arg-type]

    choose = RequestRouter.choose_replicas
    assert inspect.iscoroutinefunction(choose)
    assert parameters(choose) == ["self", "candidate_replicas", "pending_request"]
    assert parameters(RequestRouter.update_replicas) == ["self", "replicas"]
    assert parameters(RequestRouter.on_replica_actor_died) == ["self", "replica_id"]
    assert isinstance(inspect.getattr_static(RequestRouter, "curr_replicas"), property)
    assert isinstance(inspect.getattr_static(RunningReplica, "routing_stats"), property)
    assert isinstance(inspect.getattr_static(RunningReplica, "replica_id"), property)
    assert {"args", "routing_context"} <= set(parameters(PendingRequest))
    assert "self._deployment_id = " in inspect.getsource(RequestRouter.__init__)


def test_a_request_without_backoff_would_be_asked_about_for_ever():
    from ray.serve._private.request_router.common import RequestRoutingContext

    assert RequestRoutingContext().should_backoff is False


def test_our_router_takes_the_named_replica_and_else_all():
    from polyadapt.ray_serve.router import EngineRouter

    replicas = [SimpleNamespace(replica_id=SimpleNamespace(unique_id=n)) for n in "abc"]

    def choose(target: str) -> list[list[object]]:
        context = SimpleNamespace(should_backoff=False)
        pending = SimpleNamespace(args=[target, b""], routing_context=context)
        chosen = asyncio.run(EngineRouter.choose_replicas(None, replicas, pending))
        assert context.should_backoff
        return chosen

    assert choose("b") == [[replicas[1]]]
    assert choose("gone") == [replicas]
    assert choose("") == [replicas]


def test_the_configurations_have_the_fields_that_we_set():
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

    assert {"request_router_class", "request_routing_stats_period_s"} <= set(
        RequestRouterConfig.model_fields
    )
    assert {"min_replicas", "max_replicas", "policy"} <= set(AutoscalingConfig.model_fields)
    assert {"policy_function", "policy_kwargs"} <= set(AutoscalingPolicy.model_fields)


def test_the_context_of_a_policy_has_what_ours_reads():
    from ray.serve.config import AutoscalingContext

    given = inspect.signature(AutoscalingContext).parameters
    assert {
        "aggregated_metrics",
        "capacity_adjusted_min_replicas",
        "capacity_adjusted_max_replicas",
    } <= set(given)


def test_hooks_of_a_replica_have_the_names_that_ray_looks_for():
    from ray.serve._private import constants, replica
    from ray.serve._private.replica import SERVE_BUILD_ASGI_APP_METHOD

    from polyadapt.ray_serve.engine_replica import EngineReplica
    from polyadapt.ray_serve.ingress import Ingress

    assert hasattr(EngineReplica, constants.REQUEST_ROUTING_STATS_METHOD)
    assert hasattr(EngineReplica, constants.HEALTH_CHECK_METHOD)
    assert hasattr(EngineReplica, "record_autoscaling_stats")
    assert 'self._callable, "record_autoscaling_stats"' in inspect.getsource(replica)
    assert hasattr(Ingress, SERVE_BUILD_ASGI_APP_METHOD)


def test_the_application_is_built_without_a_cluster_and_scales_between_its_bounds():
    from polyadapt.ray_serve.application import ENGINE, _engine_options, build
    from polyadapt.ray_serve.settings import load

    assert build({"device": "cpu"}) is not None
    fixed = _engine_options(load({"device": "cpu", "min_engines": 3, "max_engines": 3}))
    assert fixed["name"] == ENGINE
    assert fixed["num_replicas"] == 3
    assert "autoscaling_config" not in fixed
    moving = _engine_options(load({"device": "cpu", "max_engines": 3, "queued_tokens": 7}))
    scaling = moving["autoscaling_config"]
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 3)
    assert scaling.policy.policy_kwargs == {"per_engine": 7}
    assert moving["ray_actor_options"]["num_gpus"] == 0
