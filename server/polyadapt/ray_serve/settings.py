"""How a replica gets its settings: what the deployer gave, then its own machine's variables.

Secrets never travel: Ray keeps an application's arguments where every node reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from polyadapt.config import Config, load_config
from polyadapt.errors import StartupError
from polyadapt.logs import configure_logging

# Flat names of settings, as load_config takes them, and "config": a YAML file on every node.
Settings = Mapping[str, Any]

SECRETS = ("api_key", "database_url", "mark_kek", "text_mark_key")


def load(settings: Settings) -> Config:
    """Return this machine's settings; raises StartupError, also for a secret among them."""
    for name in SECRETS:
        if settings.get(name) is not None:
            raise StartupError(
                f"{name} is a secret, which is not sent through Ray; set POLYADAPT_{name.upper()} "
                "in the environment of every node"
            )
    flat = {name: value for name, value in settings.items() if name != "config"}
    file = settings.get("config")
    config = load_config(flat, file=None if file is None else Path(file))
    if config.fleet.devices or config.fleet.engines > 1:
        raise StartupError("Ray gives each engine its device; leave --devices and --engines out")
    if config.ray.ingress_replicas > 1 and config.store.blob_url is None:
        raise StartupError(
            f"{config.ray.ingress_replicas} ingress replicas need a store that they share; give "
            "--blob-url, and POLYADAPT_DATABASE_URL where they are on several nodes"
        )
    if config.server.port == 0:
        raise StartupError("Ray's proxies all listen on one port, which cannot be any; give --port")
    for name in ("internal_port", "otlp_endpoint"):
        if getattr(config.server, name) is not None:
            raise StartupError(f"{name} is for `polyadapt serve` alone; leave it out with Ray")
    return config


def read_settings(settings: Settings, part: str) -> Config:
    """The same in a replica, whose log it also sets up as `part`."""
    config = load(settings)
    configure_logging(config.server.log_level, config.server.log_format, part)
    return config
