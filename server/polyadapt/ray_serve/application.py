"""The Ray Serve application: ingress replicas before engine replicas, put together and run."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, HTTPOptions, RequestRouterConfig

from polyadapt.config import Config
from polyadapt.errors import StartupError
from polyadapt.logs import configure_logging
from polyadapt.ray_serve.engine_replica import EngineReplica
from polyadapt.ray_serve.ingress import Ingress
from polyadapt.ray_serve.settings import Settings, load

logger = logging.getLogger(__name__)

APP_NAME = "polyadapt"
ENGINE = "engine"
INGRESS = "ingress"
_SPARE_CALLS = 64  # of an engine replica, beside the sequences that its queue takes
_INGRESS_CALLS = 4096  # requests of one ingress replica at once: the engines' queues are the bound


def build(settings: dict[str, Any]) -> Application:
    """Return the application; also the entry point of a RayService's import_path, whose `args` are
    the settings. Raises StartupError.
    """
    config = load(settings)
    engine = serve.deployment(EngineReplica, **_engine_options(config)).bind(settings)
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        num_replicas=config.ray.ingress_replicas,
        max_ongoing_requests=_INGRESS_CALLS,
        graceful_shutdown_timeout_s=config.server.drain_grace_s,
        ray_actor_options={"num_cpus": 1, "resources": config.ray.ingress_resources},
    )
    return ingress.bind(settings, engine)


def _engine_options(config: Config) -> dict[str, Any]:
    ray_config, engine = config.ray, config.engine
    on_cpu = engine.device == "cpu"
    options: dict[str, Any] = {
        "name": ENGINE,
        "max_ongoing_requests": engine.max_num_seqs + engine.max_waiting + _SPARE_CALLS,
        "max_replicas_per_node": ray_config.engines_per_node,
        "graceful_shutdown_timeout_s": config.server.drain_grace_s,
        "health_check_period_s": 2.0,
        "ray_actor_options": {
            "num_cpus": ray_config.engine_cpus,
            "num_gpus": 0 if on_cpu else ray_config.engine_gpus,
        },
        "request_router_config": RequestRouterConfig(
            request_router_class="polyadapt.ray_serve.router.EngineRouter",
            request_routing_stats_period_s=ray_config.statement_s,
        ),
    }
    if ray_config.min_engines == ray_config.max_engines:
        return options | {"num_replicas": ray_config.min_engines}
    options["autoscaling_config"] = AutoscalingConfig(
        min_replicas=ray_config.min_engines,
        max_replicas=ray_config.max_engines,
        upscale_delay_s=ray_config.upscale_delay_s,
        downscale_delay_s=ray_config.downscale_delay_s,
        policy=AutoscalingPolicy(
            policy_function="polyadapt.ray_serve.scaling:QueuedTokens",
            policy_kwargs={"per_engine": ray_config.queued_tokens},
        ),
    )
    return options


def run_until_signal(settings: Settings, announce: Callable[[Config, str], None]) -> None:
    """Deploy to the cluster and wait for SIGINT or SIGTERM, which take the application away.

    Raises StartupError for bad settings, without a cluster, and when the application cannot start.
    """
    config = load(settings)
    configure_logging(config.server.log_level, config.server.log_format, "deployer")
    if config.store.blob_url is None:
        logger.warning(
            "without --blob-url and POLYADAPT_DATABASE_URL every node must see the same --home"
        )
    application = build(dict(settings))
    address = config.ray.ray_address
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise StartupError(
            f"no Ray cluster answers at {address!r} ({error}); start one with `ray start --head`, "
            "or name it with --ray-address"
        ) from None
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _end)  # also while it starts
    try:
        deploy(application, config)
        announce(config, f"http://{config.server.host}:{config.server.port}")
        threading.Event().wait()
    except RuntimeError as error:
        raise StartupError(f"the application has not started: {error}") from None
    finally:
        serve.delete(APP_NAME)
        ray.shutdown()


def _end(signal_number: int, frame: object) -> None:
    raise SystemExit(0)


def deploy(application: Application, config: Config, *, proxies: str = "EveryNode") -> None:
    """Run it on the cluster that this process is connected to; returns once it serves.

    proxies: Ray's proxy_location. A connection to a proxy dies with the proxy's node.
    """
    serve.start(
        proxy_location=proxies,
        http_options=HTTPOptions(host=config.server.host, port=config.server.port),
    )
    serve.run(application, name=APP_NAME, route_prefix="/")
