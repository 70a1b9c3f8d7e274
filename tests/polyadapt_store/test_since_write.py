"""What was read once is answered from memory until somebody writes, and never after that."""

from __future__ import annotations

import pytest

from polyadapt.errors import ModelNotFound, Unavailable
from polyadapt_store import since_write
from polyadapt_store.since_write import SinceWrite


class Registry:
    """Counts writes and readings; `error` is what a reading raises."""

    def __init__(self) -> None:
        self.num_writes = 7
        self.num_readings = 0
        self.error: Exception | None = None

    def read(self) -> int:
        self.num_readings += 1
        if self.error is not None:
            raise self.error
        return self.num_readings


@pytest.fixture(autouse=True)
def registry() -> Registry:
    return Registry()


@pytest.fixture
def known(registry: Registry) -> SinceWrite[str, int]:
    return SinceWrite(lambda: registry.num_writes, keeps=ModelNotFound)


def test_an_answer_holds_until_somebody_writes(
    known: SinceWrite[str, int], registry: Registry
) -> None:
    assert "a" not in known
    assert [known.get("a", registry.read) for _ in range(3)] == [1, 1, 1]
    assert "a" in known
    assert "b" not in known
    registry.num_writes += 1
    assert "a" not in known
    assert known.get("a", registry.read) == 2


def test_what_is_written_during_a_reading_is_read_again(
    known: SinceWrite[str, int], registry: Registry
) -> None:
    def read() -> int:
        registry.num_writes += 1
        return registry.read()

    assert known.get("a", read) == 1
    assert known.get("a", registry.read) == 2


def test_only_errors_that_are_answers_are_kept(
    known: SinceWrite[str, int], registry: Registry
) -> None:
    registry.error = ModelNotFound("none")
    for _ in range(2):
        with pytest.raises(ModelNotFound):
            known.get("a", registry.read)
    assert registry.num_readings == 1
    registry.error = Unavailable("gone")
    for _ in range(2):
        with pytest.raises(Unavailable):
            known.get("b", registry.read)
    assert registry.num_readings == 3


def test_no_more_than_a_bound_is_kept(
    known: SinceWrite[str, int], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(since_write, "_MAX_KNOWN", 3)
    for name in "abc":
        known.get(name, registry.read)
    known.get("a", registry.read)
    assert registry.num_readings == 3, "what is there takes no room"
    known.get("d", registry.read)
    assert ["d" in known, "a" in known] == [True, False]
