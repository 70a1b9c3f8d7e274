"""Names and uses: resolving counts, releasing is exact, deleting waits for what it must."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_engine import BASE_DIGEST, FakeEngine

from polyadapt.errors import (
    AdapterDeleted,
    AdapterRejected,
    AdapterUnavailable,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    Problem,
)
from polyadapt.tasks.directory import (
    AdapterDirectory,
    AdapterRef,
    DeleteMode,
    Lease,
    OnCold,
    UploadedFile,
)
from polyadapt.types import AdapterId, AppliedAdapter, WhenCold
from polyadapt_store.database import Database
from polyadapt_store.manifest import ValidationReport
from polyadapt_store.policies import PolicyEntry
from polyadapt_store.store import AdapterStore

pytestmark = pytest.mark.anyio
TENANT = "default"


def report(base_digest: str = BASE_DIGEST, *, is_scalable: bool = True) -> ValidationReport:
    return ValidationReport(
        family="lora",
        rank=4,
        target_modules=("q_proj",),
        num_elements=10,
        num_tensors=2,
        is_scalable=is_scalable,
        base_model="some-base",
        base_digest=base_digest,
    )


class Judge:
    """A validator whose verdict tests can change."""

    def __init__(self) -> None:
        self.verdict = report()

    def __call__(self, directory: Path) -> ValidationReport:
        return self.verdict


@pytest.fixture
def judge() -> Judge:
    return Judge()


@pytest.fixture
def store(tmp_path: Path, judge: Judge) -> Iterator[AdapterStore]:
    with AdapterStore(tmp_path / "store", judge) as opened:
        yield opened


@pytest.fixture
async def engine() -> FakeEngine:
    made = FakeEngine()
    await made.start()
    return made


@pytest.fixture
async def directory(store: AdapterStore, engine: FakeEngine) -> AsyncIterator[AdapterDirectory]:
    made = AdapterDirectory(store, engine)
    yield made
    made.check_integrity()
    await made.close()


def files(marker: str) -> list[UploadedFile]:
    return [
        UploadedFile("adapter_config.json", io.BytesIO(b"{}")),
        UploadedFile("adapter_model.safetensors", io.BytesIO(marker.encode())),
    ]


async def upload(directory: AdapterDirectory, name: str, marker: str | None = None) -> AdapterId:
    record, _ = await directory.upload(TENANT, name, files(marker or name))
    return record.adapter_id


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("fake-base", None),
        ("poet", 2),
        ("poet@1", 1),
        ("poet@2", 2),
        ("fake-base:poet", 2),
        ("fake-base::poet", 2),
        ("fake-base::poet@1", 1),
    ],
)
async def test_every_form_of_a_model_name_resolves(
    directory: AdapterDirectory, model: str, expected: int | None
) -> None:
    await upload(directory, "poet", "one")
    await upload(directory, "poet", "two")
    lease = directory.acquire(TENANT, model)
    assert [adapter.version for adapter in lease.ids] == ([] if expected is None else [expected])
    lease.release()


@pytest.mark.parametrize(
    "model",
    ["nobody", "poet@9", "poet@0", "poet@", "@1", "fake-base:", "fake-base:::poet", "a b", "../x",
     "other-base:poet", "poet@1@1", "poet,poet", "p" * 300, "", "\0"],
)  # fmt: skip
async def test_every_other_name_is_not_found(directory: AdapterDirectory, model: str) -> None:
    await upload(directory, "poet")
    with pytest.raises(ModelNotFound) as caught:
        directory.acquire(TENANT, model)
    assert caught.value.param == "model"


async def test_adapters_replace_what_the_model_names(directory: AdapterDirectory) -> None:
    poet, chef = await upload(directory, "poet"), await upload(directory, "chef")
    lease = directory.acquire(TENANT, "poet", [AdapterRef("chef@1", 0.5)])
    assert lease.applied == (AppliedAdapter(chef, 0.5),)
    assert directory.num_uses(poet) == 0
    lease.release()
    lease = directory.acquire(TENANT, "poet", [])
    assert lease.ids == ()
    lease.release()
    with pytest.raises(ModelNotFound) as caught:
        directory.acquire(TENANT, "poet", [AdapterRef("nobody")])
    assert caught.value.param == "adapters[0].name"


async def test_a_composition_is_counted_adapter_by_adapter(directory: AdapterDirectory) -> None:
    poet, chef = await upload(directory, "poet"), await upload(directory, "chef")
    refs = [AdapterRef("chef", -0.5), AdapterRef("poet@1", rank=3)]
    lease = directory.acquire(TENANT, "fake-base", refs)
    assert lease.applied == (AppliedAdapter(chef, -0.5), AppliedAdapter(poet, 1.0, 3))
    assert (directory.num_uses(poet), directory.num_uses(chef)) == (1, 1)
    lease.release()
    assert (directory.num_uses(poet), directory.num_uses(chef)) == (0, 0)


async def test_what_contradicts_itself_is_counted_nowhere(directory: AdapterDirectory) -> None:
    poet, twin = await upload(directory, "poet", "x"), await upload(directory, "twin", "x")
    newer = await upload(directory, "poet", "y")
    for model, refs in (
        ("fake-base", [AdapterRef("poet@1"), AdapterRef("twin")]),
        ("fake-base", [AdapterRef("poet"), AdapterRef("poet", 0.5)]),
        ("poet@1", [AdapterRef("poet")]),
    ):
        with pytest.raises(InvalidRequest):
            directory.acquire(TENANT, model, refs)
    assert all(directory.num_uses(adapter) == 0 for adapter in (poet, twin, newer))


async def test_a_fallback_is_counted_until_the_request_ends(
    directory: AdapterDirectory, store: AdapterStore
) -> None:
    poet, chef = await upload(directory, "poet"), await upload(directory, "chef")
    lease = directory.acquire(TENANT, "poet", on_cold=OnCold("fallback", "chef", timeout_ms=7))
    assert lease.applied == (AppliedAdapter(poet),)
    assert lease.when_cold == WhenCold(7, (AppliedAdapter(chef),))
    assert (directory.num_uses(poet), directory.num_uses(chef)) == (1, 1)
    deletion = asyncio.create_task(directory.delete(TENANT, "chef", None, "drain"))
    await _until_gone(directory, "chef")
    await _settle()
    assert store.path(chef.digest).exists()
    lease.release()
    await deletion
    assert not store.path(chef.digest).exists()


async def test_a_scale_is_refused_where_the_family_is_not_linear(
    directory: AdapterDirectory, judge: Judge
) -> None:
    judge.verdict = report(is_scalable=False)
    await upload(directory, "poet")
    for scale in (0.0, 1.0):
        directory.acquire(TENANT, "poet", [AdapterRef("poet", scale)]).release()
    with pytest.raises(InvalidRequest, match="linear"):
        directory.acquire(TENANT, "poet", [AdapterRef("poet", 0.5)])


async def test_an_adapter_of_another_base_is_not_served(
    directory: AdapterDirectory, judge: Judge
) -> None:
    judge.verdict = report("sha256:" + "c" * 64)
    await upload(directory, "poet")
    with pytest.raises(ModelNotFound, match="some-base"):
        directory.acquire(TENANT, "poet")


async def test_releasing_twice_is_an_error_of_ours(directory: AdapterDirectory) -> None:
    poet = await upload(directory, "poet")
    first, second = directory.acquire(TENANT, "poet"), directory.acquire(TENANT, "poet")
    assert directory.num_uses(poet) == 2
    first.release()
    with pytest.raises(AssertionError):
        first.release()
    assert directory.num_uses(poet) == 1
    second.release()
    assert directory.num_uses(poet) == 0


async def test_draining_waits_for_the_last_use_and_hides_the_name_at_once(
    directory: AdapterDirectory, engine: FakeEngine, store: AdapterStore
) -> None:
    poet = await upload(directory, "poet")
    first, second = directory.acquire(TENANT, "poet"), directory.acquire(TENANT, "poet")
    deletion = asyncio.create_task(directory.delete(TENANT, "poet", None, "drain"))
    await _until_gone(directory, "poet")
    while poet not in directory._unused:
        assert not deletion.done()
        await asyncio.sleep(0.001)
    first.release()
    await _settle()
    assert not deletion.done()
    assert store.path(poet.digest).exists()
    assert engine.unloaded == []
    second.release()
    assert [record.version for record in await deletion] == [1]
    assert engine.unloaded == [poet.digest]
    assert not store.path(poet.digest).exists()
    assert directory.ids_of(poet.digest) == frozenset()


@pytest.mark.parametrize("mode", ["drain", "now"])
async def test_what_another_tenant_has_under_the_same_name_is_not_waited_for(
    directory: AdapterDirectory, store: AdapterStore, mode: DeleteMode
) -> None:
    poet = await upload(directory, "poet")
    theirs, _ = await directory.upload("other", "poet", files("poet"))
    assert (theirs.name, theirs.version, theirs.digest) == ("poet", 1, poet.digest)
    lease = directory.acquire("other", "poet")
    await asyncio.wait_for(directory.delete(TENANT, "poet", None, mode), 10)
    assert directory.ids_of(poet.digest) == {theirs.adapter_id}
    directory.again(lease).release()
    deletion = asyncio.create_task(directory.delete("other", "poet", None, "drain"))
    await asyncio.sleep(0.05)  # time to do what it should not
    assert store.path(poet.digest).exists()
    lease.release()
    await deletion
    assert not store.path(poet.digest).exists()


async def test_deleting_now_cancels_running_requests(
    directory: AdapterDirectory, engine: FakeEngine
) -> None:
    poet = await upload(directory, "poet")
    lease = directory.acquire(TENANT, "poet")
    deletion = asyncio.create_task(directory.delete(TENANT, "poet", None, "now"))
    while poet.digest not in engine.deleted:
        await asyncio.sleep(0.001)
    assert not deletion.done()
    lease.release()
    await deletion


async def test_bytes_that_another_name_has_stay(
    directory: AdapterDirectory, engine: FakeEngine, store: AdapterStore
) -> None:
    poet = await upload(directory, "poet", "same")
    twin = await upload(directory, "twin", "same")
    assert poet.digest == twin.digest
    other = directory.acquire(TENANT, "twin")
    await directory.delete(TENANT, "poet", None, "now")
    assert engine.unloaded == []
    assert engine.deleted == set()
    assert store.path(poet.digest).exists()
    assert directory.ids_of(poet.digest) == {twin}
    other.release()
    await directory.delete(TENANT, "twin", None, "drain")
    assert not store.path(poet.digest).exists()


@pytest.mark.parametrize("is_gone", [True, False])
async def test_a_deletion_goes_on_when_its_caller_goes_away(
    directory: AdapterDirectory, store: AdapterStore, is_gone: bool
) -> None:
    poet = await upload(directory, "poet")
    lease = directory.acquire(TENANT, "poet")
    deletion = asyncio.create_task(directory.delete(TENANT, "poet", None, "drain"))
    await asyncio.sleep(0)
    if is_gone:
        await _until_gone(directory, "poet")
    deletion.cancel()
    await asyncio.wait({deletion})
    lease.release()
    while store.path(poet.digest).exists():
        await asyncio.sleep(0.001)


async def test_closing_does_not_wait_for_requests_of_deleted_names(
    directory: AdapterDirectory, store: AdapterStore
) -> None:
    poet = await upload(directory, "poet")
    lease = directory.acquire(TENANT, "poet")
    deletion = asyncio.create_task(directory.delete(TENANT, "poet", None, "drain"))
    await _until_gone(directory, "poet")
    await directory.close()
    await deletion
    assert store.path(poet.digest).exists()
    lease.release()


async def test_a_dead_engine_does_not_hold_up_a_deletion(
    directory: AdapterDirectory, engine: FakeEngine, store: AdapterStore
) -> None:
    poet = await upload(directory, "poet")

    async def dead(digest: str) -> None:
        raise EngineUnavailable("down")

    engine.unload_adapter = dead  # type: ignore[method-assign]
    await directory.delete(TENANT, "poet", None, "drain")
    assert not store.path(poet.digest).exists()


async def test_one_version_can_be_deleted(directory: AdapterDirectory) -> None:
    await upload(directory, "poet", "one")
    await upload(directory, "poet", "two")
    await directory.delete(TENANT, "poet", 2, "drain")
    lease = directory.acquire(TENANT, "poet")
    assert lease.ids[0].version == 1
    lease.release()


@pytest.mark.parametrize(
    "error",
    [AdapterRejected([Problem("x", "bad")]), AdapterUnavailable("full"), EngineUnavailable("down")],
)
async def test_what_the_engine_cannot_read_is_never_visible(
    directory: AdapterDirectory, engine: FakeEngine, store: AdapterStore, error: Exception
) -> None:
    engine.prepare_error = error  # type: ignore[assignment]
    with pytest.raises(type(error)):
        await upload(directory, "poet")
    with pytest.raises(ModelNotFound):
        directory.acquire(TENANT, "poet")
    assert store.list(TENANT).records == ()
    engine.prepare_error = None
    assert (await upload(directory, "poet")).version == 1
    assert [adapter.name for adapter in engine.prepared] == ["poet"]


async def test_the_bases_name_is_taken(directory: AdapterDirectory) -> None:
    with pytest.raises(InvalidRequest, match="base"):
        await upload(directory, "fake-base")


async def test_the_same_bytes_are_the_same_version(directory: AdapterDirectory) -> None:
    first, again = await upload(directory, "poet", "x"), await upload(directory, "poet", "x")
    assert first == again


async def test_names_are_known_after_a_restart(
    store: AdapterStore, engine: FakeEngine, directory: AdapterDirectory
) -> None:
    one, two = await upload(directory, "poet", "one"), await upload(directory, "poet", "two")
    again = AdapterDirectory(store, engine)
    assert await again.follow() == 2
    assert again.ids_of(one.digest) == {one}
    assert again.ids_of(two.digest) == {two}


async def test_loading_holds_a_use_only_while_it_lasts(
    directory: AdapterDirectory, engine: FakeEngine
) -> None:
    poet = await upload(directory, "poet")
    record = await directory.load(TENANT, "poet", is_pinned=True)
    assert directory.residency(record).is_pinned
    assert directory.residency(record).tier == "device"
    assert directory.num_uses(poet) == 0
    await directory.unload(TENANT, "poet")
    assert directory.residency(record).tier == "store"


async def test_the_base_cannot_be_loaded(directory: AdapterDirectory) -> None:
    for call in (directory.load(TENANT, "fake-base", is_pinned=False),
                 directory.unload(TENANT, "fake-base")):  # fmt: skip
        with pytest.raises(ModelNotFound):
            await call


def test_a_lease_without_adapters_is_released_like_any() -> None:
    released: list[Lease] = []
    lease = Lease((), released.append)
    lease.release()
    assert released == [lease]


async def _settle() -> None:
    """Give everything that is ready a turn."""
    for _ in range(5):
        await asyncio.sleep(0)


async def _until_gone(directory: AdapterDirectory, name: str) -> None:
    while True:
        try:
            directory.acquire(TENANT, name).release()
        except ModelNotFound:
            return
        await asyncio.sleep(0.001)


# ----------------------------------------------------------------------------- held again
async def until_gone(directory: AdapterDirectory, name: str) -> None:
    """Return when the name stands for nothing, though its deletion may wait."""
    while True:
        try:
            directory.find(TENANT, name)
        except ModelNotFound:
            return
        await asyncio.sleep(0.001)


async def test_a_lease_is_held_again_whatever_its_name_stands_for_by_now(
    directory: AdapterDirectory,
) -> None:
    first = await upload(directory, "poet", "one")
    held = directory.acquire(TENANT, "poet")
    await upload(directory, "poet", "two")
    deletion = asyncio.create_task(directory.delete(TENANT, "poet", None, "drain"))
    await until_gone(directory, "poet")
    again = directory.again(held)
    assert again.applied == held.applied == (AppliedAdapter(first),)
    assert directory.num_uses(first) == 2
    held.release()
    assert not deletion.done()
    again.release()
    await deletion
    assert directory.num_uses(first) == 0


async def test_a_lease_of_what_was_deleted_with_now_is_not_held_again(
    directory: AdapterDirectory, engine: FakeEngine
) -> None:
    poet = await upload(directory, "poet", "one")
    held = directory.acquire(TENANT, "poet")
    deletion = asyncio.create_task(directory.delete(TENANT, "poet", None, "now"))
    while not engine.deleted:
        await asyncio.sleep(0.001)
    with pytest.raises(AdapterDeleted, match="'poet'"):
        directory.again(held)
    assert directory.num_uses(poet) == 1
    held.release()
    await deletion
    again = directory.acquire(TENANT, (await upload(directory, "poet", "one")).name)
    directory.again(again).release()
    again.release()


async def test_bytes_that_another_name_has_are_held_again_after_a_deletion_with_now(
    directory: AdapterDirectory,
) -> None:
    await upload(directory, "poet", "same")
    await upload(directory, "twin", "same")
    held = directory.acquire(TENANT, "poet")
    deletion = asyncio.create_task(directory.delete(TENANT, "poet", None, "now"))
    await until_gone(directory, "poet")
    await asyncio.sleep(0.05)  # time to do what it should not
    directory.again(held).release()
    held.release()
    await deletion


async def test_who_owns_a_name(directory: AdapterDirectory) -> None:
    await upload(directory, "poet")
    await directory.upload("shared", "everybody", files("everybody"))
    assert directory.owns(TENANT, "poet")
    assert not directory.owns(TENANT, "everybody")
    assert not directory.owns(TENANT, "nobody")
    assert not directory.owns("other", "poet")


# ----------------------------------------------------------------------------- the event loop
async def test_what_is_asked_for_is_read_beside_the_event_loop_once(
    directory: AdapterDirectory, store: AdapterStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("poet", "chef", "judge"):
        await upload(directory, name)
    store.policies.put(TENANT, [PolicyEntry(store.resolve(TENANT, "judge"))])
    read, loop, readers = Database.read, threading.get_ident(), []

    def seen(self: Database) -> AbstractContextManager[Any]:
        readers.append(threading.get_ident())
        return read(self)

    monkeypatch.setattr(Database, "read", seen)
    asked = TENANT, "poet", [AdapterRef("chef@1")], OnCold("fallback", "poet")
    for _ in range(2):
        await directory.warm(*asked)
        directory.acquire(*asked).release()
        await directory.warm(TENANT, "nobody")
        with pytest.raises(ModelNotFound):
            directory.acquire(TENANT, "nobody")
    num = len(readers)
    assert 0 < num <= 6
    assert loop not in readers
    await upload(directory, "nobody")
    await directory.warm(TENANT, "nobody")
    directory.acquire(TENANT, "nobody").release()
    assert loop not in readers
    assert len(readers) > num, "what was not there is looked for again when something was written"
