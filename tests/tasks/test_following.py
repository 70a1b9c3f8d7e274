"""A server follows what is written, tells where it is, and outlives a registry that is away."""

from __future__ import annotations

import asyncio

import pytest

from polyadapt.errors import Unavailable
from polyadapt.tasks.following import Follower

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class FakeStore:
    def __init__(self) -> None:
        self.id = "replica-1"
        self.replicas = self
        self.written = 0
        self.error: Unavailable | None = None
        self.beats: list[dict[str, str]] = []
        self.num_sweeps = 0
        self.has_left = False

    def refresh(self) -> int:
        if self.error is not None:
            raise self.error
        return self.written

    def sweep(self) -> list[str]:
        self.num_sweeps += 1
        return []

    def beat(self, tiers: dict[str, str]) -> None:
        self.beats.append(tiers)

    def leave(self) -> None:
        self.has_left = True


async def test_it_follows_once_for_each_state_of_the_registry() -> None:
    store, followed = FakeStore(), []

    async def follow() -> None:
        followed.append(store.written)

    follower = Follower(store, (follow,), dict)
    await follower.poll()
    await follower.poll()
    assert followed == [0]
    store.written = 3
    await follower.poll()
    await follower.poll()
    assert followed == [0, 3]
    await follower.leave()
    assert store.has_left


async def test_what_could_not_be_followed_is_followed_later() -> None:
    store, followed = FakeStore(), []

    async def follow() -> None:
        if not followed:
            followed.append("failed")
            raise Unavailable("away")
        followed.append("done")

    follower = Follower(store, (follow,), dict)
    with pytest.raises(Unavailable):
        await follower.poll()
    await follower.poll()
    assert followed == ["failed", "done"]


async def test_it_beats_with_what_is_where() -> None:
    store = FakeStore()
    follower = Follower(store, (), lambda: {"d": "device"})
    for _ in range(4):
        await follower.poll()
    await follower.leave()
    assert store.beats == [{"d": "device"}] * 2
    assert store.num_sweeps == 1


async def test_a_fault_is_logged_and_followed_again(caplog: pytest.LogCaptureFixture) -> None:
    store, followed = FakeStore(), asyncio.Event()

    async def follow() -> None:
        if not caplog.records:
            raise ZeroDivisionError
        followed.set()

    task = asyncio.create_task(Follower(store, (follow,), dict, poll_s=0.001).run())
    await asyncio.wait_for(followed.wait(), 10)
    assert "ZeroDivisionError" in caplog.text
    task.cancel()


async def test_a_registry_that_comes_back_is_followed() -> None:
    store, followed = FakeStore(), asyncio.Event()

    async def follow() -> None:
        followed.set()

    store.error = Unavailable("away")
    task = asyncio.create_task(Follower(store, (follow,), dict, poll_s=0.001).run())
    await asyncio.sleep(0.02)
    assert not followed.is_set()
    assert not task.done()
    store.error = None
    await asyncio.wait_for(followed.wait(), 10)
    task.cancel()
