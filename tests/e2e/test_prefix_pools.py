"""Tenants of one prefix pool find each other's pages, and nobody else does."""

from __future__ import annotations

from pathlib import Path

from tests.support.servers import running_server

from polyadapt_store.database import Database
from polyadapt_store.keys import KeyRing

PAGE = 16
PROMPT = [7 + 5 * i % 90 for i in range(3 * PAGE + 5)]


def test_only_tenants_of_one_pool_share_pages(tiny_model, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "store").mkdir(parents=True, mode=0o700)
    database = Database(home / "store" / "registry.sqlite")
    secrets = {t: KeyRing(database).create(t, ["infer"])[1] for t in ("a", "b", "c", "legal")}
    database.close()
    options = ("--prefix-pool", "legal=a+b", "--page-size", str(PAGE))
    with running_server(home, tiny_model("llama"), *options) as server:

        def num_cached(tenant: str, **fields: object) -> int:
            (base,) = server.get("/v1/models", headers=header(tenant)).json()["data"]
            body = {"model": base["id"], "prompt": PROMPT, "max_tokens": 1, **fields}
            reply = server.post("/v1/completions", json=body, headers=header(tenant))
            assert reply.status_code == 200, reply.text
            cached: int = reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            return cached

        def header(tenant: str) -> dict[str, str]:
            return {"authorization": f"Bearer {secrets[tenant]}"}

        assert num_cached("a") == 0
        assert num_cached("b") == 3 * PAGE, "the same pool"
        assert num_cached("c") == 0, "a tenant by itself"
        assert num_cached("legal") == 0, "a tenant with a pool's name"
        assert num_cached("c", cache_salt="legal") == 0
        assert num_cached("b", cache_salt="mine") == 0
        assert num_cached("a", cache_salt="mine") == 3 * PAGE, "a salt parts the pool"
        assert num_cached("c") == 3 * PAGE
