"""What serves a request whose adapters are not on the device: decided once, at its admission."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path

import pytest
from tests.oracle import adapters, tiny
from tests.support.engines import Driver, greedy_request, new_engine, put_blob

from polyadapt.adapters.pool import _HOPELESS_AFTER
from polyadapt.engine import left_cold
from polyadapt.engine.output import Call
from polyadapt.errors import AdapterRejected, AdapterUnavailable, InvalidRequest, Problem
from polyadapt.types import AdapterId, AppliedAdapter, Failed, Finished, Request, Started, WhenCold

PAGE = 16
BASE = WhenCold(0, instead=())
FAIL = WhenCold(0)
UNAVAILABLE = "adapter_unavailable"


@pytest.fixture(scope="module")
def model_dir(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def blob_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def identities(
    model_dir: Path, blob_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[AdapterId]:
    root = tmp_path_factory.mktemp("adapters")
    return [
        put_blob(blob_root, adapters.make_lora(model_dir, root / f"a{i}", 4, seed=i), f"a{i}")
        for i in range(4)
    ]


class Held:
    """A driver whose engine's reads wait for `gate`, or for the gate of their own digest."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.gate = threading.Event()
        self.gates: dict[str, threading.Event] = {}
        self.broken: dict[str, Exception] = {}
        self.reads: list[str] = []
        read = driver.engine.pool._read

        def held(digest: str):
            self.reads.append(digest)
            if digest in self.broken:
                raise self.broken[digest]
            assert self.gates.get(digest, self.gate).wait(10)
            return read(digest)

        driver.engine.pool._read = held

    def resident(self, *identities: AdapterId) -> None:
        for identity in identities:
            self.own_gate(identity).set()
        self.driver.load(*identities)

    def own_gate(self, identity: AdapterId) -> threading.Event:
        return self.gates.setdefault(identity.digest, threading.Event())

    def until(self, condition: Callable[[], bool], max_steps: int = 2000) -> None:
        """Step until it holds."""
        for _ in range(max_steps):
            if condition():
                return
            self.driver.step()
            if not self.driver.rows_per_step[-1]:
                time.sleep(0.002)
        raise AssertionError(f"not within {max_steps} steps")

    def arrive(self, identity: AdapterId) -> None:
        """Let the adapter's load end in a few steps, however slow the threads are that read."""
        self.gate.set()
        for _ in range(5):
            if not self.is_on_device(identity):
                wait(self.driver.engine.pool._jobs, timeout=10)
                self.driver.step()
        assert self.is_on_device(identity)

    def end(self, request_id: str):
        """Step until the request has ended; return its last event."""
        events = self.driver.transcripts[request_id].events
        self.until(lambda: bool(events) and isinstance(events[-1], Finished | Failed))
        return events[-1]

    def settle(self) -> None:
        """Let every load end."""
        self.gate.set()
        self.until(lambda: not self.driver.engine.has_work)
        self.driver.engine.check_integrity()

    def served(self, request_id: str) -> list[str] | None:
        """The names that its reply gives; None before it was admitted."""
        events = self.driver.transcripts[request_id].events
        started = [event for event in events if isinstance(event, Started)]
        return [served.adapter.name for served in started[0].served] if started else None

    def is_on_device(self, identity: AdapterId) -> bool:
        known = self.driver.residencies.get(identity.digest)
        return known is not None and known.tier == "device"

    def count(self, name: str) -> int:
        return self.driver.engine.counters[name]


@pytest.fixture
def hold(model_dir, blob_root):
    """A function that makes a held driver over a new engine."""
    made: list[Held] = []

    def make(**settings) -> Held:
        made.append(Held(Driver(new_engine(model_dir, blob_root, **settings))))
        return made[-1]

    yield make
    for held in made:
        held.gate.set()
        held.driver.engine.pool.close()


def ids(number: int, length: int = 12) -> list[int]:
    return tiny.prompt_ids(length, seed=number)


def ask(name: str, adapter: AdapterId, when_cold: WhenCold, **options) -> Request:
    request = greedy_request(name, options.pop("prompt", ids(0)), adapter, 4)
    return replace(request, when_cold=when_cold, **options)


def fallback(adapter: AdapterId, wait_ms: float = 0) -> WhenCold:
    return WhenCold(wait_ms, instead=(AppliedAdapter(adapter),))


def alone(hold, adapter: AdapterId | None) -> list[int]:
    """The answer of an adapter, or the base, to the first prompt."""
    held = hold()
    held.gate.set()
    return held.driver.run(greedy_request("alone", ids(0), adapter, 4))["alone"].tokens


def test_the_base_answers_at_once_and_the_adapter_comes_in_the_background(hold, identities):
    held = hold()
    held.driver.submit(ask("cold", identities[0], BASE))
    assert held.end("cold") == Finished("cold")
    assert held.served("cold") == []
    assert held.driver.transcripts["cold"].tokens == alone(hold, None)
    assert not held.is_on_device(identities[0])
    assert held.count("cold_turned_to_base") == 1
    held.settle()
    assert held.is_on_device(identities[0])
    held.driver.run(ask("warm", identities[0], BASE))
    assert held.served("warm") == ["a0"]
    assert held.driver.transcripts["warm"].tokens == alone(hold, identities[0])
    assert held.count("cold_turned_to_base") == 1


def test_one_cold_adapter_of_several_turns_the_request(hold, identities):
    held = hold()
    held.resident(identities[0])
    pair = tuple(AppliedAdapter(identity) for identity in identities[:2])
    held.driver.submit(replace(ask("r", identities[0], BASE), adapters=pair))
    held.end("r")
    assert held.served("r") == []
    held.settle()
    held.driver.run(replace(ask("again", identities[0], BASE), adapters=pair))
    assert held.served("again") == ["a0", "a1"]


def test_what_is_mandatory_is_waited_for_when_the_rest_is_given_up(hold, identities):
    """The edge names it among what a request turns to."""
    held = hold()
    guard = AppliedAdapter(identities[1], is_mandatory=True)
    gate = held.gates[identities[1].digest] = threading.Event()
    request = ask("r", identities[0], WhenCold(0, instead=(guard,)))
    # One thread reads, in this order.
    held.driver.submit(replace(request, adapters=(guard, *request.adapters)))
    for _ in range(20):
        held.driver.step()
    assert held.served("r") is None, "it is not answered without the mandatory one"
    gate.set()
    held.end("r")
    (started,) = [e for e in held.driver.transcripts["r"].events if isinstance(e, Started)]
    assert [(of.adapter.name, of.is_mandatory) for of in started.served] == [("a1", True)]
    assert held.driver.transcripts["r"].tokens == alone(hold, identities[1])


@pytest.mark.parametrize("max_num_seqs", [1, 8])
def test_every_sample_of_a_request_is_answered_by_the_same(hold, identities, max_num_seqs):
    """Also those that are admitted after the adapter has come."""
    held = hold(max_num_seqs=max_num_seqs)
    held.driver.submit(ask("r", identities[0], BASE, n=3))
    held.until(lambda: held.served("r") is not None)
    held.gate.set()
    held.driver.load(identities[0])
    held.end("r")
    expected = alone(hold, None)
    answers = held.driver.transcripts["r"].token_ids
    assert [answers[i] for i in range(3)] == [expected] * 3
    assert len([e for e in held.driver.transcripts["r"].events if isinstance(e, Started)]) == 1


def test_a_resident_fallback_answers_at_once(hold, identities):
    held = hold()
    held.resident(identities[1])
    held.driver.submit(ask("r", identities[0], fallback(identities[1])))
    held.end("r")
    assert held.served("r") == ["a1"]
    assert held.driver.transcripts["r"].tokens == alone(hold, identities[1])
    assert held.count("cold_turned_to_fallback") == 1
    held.settle()
    assert held.is_on_device(identities[0])


@pytest.mark.parametrize("first", [0, 1])
def test_a_cold_fallback_is_waited_for_unless_the_adapter_comes_first(hold, identities, first):
    held = hold()
    own = [held.own_gate(identity) for identity in identities[:2]]
    # Reads come one after the other: begin with the one that is to end first.
    held.driver.call(Call(1, "prepare", identities[first].digest))
    held.driver.submit(ask("r", identities[0], fallback(identities[1])))
    for _ in range(5):
        held.driver.step()
    assert held.served("r") is None
    own[first].set()
    held.end("r")
    assert held.served("r") == [f"a{first}"]
    assert not held.is_on_device(identities[1 - first])
    own[1 - first].set()
    held.settle()


def test_whoever_fails_is_told_at_once_and_finds_the_adapter_later(hold, identities):
    held = hold()
    held.driver.submit(ask("r", identities[0], FAIL))
    held.driver.step()
    last = held.driver.transcripts["r"].last
    assert isinstance(last, Failed)
    assert last.code == "adapter_cold"
    assert "'a0'" in last.message
    assert held.count("cold_failures") == 1
    assert held.driver.engine.has_work, "the load goes on"
    held.settle()
    assert held.is_on_device(identities[0])
    held.driver.run(ask("again", identities[0], FAIL))
    assert held.served("again") == ["a0"]


def test_a_resident_adapter_is_waited_for_in_a_full_batch_and_a_cold_one_is_not(hold, identities):
    held = hold(max_num_seqs=1)
    held.resident(identities[0])
    held.driver.submit(greedy_request("long", ids(1), None, 30))
    held.driver.step()
    held.driver.submit(ask("warm", identities[0], FAIL), ask("cold", identities[1], FAIL))
    held.driver.step()
    assert isinstance(held.driver.transcripts["cold"].last, Failed)
    assert held.driver.transcripts["warm"].events == []
    assert held.end("warm") == Finished("warm")
    held.settle()


def test_the_base_is_chosen_when_the_turn_comes_and_not_before(hold, identities):
    held = hold(max_num_seqs=1)
    held.driver.submit(greedy_request("long", ids(1), None, 30))
    held.driver.step()
    held.driver.submit(ask("r", identities[0], BASE))
    for _ in range(3):
        held.driver.step()
    held.arrive(identities[0])
    held.end("r")
    assert held.served("r") == ["a0"]


def test_no_pages_means_no_decision(hold, identities):
    """Whoever finds no room for its first rows may find its adapter by the time there is some."""
    page_bytes = 3 * 2 * 2 * 16 * 4 * PAGE
    held = hold(kv_cache_bytes=5 * page_bytes, max_model_len=64)
    held.driver.submit(greedy_request("long", ids(1, 40), None, 20))
    held.driver.step()
    held.driver.submit(ask("r", identities[0], BASE, prompt=ids(0, 40)))
    for _ in range(3):
        held.driver.step()
    assert held.served("r") is None
    held.arrive(identities[0])
    held.end("r")
    assert held.served("r") == ["a0"]
    assert held.count("cold_turned_to_base") == 0


@pytest.mark.parametrize(
    ("when_cold", "outcome"),
    [(WhenCold(60), "adapter_cold"), (WhenCold(60, instead=()), "base")],
)
def test_a_timeout_is_waited_for_first(hold, identities, when_cold, outcome):
    held = hold()
    began = time.monotonic()
    held.driver.submit(ask("r", identities[0], when_cold))
    last = held.end("r")
    assert time.monotonic() - began >= 0.06
    if outcome == "base":
        assert held.served("r") == []
    else:
        assert (last.code, held.served("r")) == (outcome, None)
        assert "60" in last.message


@pytest.mark.parametrize("instead", [None, ()])
def test_an_adapter_that_comes_in_time_serves(hold, identities, instead):
    held = hold()
    held.driver.submit(ask("r", identities[0], WhenCold(5000, instead)))
    held.driver.step()
    held.gate.set()
    assert held.end("r") == Finished("r")
    assert held.served("r") == ["a0"]


def test_waiting_without_a_timeout_waits(hold, identities):
    held = hold()
    held.driver.submit(ask("r", identities[0], WhenCold()))
    for _ in range(20):
        held.driver.step()
    assert held.driver.transcripts["r"].events == []
    held.gate.set()
    assert held.end("r") == Finished("r")


@pytest.mark.parametrize("when_cold", [BASE, FAIL, WhenCold(50), WhenCold(5000, instead=())])
def test_a_cancelled_request_leaves_nothing(hold, identities, when_cold):
    held = hold()
    held.driver.submit(ask("r", identities[0], when_cold, n=2))
    held.driver.cancel("r")
    held.settle()
    assert held.driver.transcripts["r"].last == Finished("r", is_cancelled=True)
    assert not held.driver.engine._impatient
    if when_cold is BASE:
        held.driver.submit(ask("midway", identities[1], BASE))
        held.driver.step()
        held.driver.cancel("midway")
        held.settle()
    held.driver.engine.check_integrity()


def test_a_request_of_the_base_finds_and_leaves_the_bases_pages(hold, identities):
    prompt = ids(2, 3 * PAGE + 2)
    held = hold()
    held.driver.submit(ask("cold", identities[0], BASE, prompt=prompt))
    held.end("cold")
    held.driver.submit(greedy_request("base", prompt, None, 2))
    held.end("base")
    (started,) = [e for e in held.driver.transcripts["base"].events if isinstance(e, Started)]
    assert started.num_cached_tokens == 3 * PAGE
    held.settle()
    held.driver.run(ask("warm", identities[0], BASE, prompt=prompt))
    (started,) = [e for e in held.driver.transcripts["warm"].events if isinstance(e, Started)]
    assert (held.served("warm"), started.num_cached_tokens) == (["a0"], 0)


def test_a_preempted_request_goes_on_with_what_it_began_with(hold, identities):
    held = hold()
    held.driver.submit(ask("r", identities[0], BASE))
    held.until(lambda: len(held.driver.transcripts["r"].token_ids.get(0, ())) >= 2)
    (sequence,) = held.driver.engine.scheduler.running
    held.driver.engine.scheduler._preempt(sequence)
    held.gate.set()
    held.driver.load(identities[0])
    held.end("r")
    assert held.driver.transcripts["r"].tokens == alone(hold, None)


@pytest.mark.parametrize("when_cold", [FAIL, BASE])
def test_whoever_has_begun_waits_for_its_adapter_whatever_it_said(hold, identities, when_cold):
    held = hold()
    held.resident(identities[0])
    held.driver.submit(ask("r", identities[0], when_cold))
    held.until(lambda: len(held.driver.transcripts["r"].token_ids.get(0, ())) >= 2)
    held.own_gate(identities[0]).clear()
    (sequence,) = held.driver.engine.scheduler.running
    held.driver.engine.scheduler._preempt(sequence)
    held.driver.call(Call(1, "unload", identities[0].digest))
    for _ in range(10):
        held.driver.step()
    assert sequence in held.driver.engine.scheduler.waiting
    held.own_gate(identities[0]).set()
    assert held.end("r") == Finished("r")
    assert held.driver.transcripts["r"].tokens == alone(hold, identities[0])


def test_what_cannot_be_read_now_turns_and_what_cannot_be_served_fails(hold, identities):
    held = hold()
    held.broken[identities[0].digest] = AdapterUnavailable("the disk is away")
    held.broken[identities[1].digest] = InvalidRequest("too large")
    late = WhenCold(5000, instead=())
    held.driver.submit(ask("away", identities[0], late), ask("large", identities[1], late))
    assert held.end("away") == Finished("away")
    assert held.served("away") == []
    assert held.end("large").code == "invalid_request"
    held.resident(identities[2])
    held.driver.submit(ask("other", identities[0], fallback(identities[2], 5000)))
    assert held.end("other") == Finished("other")
    assert held.served("other") == ["a2"]
    both = ask("both", identities[0], fallback(identities[1], 5000))
    held.driver.submit(both)
    assert held.end("both").code == "invalid_request"
    held.settle()


@pytest.mark.parametrize("when_cold", [BASE, WhenCold(20, instead=())])
def test_an_adapter_larger_than_the_device_is_an_error_once_that_is_known(
    hold, identities, when_cold
):
    held = hold(max_adapter_bytes=16 << 10)
    held.gate.set()
    held.driver.submit(ask("first", identities[0], when_cold))
    held.end("first")  # by the base, unless it was read before
    held.settle()
    for name in ("second", "third"):
        held.driver.submit(ask(name, identities[0], when_cold))
        last = held.end(name)
        assert last.code == "invalid_request"
        assert f"--max-adapter-bytes is {16 << 10}" in last.message
        assert held.served(name) is None
        held.settle()
    assert not held.driver.engine._left_cold


def test_an_adapter_that_cannot_be_served_is_no_reason_to_answer_by_others(hold, identities):
    held = hold()
    held.gate.set()
    held.resident(identities[1])
    held.broken[identities[0].digest] = AdapterRejected([Problem("non_finite", "it holds NaN")])
    held.broken[identities[2].digest] = ZeroDivisionError()
    for identity, code in ((identities[0], "adapter_rejected"), (identities[2], UNAVAILABLE)):
        held.driver.run(ask(f"first {identity.name}", identity, BASE))
        for name, when_cold in (("base", BASE), ("fallback", fallback(identities[1]))):
            held.driver.submit(ask(f"{name} {identity.name}", identity, when_cold))
            assert held.end(f"{name} {identity.name}").code == code
            held.settle()


def test_what_fails_time_and_again_is_told_and_serves_once_it_can_be_read(hold, identities):
    held = hold()
    held.broken[identities[0].digest] = AdapterUnavailable("the disk is away")
    ends = []
    for number in range(_HOPELESS_AFTER + 2):
        held.driver.submit(ask(str(number), identities[0], BASE))
        last = held.end(str(number))
        ends.append(last.code if isinstance(last, Failed) else "base")
        held.settle()
    num_turned = ends.count("base")
    assert num_turned > 2
    assert ends == ["base"] * num_turned + [UNAVAILABLE] * (len(ends) - num_turned)
    assert ends[-2:] == [UNAVAILABLE] * 2
    del held.broken[identities[0].digest]
    held.driver.run(ask("well", identities[0], BASE))
    assert held.served("well") == ["a0"]
    held.driver.call(Call(1, "unload", identities[0].digest))
    held.driver.run(ask("cold", identities[0], BASE))
    assert held.served("cold") == [], "nothing is held against it"


def test_adapters_that_never_fit_together_are_an_error_whatever_is_asked_for_instead(
    hold, identities
):
    held = hold()
    held.resident(identities[0])
    num_bytes = held.driver.engine.pool.nbytes_used
    held = hold(max_adapter_bytes=num_bytes * 3 // 2)
    held.gate.set()
    pair = tuple(AppliedAdapter(identity) for identity in identities[:2])
    codes = []
    for number in range(3):
        held.driver.submit(replace(ask(str(number), identities[0], BASE), adapters=pair))
        last = held.end(str(number))
        codes.append(last.code if isinstance(last, Failed) else "base")
        held.settle()
    assert codes[-1] == "invalid_request", codes


def test_a_load_that_fails_in_the_background_ends(hold, identities):
    held = hold()
    held.broken[identities[0].digest] = AdapterUnavailable("the disk is away")
    held.driver.submit(ask("r", identities[0], FAIL))
    assert held.end("r").code in ("adapter_cold", "adapter_unavailable")
    held.settle()
    assert not held.driver.engine._left_cold


def test_deleting_ends_requests_that_hold_the_adapter_whatever_serves_them(hold, identities):
    held = hold()
    held.resident(identities[1])
    requests = [
        ask("base", identities[0], BASE),
        ask("fallback", identities[2], fallback(identities[0])),
        ask("free", identities[1], BASE),
    ]
    held.driver.submit(*(replace(r, sampling=replace(r.sampling, max_tokens=40)) for r in requests))
    held.driver.step()
    held.driver.call(Call(9, "cancel_adapter", identities[0].digest))
    held.driver.step()
    assert held.driver.replies[-1].count == 2
    held.gate.set()
    assert [held.end(name).code for name in ("base", "fallback")] == ["adapter_deleted"] * 2
    assert held.end("free") == Finished("free")


def test_a_flood_of_cold_requests_keeps_only_the_latest_loads(hold, identities, monkeypatch):
    monkeypatch.setattr(left_cold, "MOST", 2)
    held = hold()
    for number, identity in enumerate(identities):
        held.driver.submit(ask(f"r{number}", identity, FAIL))
        held.driver.step()
    assert held.driver.engine._left_cold.digests == tuple(i.digest for i in identities[-2:])
    held.settle()
    monkeypatch.setattr(left_cold, "KEPT_S", 0.0)
    held.driver.call(Call(1, "unload", identities[0].digest))
    held.driver.run(ask("late", identities[0], FAIL))
    time.sleep(0.01)
    held.driver.run()
    assert not held.driver.engine._left_cold


def test_who_does_not_wait_is_told_at_the_next_try_why_the_adapter_did_not_come(hold, identities):
    held = hold()
    held.broken[identities[0].digest] = AdapterUnavailable("the disk is away")
    held.driver.submit(ask("first", identities[0], FAIL))
    assert held.end("first").code == "adapter_cold"
    held.settle()
    held.driver.submit(ask("second", identities[0], FAIL))
    last = held.end("second")
    assert (last.code, last.message) == ("adapter_unavailable", "the disk is away")
    held.settle()
