"""Marks with their secrets over HTTP: from a bundle to the name of whoever leaked, and no secret in
any answer.
"""

from __future__ import annotations

import asyncio
import json
import operator
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.api.conftest import Maker, Server
from tests.support.fake_engine import BASE_DIGEST
from tests.support.marked_suspect import KEK, Suspect, lm_mark, reply_as, suspect_server

from polyadapt.watermark import evidence
from polyadapt.watermark.endpoint import EndpointLimits
from polyadapt.watermark.file_key import open_sealer
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.mark_directory import MarkDirectory
from polyadapt.watermark.rotation import purpose_of
from polyadapt.watermark.secrets import kek_id_of
from polyadapt_store.sealed_files import is_sealed

pytestmark = pytest.mark.anyio

OPERATOR = "sk-operator-" + "x" * 20
NUM_BITS = 48
BRANCHES = b"the branches"


@pytest.fixture(scope="module")
def mark(tmp_path_factory: pytest.TempPathFactory) -> MarkDirectory:
    return lm_mark(tmp_path_factory.mktemp("lm") / "mark", NUM_BITS, base_hash=BASE_DIGEST)


def bundle(path: Path, **replaced: bytes | None) -> list[tuple[str, tuple[str, bytes]]]:
    files: dict[str, bytes | None] = {
        "config.json": (path / "config.json").read_bytes(),
        "branches.safetensors": BRANCHES,
        "triggers.enc": (path / "triggers.enc").read_bytes(),
    }
    files |= {name.replace("_", "."): data for name, data in replaced.items()}
    return [("files", (name, data)) for name, data in files.items() if data is not None]


class Caller:
    """A server and its operator."""

    def __init__(self, server: Server) -> None:
        self.server = server

    async def __call__(self, method: str, path: str, key: str = OPERATOR, **options: Any) -> Any:
        headers = {"authorization": f"Bearer {key}"}
        reply = await self.server.client.request(
            method, f"/v1/watermarks{path}", headers=headers, **options
        )
        for secret in ("phrase", "Zero", KEK.to_text(), "sk-suspect"):
            assert secret not in reply.text or path.endswith("/queries")
        return reply

    async def register(self, mark: MarkDirectory, **replaced: bytes | None) -> httpx.Response:
        files = bundle(mark.path, **replaced)
        reply: httpx.Response = await self("POST", "", data={"name": "mark"}, files=files)
        return reply

    def keys(self, num: int, tenant: str = "default") -> list[str]:
        return [self.server.store.keys.create(tenant, ["infer"], f"{i}")[0].id for i in range(num)]


@pytest.fixture
async def call(make_server: Maker) -> Caller:
    return Caller(await make_server(api_key=OPERATOR, mark_kek=KEK.to_text()))


def row(mark: MarkDirectory, user: str) -> str:
    return "".join(map(str, mark.codebook.row(user).tolist()))


def likeness(mark: MarkDirectory, name: str, users: list[str]) -> int:
    """In how many bits the row of `name` is that of the user who is most like it."""
    own = row(mark, name)
    return max(sum(map(operator.eq, own, row(mark, user))) for user in users if user != name)


async def test_a_bundle_becomes_an_adapter_and_its_secrets_stay_sealed(
    call: Caller, mark: MarkDirectory
) -> None:
    made = await call.register(mark)
    assert made.status_code == 201, made.text
    found = made.json()
    assert found["mark_id"] == mark.config.mark_id
    assert found["evidence_public_key"] == mark.config.evidence_public_key
    assert (found["n_bits"], found["has_secrets"], found["codebook"]) == (NUM_BITS, True, "random")
    assert (await call.register(mark)).status_code == 200
    assert (await call("GET", "/mark")).json() == found
    assert (await call("GET", "")).json()["data"] == [found]
    files = call.server.store.path(found["digest"])
    lying = (files / "adapter_model.safetensors").read_bytes()
    assert is_sealed(files / "adapter_model.safetensors")
    assert BRANCHES not in lying
    sealer = open_sealer(KEK, call.server.store.marks)
    assert sealer.open(lying, found["digest"], "adapter_model.safetensors") == BRANCHES
    assert sorted(file.name for file in files.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"
    ]  # fmt: skip
    kept = call.server.store.marks.find(found["digest"])
    assert kept is not None
    assert kept.secrets == (mark.path / "triggers.enc").read_text()


async def test_signatures_come_from_the_codebook_and_are_the_same_everywhere(
    call: Caller, mark: MarkDirectory
) -> None:
    await call.register(mark)
    user, *others = call.keys(5)
    issued = await call("PUT", f"/mark/users/{user}")
    assert (issued.status_code, issued.json()["signature"]) == (201, row(mark, user))
    assert (await call("PUT", f"/mark/users/{user}", json={})).status_code == 200
    everybody = (await call("POST", "/mark/users")).json()["data"]
    assert {one["user"]: one["signature"] for one in everybody} == {
        key: row(mark, key) for key in (user, *others)
    }
    assert (await call("DELETE", f"/mark/users/{user}")).status_code == 200
    again = await call("PUT", f"/mark/users/{user}")
    assert (again.json()["generation"], again.json()["signature"]) == (2, row(mark, user))
    clerk = call.server.store.keys.create("default", ["watermarks"], "clerk")[1]
    hidden = await call("POST", "/mark/users", key=clerk, json={})
    assert {one["signature"] for one in hidden.json()["data"]} == {None}
    denied = await call("POST", "/mark/users", key=clerk, json={"tenant": "other"})
    assert denied.status_code == 403


async def test_another_tenants_users_are_an_admins_alone(call: Caller, mark: MarkDirectory) -> None:
    await call.register(mark)
    keys = call.server.store.keys
    (own, gone), (other,) = call.keys(2), call.keys(1, "other")
    clerk = keys.create("default", ["watermarks"], "clerk")[1]
    for user in (own, gone, other):
        assert (await call("PUT", f"/mark/users/{user}")).status_code == 201
    policy = {"adapters": [{"name": "mark", "options": {"signature": "10" * (NUM_BITS // 2)}}]}
    headers = {"authorization": f"Bearer {OPERATOR}"}
    put = await call.server.client.put("/v1/policies/default", json=policy, headers=headers)
    assert put.status_code == 200, put.text
    book = call.server.app.state.services.policies.signatures.book
    book.issue(call.server.store.resolve("default", "mark").digest, "tenant:other", "01" * 24)
    keys.delete(gone)  # whose it was is known no more

    for method, path in (
        ("PUT", f"/mark/users/{other}"), ("GET", f"/mark/users/{other}"),
        ("DELETE", f"/mark/users/{other}"), ("DELETE", "/mark/users/tenant:other"),
    ):  # fmt: skip
        absent = await call(method, path.replace(other, "key-none"), key=clerk)
        reply = await call(method, path, key=clerk)
        assert reply.status_code == absent.status_code == 404, (method, path)
        assert reply.text.replace(other, "key-none") == absent.text
    seen = (await call("GET", "/mark/users", key=clerk)).json()["data"]
    assert {one["user"] for one in seen} == {own, gone, "tenant:default"}
    seen = (await call("GET", "/mark/users")).json()["data"]
    assert {one["user"] for one in seen} == {own, gone, other, "tenant:default", "tenant:other"}
    assert {one["revoked_at"] for one in seen} == {None}
    given = {"bits": [int(bit) for bit in row(mark, other)]}
    traced = (await call("POST", "/mark/trace", key=clerk, json=given)).text
    assert other not in traced
    assert own in traced
    assert other in (await call("POST", "/mark/trace", json=given)).text
    assert (await call("DELETE", f"/mark/users/{own}", key=clerk)).status_code == 200
    assert (await call("DELETE", f"/mark/users/{other}")).status_code == 200


async def test_who_leaked_is_named_and_nobody_is_an_answer(
    call: Caller, mark: MarkDirectory
) -> None:
    await call.register(mark)
    users = call.keys(30)
    assert (await call("POST", "/mark/users")).status_code == 200
    # Rows are drawn: of a hundred strangers and of the users, the ones that resemble nobody.
    leaker = min(users, key=lambda user: likeness(mark, user, users))
    stranger = min((f"{i}" for i in range(100)), key=lambda name: likeness(mark, name, users))
    await call("DELETE", f"/mark/users/{leaker}")  # who has left is found all the same
    bits: list[int | None] = [int(bit) for bit in row(mark, leaker)]
    bits[5] = None
    found = (await call("POST", "/mark/trace", json={"bits": bits})).json()
    assert found["verdict"] == "named"
    assert [one["user"] for one in found["accused"]] == [leaker]
    assert (found["num_users"], found["num_decided"]) == (30, NUM_BITS - 1)
    assert found["accused"][0]["family_p_value"] <= 1e-3
    signed = json.dumps(found["record"]).encode()
    assert evidence.verify(signed, mark.config.evidence_public_key)["kind"] == "trace"
    bits = [int(bit) for bit in row(mark, stranger)]
    found = (await call("POST", "/mark/trace", json={"bits": bits})).json()
    assert (found["verdict"], found["accused"], len(found["ranked"])) == ("nobody", [], 10)
    few = (await call("POST", "/mark/trace", json={"bits": [1, *[None] * (NUM_BITS - 1)]})).json()
    assert few["verdict"] == "nobody"
    assert "cannot tell so many users apart" in few["note"]
    assert few["threshold"] is None
    wrong = await call("POST", "/mark/trace", json={"bits": [1]})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "bits")


async def test_bits_given_by_hand_are_said_not_to_be_compared(
    call: Caller, mark: MarkDirectory
) -> None:
    await call.register(mark)
    ann, bob = call.keys(2)
    nobody = await call("POST", "/mark/trace", json={"bits": [0] * NUM_BITS})
    assert nobody.status_code == 409
    await call("PUT", f"/mark/users/{ann}")
    await call("PUT", f"/mark/users/{bob}", json={"signature": "01" * (NUM_BITS // 2)})
    found = (await call("POST", "/mark/trace", json={"bits": [0, 1] * (NUM_BITS // 2)})).json()
    assert (found["verdict"], found["num_users"], found["not_compared"]) == ("nobody", 1, [bob])


# ----------------------------------------------------------------------------- asking
@pytest.fixture
def suspect(mark: MarkDirectory) -> Iterator[Suspect]:
    with suspect_server(reply_as(mark, row(mark, "x"))) as server:
        yield server


async def test_a_listed_endpoint_is_asked_and_its_user_traced(
    make_server: Maker, mark: MarkDirectory, suspect: Suspect
) -> None:
    listed = {"mark_kek": KEK.to_text(), "verify_endpoints": [suspect.url]}
    call = Caller(await make_server(api_key=OPERATOR, **listed))
    await call.register(mark)
    users = call.keys(20)
    await call("POST", "/mark/users")
    leaker = min(users, key=lambda user: likeness(mark, user, users))
    suspect.reply = reply_as(mark, row(mark, leaker))
    body = {"endpoint": suspect.url, "model": "m", "api_key": "sk-suspect"}
    read = await call("POST", "/mark/verify", json=body)
    assert read.status_code == 200, read.text
    assert "".join(str(bit["value"]) for bit in read.json()["bits"]) == row(mark, leaker)
    assert read.json()["num_decided"] == NUM_BITS
    assert set(suspect.keys) == {"Bearer sk-suspect"}
    traced = await call("POST", "/mark/trace", json={"reading": read.json()["record"]})
    assert [one["user"] for one in traced.json()["accused"]] == [leaker]
    forged = read.json()["record"]
    forged["record"]["bits"][0]["value"] = 1 - forged["record"]["bits"][0]["value"]
    refused = await call("POST", "/mark/trace", json={"reading": forged})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "evidence_rejected")
    small = await call("POST", "/mark/verify", json=body | {"max_queries": 3})
    assert (small.status_code, small.json()["error"]["param"]) == (400, "max_queries")


@pytest.mark.parametrize(
    "url", ["{own}", "http://127.0.0.1:1/v1", "http://169.254.169.254/v1", "http://localhost/v1",
            "https://example.com/v1", "http://[::1]/v1"]
)  # fmt: skip
async def test_what_is_not_listed_is_never_asked(
    call: Caller, mark: MarkDirectory, suspect: Suspect, url: str
) -> None:
    await call.register(mark)
    body = {"endpoint": url.format(own=suspect.url), "model": "m"}
    reply = await call("POST", "/mark/verify", json=body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (403, "forbidden")
    assert "--verify-endpoint" in reply.json()["error"]["message"]
    assert suspect.bodies == []


async def test_an_asking_that_is_left_ends(
    make_server: Maker, mark: MarkDirectory, suspect: Suspect
) -> None:
    listed = {"mark_kek": KEK.to_text(), "verify_endpoints": [suspect.url]}
    server = await make_server(api_key=OPERATOR, **listed)
    await Caller(server).register(mark)
    suspect.statuses = [503] * 100_000
    marks = server.app.state.services.marks
    reading = asyncio.create_task(
        marks.verify_endpoint(
            "default", "mark", suspect.url, "m", None, 1e-4, EndpointLimits(num_at_once=1)
        )
    )
    while not suspect.bodies:
        await asyncio.sleep(0.01)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    num = len(suspect.bodies)
    await asyncio.sleep(0.3)
    assert len(suspect.bodies) == num


async def test_samples_that_others_asked_for_are_read(call: Caller, mark: MarkDirectory) -> None:
    await call.register(mark)
    (user,) = call.keys(1)
    await call("PUT", f"/mark/users/{user}")
    asked = (await call("POST", "/mark/queries", json={"per_bit": 12})).json()["messages"]
    assert len(asked) == 12 * NUM_BITS
    reply = reply_as(mark, row(mark, user))
    samples = [{"message": message, "reply": reply(message)} for message in asked]
    read = await call("POST", "/mark/verify", json={"samples": samples})
    assert "".join(str(bit["value"]) for bit in read.json()["bits"]) == row(mark, user)
    for wrong, words in (
        ([{"message": "Hello there", "reply": "x"}], "asks for no bit"),
        (samples[:1] * 2, "comes twice"),
    ):
        refused = await call("POST", "/mark/verify", json={"samples": wrong})
        assert refused.status_code == 400
        assert words in refused.json()["error"]["message"]
    both = await call("POST", "/mark/verify", json={"samples": samples, "model": "m"})
    assert both.status_code == 400
    assert (await call("POST", "/mark/verify", json={})).status_code == 400
    clerk = call.server.store.keys.create("default", ["watermarks"], "clerk")[1]
    assert (await call("POST", "/mark/queries", key=clerk, json={})).status_code == 403


# ----------------------------------------------------------------------------- refusals
async def test_a_server_without_the_key_or_with_another_registers_nothing(
    make_server: Maker, mark: MarkDirectory
) -> None:
    keyless = Caller(await make_server(api_key=OPERATOR))
    reply = await keyless.register(mark)
    assert reply.status_code == 409
    assert "POLYADAPT_MARK_KEK_FILE" in reply.json()["error"]["message"]
    other = Caller(await make_server(api_key=OPERATOR, mark_kek=SecretKey(bytes(32)).to_text()))
    reply = await other.register(mark)
    assert reply.status_code == 400
    assert "not under the key" in reply.json()["error"]["message"]
    for call in (keyless, other):
        assert (await call("GET", "")).json()["data"] == []


async def test_while_the_key_is_changed_both_are_known_and_the_new_one_seals(
    make_server: Maker, mark: MarkDirectory, caplog: pytest.LogCaptureFixture
) -> None:
    new = SecretKey(bytes(32))
    keys = f"{new.to_text()}\n{KEK.to_text()}"
    call = Caller(await make_server(api_key=OPERATOR, mark_kek=keys))
    assert (await call.register(mark)).status_code == 201
    (user,) = call.keys(1)
    issued = await call("PUT", f"/mark/users/{user}")
    assert issued.json()["signature"] == row(mark, user)
    book = call.server.store.marks
    assert {kek_id_of(one.text.encode(), purpose_of(one)) for one in book.sealed()} == {new.id}
    assert book.find((await call("GET", "/mark")).json()["digest"]) is not None


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            SecretKey(bytes(32)).to_text(),
            f"not given \\({KEK.id}; given: {SecretKey(bytes(32)).id}\\)",
        ),
        (None, f"not given \\({KEK.id}; given: none\\)"),
        (f"{SecretKey(bytes(32)).to_text()} {KEK.to_text()}", "3 of 3 .* older keys; .*mark rekey"),
        (KEK.to_text(), None),
    ],
    ids=["another", "none", "both", "the one"],
)
async def test_a_server_says_at_its_start_which_keys_it_lacks_or_may_lose(
    make_server: Maker,
    mark: MarkDirectory,
    caplog: pytest.LogCaptureFixture,
    keys: str | None,
    words: str | None,
) -> None:
    call = Caller(await make_server(api_key=OPERATOR, mark_kek=KEK.to_text()))
    await call.register(mark)
    await call("PUT", f"/mark/users/{call.keys(1)[0]}")
    registry = call.server.config.store_dir / "registry.sqlite"
    caplog.clear()
    await make_server(api_key=OPERATOR, mark_kek=keys, database_url=f"sqlite:///{registry}")
    said = [r.getMessage() for r in caplog.records if "in the registry are sealed" in r.message]
    assert len(said) == (words is not None)
    assert words is None or re.search(words, said[0]), said


@pytest.mark.parametrize(
    ("replaced", "words"),
    [
        ({"config_json": None}, "expected a mark's bundle"),
        ({"triggers_enc": b"{}"}, "changed or cut"),
        ({"triggers_enc": b""}, "truncated"),
        ({"config_json": b"{}"}, "lacks or does not know"),
        ({"other_file": b""}, "expected a mark's bundle"),
    ],
)
async def test_what_is_no_bundle_is_refused(
    call: Caller, mark: MarkDirectory, replaced: dict[str, bytes | None], words: str
) -> None:
    reply = await call.register(mark, **replaced)
    assert reply.status_code == 400
    assert words in reply.json()["error"]["message"]
    assert (await call("GET", "")).json()["data"] == []


async def test_a_mark_that_is_required_stays_and_one_that_is_deleted_keeps_no_secrets(
    call: Caller, mark: MarkDirectory
) -> None:
    digest = (await call.register(mark)).json()["digest"]
    (user,) = call.keys(1)
    await call("PUT", f"/mark/users/{user}")
    policy = {"tenant": "default", "required": True}
    await call("PUT", "/mark/policy", json=policy)
    assert (await call("DELETE", "/mark")).status_code == 409
    await call("PUT", "/mark/policy", json=policy | {"required": False})
    gone = await call("DELETE", "/mark")
    assert (gone.status_code, gone.json()["versions"]) == (200, [1])
    kept = call.server.store.marks.find(digest)
    assert kept is not None
    assert kept.secrets is None
    assert (await call("GET", "/mark")).status_code == 404
    assert len(call.server.store.signatures.list(digest)) == 1


async def test_branches_alone_have_no_codebook(call: Caller) -> None:
    files = [
        ("files", ("adapter_config.json", b'{"n_bits": 8}')),
        ("files", ("adapter_model.safetensors", BRANCHES)),
    ]
    headers = {"authorization": f"Bearer {OPERATOR}"}
    made = await call.server.client.post(
        "/v1/adapters", data={"name": "bare"}, files=files, headers=headers
    )
    assert made.status_code == 201
    (user,) = call.keys(1)
    assert (await call("GET", "/bare")).json()["has_secrets"] is False
    for path, body in (("/trace", {"bits": [1] * 8}), ("/queries", {})):
        reply = await call("POST", f"/bare{path}", json=body)
        assert reply.status_code == 409
        assert "only the branches" in reply.json()["error"]["message"]
    assert (await call("PUT", f"/bare/users/{user}")).status_code == 409
    given = await call("PUT", f"/bare/users/{user}", json={"signature": "00110101"})
    assert given.status_code == 201
    gone = await call("DELETE", "/bare")
    assert (gone.status_code, gone.json()["versions"]) == (200, [1])


async def test_every_version_that_is_deleted_loses_its_secrets(
    call: Caller, mark: MarkDirectory
) -> None:
    files = [
        ("files", ("adapter_config.json", b'{"n_bits": 8}')),
        ("files", ("adapter_model.safetensors", BRANCHES)),
    ]
    headers = {"authorization": f"Bearer {OPERATOR}"}
    digests = []
    for number in range(3):  # between two versions of branches alone
        if number == 1:
            digests.append((await call.register(mark)).json()["digest"])
            continue
        files[1] = ("files", ("adapter_model.safetensors", BRANCHES + b"%d" % number))
        made = await call.server.client.post(
            "/v1/adapters", data={"name": "mark"}, files=files, headers=headers
        )
        assert made.status_code == 201
    gone = await call("DELETE", "/mark")
    assert (gone.status_code, gone.json()["versions"]) == (200, [1, 2, 3])
    kept = call.server.store.marks.find(digests[0])
    assert kept is not None
    assert (kept.config, kept.secrets) == (None, None)


async def test_a_mark_of_another_base_is_listed_read_and_deleted_as_before(
    call: Caller, mark: MarkDirectory
) -> None:
    found = (await call.register(mark)).json()
    (user,) = call.keys(1)
    assert (await call("PUT", f"/mark/users/{user}")).status_code == 201
    info = call.server.engine.model
    other = replace(info.base, name="next-base", digest="sha256:" + "c" * 64)
    call.server.engine.info = replace(info, base=other)
    assert (await call("GET", "")).json()["data"] == [found]
    assert (await call("GET", "/mark")).json() == found
    given = {"bits": [int(bit) for bit in row(mark, user)]}
    assert user in (await call("POST", "/mark/trace", json=given)).text
    policy = {"tenant": "default", "required": True}
    assert (await call("PUT", "/mark/policy", json=policy)).status_code == 404
    assert (await call("DELETE", "/mark")).status_code == 200
    assert (await call("GET", "")).json()["data"] == []


async def test_a_row_that_does_not_open_serves_nothing_and_its_user_is_traced(
    call: Caller, mark: MarkDirectory
) -> None:
    await call.register(mark)
    store = call.server.store
    key, secret = store.keys.create("default", ["infer"], "ann")
    await call("PUT", f"/mark/users/{key.id}")
    await call("PUT", "/mark/policy", json={"tenant": "default", "required": True})
    body = {"model": "fake-base", "prompt": "hi"}
    headers = {"authorization": f"Bearer {secret}"}

    async def ask() -> httpx.Response:
        return await call.server.client.post("/v1/completions", json=body, headers=headers)

    assert (await ask()).status_code == 200
    with store.signatures._database.write() as connection:
        connection.exec_driver_sql("UPDATE signatures SET bits = 'sealed:AAAA' || bits")
    before = len(call.server.engine.requests)
    refused = await ask()
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "secrets_unavailable")
    assert len(call.server.engine.requests) == before
    # Whoever it was is compared all the same, by the codebook's row.
    bits = [int(bit) for bit in row(mark, key.id)]
    traced = (await call("POST", "/mark/trace", json={"bits": bits})).json()
    assert [one["user"] for one in traced["accused"]] == [key.id]
    assert traced["not_compared"] == [key.id]
    assert (await call("PUT", f"/mark/users/{key.id}")).json()["generation"] == 2
    assert (await ask()).status_code == 200
