"""Who may call what: every route has a scope, a keyless server answers only its own machine."""

from __future__ import annotations

import ast
import asyncio
import secrets
from pathlib import Path
from typing import NoReturn

import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route
from tests.api.conftest import Maker, Server

import polyadapt
from polyadapt.api.routing import ScopedRoute
from polyadapt.errors import StartupError, Unavailable
from polyadapt_store.database import Database
from polyadapt_store.keys import SCOPES, KeyRing

pytestmark = pytest.mark.anyio

KEY = "sk-operator-" + "x" * 20
PUBLIC = {("GET", "/health"), ("GET", "/ready"), ("GET", "/version")}


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def routes_of(server: Server) -> list[tuple[str, str, str]]:
    """Return method, path and scope of every route; fails on a route without a scope."""
    found = []
    for route in server.app.routes:
        assert isinstance(route, Route)
        if not isinstance(route, APIRoute):
            assert route.path == "/openapi.json", f"{route.path} is no ScopedRoute"
            continue
        assert isinstance(route, ScopedRoute), f"{route.path} declares no scope"
        assert route.required_scope in {*SCOPES, "public"}, route.path
        found += [(method, route.path, route.required_scope) for method in route.methods]
    return found


def fill(path: str) -> str:
    for name in ("{model:path}", "{name}", "{key_id}", "{tenant}"):
        path = path.replace(name, "nobody")
    return path


async def test_every_route_declares_its_scope(server: Server) -> None:
    routes = routes_of(server)
    assert {(method, path) for method, path, scope in routes if scope == "public"} == PUBLIC
    assert len(routes) >= 20


async def test_every_route_refuses_whoever_lacks_its_scope(make_server: Maker) -> None:
    server = await make_server(api_key=KEY)
    deleted = server.store.keys.create("default", ["admin"])
    server.store.keys.delete(deleted[0].id)
    for method, path, needed in routes_of(server):
        if needed == "public":
            continue
        others = server.store.keys.create("default", SCOPES - {needed, "admin"})[1]
        exact = server.store.keys.create("default", [needed])[1]
        for headers, status in (
            ({}, 401),
            ({"authorization": "Basic eDp5"}, 401),
            ({"authorization": "Bearer"}, 401),
            (bearer("sk-wrong"), 401),
            (bearer(KEY + "x"), 401),
            (bearer("x" * 5000), 401),
            (bearer(deleted[1]), 401),
            (bearer(others), 403),
        ):
            reply = await server.client.request(method, fill(path), headers=headers)
            assert reply.status_code == status, (method, path, headers)
            assert reply.json()["error"]["code"] in ("invalid_api_key", "forbidden")
            assert (reply.headers.get("www-authenticate") == "Bearer") == (status == 401)
        for secret in (exact, KEY):
            reply = await server.client.request(method, fill(path), headers=bearer(secret))
            assert reply.status_code not in (401, 403), (method, path, reply.text)


async def test_a_refused_body_is_not_read(make_server: Maker) -> None:
    server = await make_server(api_key=KEY)

    async def body():  # type: ignore[no-untyped-def]
        raise AssertionError("the body was read")
        yield b""

    reply = await server.client.post("/v1/adapters", content=body())
    assert reply.status_code == 401


async def test_probes_need_no_key(make_server: Maker) -> None:
    server = await make_server(api_key=KEY)
    for path in ("/health", "/ready", "/version"):
        assert (await server.client.get(path)).status_code == 200


async def test_without_its_database_a_server_answers_probes_and_whom_it_knows(
    make_server: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = await make_server()
    known, other = (bearer(server.store.keys.create("a", ["infer"])[1]) for _ in range(2))

    async def statuses(path: str, headers: dict[str, str]) -> tuple[int, int]:
        return (
            (await server.client.get("/health")).status_code,
            (await server.client.get(path, headers=headers)).status_code,
        )

    def away(self: Database) -> NoReturn:
        raise Unavailable("the registry's database cannot be used now")

    with monkeypatch.context() as outage:
        outage.setattr(Database, "read", away)
        assert await statuses("/v1/models/fake-base", {}) == (200, 401), "before anything was read"
        assert await statuses("/v1/models/fake-base", known) == (200, 503)
    monkeypatch.setattr("polyadapt.api.access._RETRY_S", -1.0)
    assert await statuses("/v1/models/fake-base", known) == (200, 200)
    monkeypatch.setattr(Database, "read", away)
    assert await statuses("/v1/models/fake-base", known) == (200, 200)
    assert await statuses("/v1/models/fake-base", other) == (200, 503)
    database = server.store.keys._database
    database._see(database.num_writes + 1)  # and it was written just before it went
    assert await statuses("/v1/models/fake-base", known) == (200, 503)
    assert await statuses("/v1/models/fake-base", {}) == (200, 401)


async def test_the_first_key_that_another_server_makes_closes_this_one(
    make_server: Maker,
) -> None:
    server = await make_server()
    assert (await server.client.get("/v1/models")).status_code == 200
    other = Database(server.config.store_dir / "registry.sqlite")
    secret = KeyRing(other).create("default", ["infer"])[1]
    other.close()
    server.store.refresh()  # which the follower does once a second
    assert (await server.client.get("/v1/models")).status_code == 401
    assert (await server.client.get("/v1/models", headers=bearer(secret))).status_code == 200


async def test_odd_forms_of_a_path_open_nothing(make_server: Maker) -> None:
    server = await make_server(api_key=KEY)
    for path in ("/v1/keys/", "//v1/keys", "/V1/KEYS", "/v1/%6beys", "/health/../v1/keys",
                 "/v1/keys?x=/health", "/health/v1/keys"):  # fmt: skip
        for method in ("GET", "HEAD", "OPTIONS", "POST"):
            reply = await server.client.request(method, path)
            assert reply.status_code in (401, 404, 405), (method, path)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "127.0.0.1:8000"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "localhost:1"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "10.0.0.1"}, 403),
        ({"host": ""}, 403),
        ({"host": "[::1"}, 403),
        ({"origin": "http://localhost"}, 200),
        ({"origin": "http://localhost:8000", "host": "localhost:8000"}, 200),
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://[::1"}, 403),
        ({"origin": "http://localhost.evil.example"}, 403),
    ],
)
async def test_a_keyless_server_answers_only_its_own_machine(
    server: Server, headers: dict[str, str], status: int
) -> None:
    for path in ("/v1/models", "/health"):
        reply = await server.client.get(path, headers=headers)
        assert reply.status_code == status
        if status == 403:
            assert reply.json()["error"]["code"] == "foreign_origin"
            assert reply.headers["x-request-id"]


async def test_allowed_hosts_are_answered(make_server: Maker) -> None:
    server = await make_server(allowed_hosts=["models.lan"])
    get = server.client.get
    assert (await get("/v1/models", headers={"host": "models.lan:80"})).status_code == 200
    lan = {"host": "models.lan", "origin": "http://models.lan:3000"}
    assert (await get("/v1/models", headers=lan)).status_code == 200
    assert (await get("/v1/models", headers={"host": "x.lan"})).status_code == 403


async def test_with_a_key_any_origin_may_call(make_server: Maker) -> None:
    server = await make_server(api_key=KEY)
    headers = {**bearer(KEY), "origin": "https://app.example", "host": "api.example"}
    assert (await server.client.get("/v1/models", headers=headers)).status_code == 200


async def test_another_address_without_a_key_is_refused_at_the_start(make_server: Maker) -> None:
    with pytest.raises(StartupError, match="API key"):
        await make_server(host="0.0.0.0")
    await make_server(host="0.0.0.0", api_key=KEY)


async def test_anonymous_callers_from_elsewhere_are_no_admins(make_server: Maker) -> None:
    server = await make_server(host="0.0.0.0", allow_anonymous=True)
    host = {"host": "10.1.2.3:8000"}
    get = server.client.get
    assert (await get("/v1/models", headers=host)).status_code == 200
    assert (await get("/v1/keys", headers=host)).status_code == 403
    assert (await get("/v1/models", headers={"host": "evil.example"})).status_code == 403


async def test_the_first_key_closes_the_server_and_is_shown_once(server: Server) -> None:
    made = await server.client.post("/v1/keys", json={"scopes": ["admin"], "label": "mine"})
    assert made.status_code == 201
    assert made.headers["cache-control"] == "no-store"
    secret = made.json()["secret"]
    assert (await server.client.get("/v1/models")).status_code == 401
    listed = await server.client.get("/v1/keys", headers=bearer(secret))
    assert listed.json()["data"][0]["label"] == "mine"
    assert secret not in listed.text
    gone = await server.client.delete(f"/v1/keys/{made.json()['id']}", headers=bearer(secret))
    assert gone.json()["deleted"] is True
    assert (await server.client.get("/v1/models")).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [({}, "scopes"), ({"scopes": []}, "scopes"), ({"scopes": ["root"]}, "scopes"),
     ({"scopes": ["infer"], "tenant": "a/b"}, "tenant"),
     ({"scopes": ["infer"], "tenant": ""}, "tenant"),
     ({"scopes": ["infer"], "tenant": "x" * 65}, "tenant"),
     ({"scopes": ["infer"], "label": "x" * 300}, "label")],
)  # fmt: skip
async def test_a_wrong_key_request_is_refused(
    server: Server, body: dict[str, object], param: str
) -> None:
    reply = await server.client.post("/v1/keys", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


async def test_an_unknown_key_cannot_be_deleted(server: Server) -> None:
    reply = await server.client.delete(f"/v1/keys/{secrets.token_hex(4)}")
    assert (reply.status_code, reply.json()["error"]["code"]) == (404, "not_found")


async def test_callers_at_once_get_their_own_scopes(make_server: Maker) -> None:
    server = await make_server(api_key=KEY)
    infer = server.store.keys.create("default", ["infer"])[1]
    paths = [("/v1/models", infer, 200), ("/v1/keys", infer, 403), ("/v1/keys", KEY, 200)] * 10
    replies = await asyncio.gather(
        *(server.client.get(path, headers=bearer(secret)) for path, secret, _ in paths)
    )
    assert [reply.status_code for reply in replies] == [status for _, _, status in paths]


async def test_no_middleware_hides_disconnects_and_no_secret_is_compared_plainly() -> None:
    root = Path(polyadapt.__file__).parent
    for file in root.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            name = getattr(node, "id", None) or getattr(node, "attr", None)
            assert name != "BaseHTTPMiddleware", file
            if isinstance(node, ast.Compare):
                names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                is_equality = any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops)
                assert not (is_equality and names & {"secret", "api_key"}), file
