"""What travels through Ray and what does not."""

from __future__ import annotations

import pytest

from polyadapt.errors import StartupError
from polyadapt.ray_serve.settings import SECRETS, load


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_refused_with_the_variable_that_takes_it(name: str):
    with pytest.raises(StartupError, match=f"POLYADAPT_{name.upper()}") as caught:
        load({name: "hidden"})
    assert "hidden" not in caught.value.message


def test_every_secret_setting_is_known_as_one():
    from pydantic import SecretStr

    from polyadapt.config import Config

    sections = [f.annotation for f in Config.model_fields.values() if f.annotation is not None]
    found = {
        name
        for section in sections
        for name, field in getattr(section, "model_fields", {}).items()
        if field.annotation == SecretStr | None
    }
    assert found == set(SECRETS)


def test_several_engines_of_one_replica_are_refused():
    with pytest.raises(StartupError, match="Ray gives each engine its device"):
        load({"devices": "cuda:0,cuda:1"})


def test_fewer_engines_at_most_than_at_least_are_refused():
    with pytest.raises(StartupError, match="below min_engines 3"):
        load({"min_engines": 3, "max_engines": 2})


@pytest.mark.parametrize(
    "settings", [{"internal_port": 9000}, {"otlp_endpoint": "http://127.0.0.1:4318"}]
)
def test_what_no_ingress_replica_does_is_refused(settings: dict[str, object]):
    with pytest.raises(StartupError, match="leave it out with Ray"):
        load(settings)


def test_a_port_that_ray_would_choose_is_refused():
    with pytest.raises(StartupError, match="give --port"):
        load({"port": 0})


def test_several_ingress_replicas_without_a_store_that_they_share_are_refused():
    with pytest.raises(StartupError, match="2 ingress replicas need a store that they share"):
        load({"ingress_replicas": 2})
    assert load({"ingress_replicas": 2, "blob_url": "s3://b"}).ray.ingress_replicas == 2
