"""The compose file hangs together; Docker has not run it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from polyadapt.config import Config, load_config

FOLDER = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"])


def substituted(value: str) -> str:
    """Return a value as compose reads it where nothing but the required variable is set."""
    return re.sub(r"\$\{\w+(?::?-([^}]*)|:\?[^}]*)\}", lambda m: m[1] or "given", value)


@pytest.fixture(scope="module")
def config(services: dict[str, Any]) -> Config:
    environ = {name: substituted(v) for name, v in services["server"]["environment"].items()}
    return load_config({}, environ=environ)


def test_the_server_finds_its_registry_and_its_store(
    services: dict[str, Any], config: Config
) -> None:
    assert config.store.database_url is not None
    url = config.store.database_url.get_secret_value()
    owner = services["postgres"]["environment"]
    assert url == (
        f"postgresql://{owner['POSTGRES_USER']}:{owner['POSTGRES_PASSWORD']}@postgres/polyadapt"
    )
    environ, s3 = services["server"]["environment"], services["s3"]["environment"]
    assert {name: environ[name] for name in s3} == s3, "the server has other keys than its S3"
    bucket = re.fullmatch(r"s3://([^/]+)/adapters", config.store.blob_url or "")
    assert bucket
    assert f"-name {bucket[1]}'" in services["bucket"]["command"][0]
    assert environ["AWS_ENDPOINT_URL"].startswith("http://s3:")


def test_prometheus_scrapes_the_internal_port(services: dict[str, Any], config: Config) -> None:
    scrape = yaml.safe_load((FOLDER / "prometheus" / "prometheus.yaml").read_text())
    (job,) = scrape["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{config.server.internal_port}"]}]
    published = [port for port in services["server"]["ports"] if "8001" in port]
    assert not published, "the internal port needs no key"
    (source,) = yaml.safe_load(
        (FOLDER / "grafana/provisioning/datasources/prometheus.yaml").read_text()
    )["datasources"]
    assert source["url"] == "http://prometheus:9090"


def test_only_loopback_is_published(services: dict[str, Any]) -> None:
    for service in services.values():
        for port in service.get("ports", ()):
            assert substituted(port).startswith("127.0.0.1:")


def test_images_have_versions_and_references_exist(services: dict[str, Any]) -> None:
    volumes = yaml.safe_load((FOLDER / "compose.yaml").read_text())["volumes"]
    for service in services.values():
        assert re.search(r":v?\d+\.\d+", service["image"]), "a tag that moves"
        assert set(service.get("depends_on", ())) <= set(services)
        for mount in service.get("volumes", ()):
            source = mount.split(":")[0]
            assert (FOLDER / source).is_dir() if source.startswith(".") else source in volumes


def test_the_grace_outlasts_the_drain(services: dict[str, Any], config: Config) -> None:
    grace_s = int(services["server"]["stop_grace_period"].removesuffix("s"))
    assert grace_s >= config.server.drain_notice_s + config.server.drain_grace_s + 20
