"""What a server says of itself before anybody asks it for work."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.api.conftest import Maker
from tests.support.fake_engine import FakeEngine, make_info

from polyadapt.adapters.registry import FAMILIES
from polyadapt.api.schemas.capabilities import CapabilitiesReply
from polyadapt.types import MAX_ADAPTERS, SiteSpec

pytestmark = pytest.mark.anyio


async def test_the_capabilities_are_those_of_this_server(make_server: Maker) -> None:
    info = make_info()
    sites = (SiteSpec("a.q", "linear", 30, 34, False), SiteSpec("a.k", "linear", 30, 34, False),
             SiteSpec("embed", "embedding", 260, 30, False))  # fmt: skip
    base = replace(info.base, sites=sites)
    engine = FakeEngine(model=replace(info, base=base, adapter_bytes=512 * 9 + 1))
    server = await make_server(
        engine, prefix_cache=False, speculative_tokens=3, max_upload_files=7, max_n=5
    )
    reply = await server.client.get("/v1/capabilities")
    assert reply.status_code == 200, reply.text
    body = CapabilitiesReply.model_validate(reply.json(), extra="forbid")
    assert (body.model, body.dtype, body.device) == ("fake-base", "float32", "cpu")
    assert (body.strategy, body.architecture) == ("fake", "FakeForCausalLM")
    assert body.base_digest == info.base.digest
    assert [family.name for family in body.families] == [family.name for family in FAMILIES]
    limits = body.limits
    assert limits.max_adapters_per_request == MAX_ADAPTERS == 4
    assert limits.max_rank == 9, "128 columns of 4 bytes a rank"
    assert (limits.max_model_len, limits.max_num_seqs, limits.max_waiting) == (256, 8, 16)
    assert (limits.max_upload_files, limits.max_n) == (7, 5)
    assert limits.max_adapter_bytes == 512 * 9 + 1
    features = body.features
    assert (features.composition, features.prefix_cache, features.exact) == (True, False, False)
    assert features.speculative_tokens == 3
    assert (features.automatic_choice, features.policies) == (True, True)
    assert features.auto_threshold == server.config.server.auto_threshold
    assert features.on_cold == ["wait", "base", "fallback", "fail"]


async def test_a_base_without_linears_has_no_rank(make_server: Maker) -> None:
    server = await make_server()
    assert (await server.client.get("/v1/capabilities")).json()["limits"]["max_rank"] == 0


async def test_an_engine_that_starts_has_no_capabilities_yet(make_server: Maker) -> None:
    server = await make_server()
    server.engine.is_ready = False
    reply = await server.client.get("/v1/capabilities")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "engine_unavailable")
