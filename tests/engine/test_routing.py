"""The choice among engines: its groups in order, and what no choice may ever do."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyadapt.engine.routing import Demand, Router, RoutingPolicy, key_of

ENGINES = tuple(f"e{i}" for i in range(6))
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


def make(*engines: str, factor: float = 1.25, least_bound: int = 10) -> Router:
    router = Router(RoutingPolicy(factor, least_bound))
    for engine in engines or ENGINES:
        router.add(engine)
    return router


def first(router: Router, demand: Demand, **known) -> str:
    return next(router.rank(demand, **({"resident": ()} | known)))


def naive_rank(loads, ready, homes, bound, resident, near, roomy) -> list[str]:
    """The groups of the docstring written out: an independent form without early ends."""
    key = lambda e: (loads[e], e)  # noqa: E731
    below = [e for e in ready if loads[e] < bound]
    groups = [
        [e for e in below if e in resident and e in homes],
        [e for e in below if e in resident],
        [e for e in below if e in near and e in homes],
        [e for e in below if e in near],
        [e for e in below if e in homes],
        [e for e in below if e in roomy],
        list(ready),
    ]
    return list(dict.fromkeys(e for group in groups for e in sorted(group, key=key)))


# ------------------------------------------------------------------ the groups
def test_a_resident_engine_below_the_bound_is_first():
    router = make()
    away = router.homes("a", 6)[5]
    router.change_load(away, "a", 9)
    assert first(router, Demand("a"), resident={away}) == away


def test_a_resident_engine_at_the_bound_gives_way_to_the_home_set():
    router = make()
    home, _, _, _, _, away = router.homes("a", 6)
    router.change_load(away, "other", 10)
    assert first(router, Demand("a"), resident={away}) == home


def test_one_on_its_way_comes_before_the_home_set_and_behind_what_is_there():
    router = make()
    home, near, there = router.homes("a", 6)[:3]
    assert first(router, Demand("a"), near={near}) == near != home
    assert first(router, Demand("a"), near={near}, resident={there}) == there


def test_without_residents_the_home_is_chosen_until_it_is_loaded_then_one_with_room():
    router = make()
    home, *others = router.homes("a", 6)
    assert first(router, Demand("a")) == home
    router.change_load(home, "other", 10)
    for engine in others[:-1]:
        router.change_load(engine, "other", 1)
    assert first(router, Demand("a"), has_room=lambda e: e == others[0]) == others[0]
    assert first(router, Demand("a")) == others[-1], "nobody has room: the least loaded"


def test_a_hot_adapter_goes_to_its_next_home_and_falls_back_to_the_loaded_one():
    router = make("x", "y")
    router.change_load("x", "a", 1000)
    router.change_load("y", "a", 100)
    assert list(router.rank(Demand("a"), resident={"x"})) == ["y", "x"]


def test_a_request_for_the_base_stays_at_its_home_and_spreads_by_load():
    router = make()
    home = router.homes("session", 1)[0]
    demand = Demand("session")
    assert first(router, demand, resident=ENGINES) == home
    router.change_load(home, "session", 10)
    assert first(router, demand, resident=ENGINES) != home


@pytest.mark.parametrize(("load", "homes"), [(0, 1), (9, 1), (10, 2), (30, 4), (1000, 6)])
def test_the_home_set_grows_with_the_adapters_own_load(load, homes):
    router = make(factor=1.0)
    share = load // len(ENGINES)
    for engine in ENGINES:
        router.change_load(engine, "hot", share)
    if load % len(ENGINES):
        router.change_load(ENGINES[0], "hot", load % len(ENGINES))
    assert router.num_homes(Demand("hot", 0)) == homes
    assert router.num_homes(Demand("cold", 0)) == 1


def test_the_home_set_grows_by_its_next_members_only():
    router = make()
    whole = router.homes("a", 6)
    assert set(whole) == set(ENGINES)
    assert all(router.homes("a", k) == whole[:k] for k in range(7))


def test_engines_that_are_not_ready_are_never_yielded_and_keep_their_place():
    router = make()
    home, second = router.homes("a", 2)
    router.set_ready(home, False)
    assert first(router, Demand("a"), resident={home}) == second
    assert set(router.rank(Demand("a"), resident=())) == set(ENGINES) - {home}
    router.set_ready(home, True)
    assert first(router, Demand("a")) == home


def test_without_a_ready_engine_there_is_no_choice():
    assert list(Router().rank(Demand("a"), resident=())) == []
    router = make("x")
    router.set_ready("x", False)
    assert list(router.rank(Demand("a"), resident={"x"})) == []


def test_the_key_of_several_adapters_does_not_depend_on_their_order():
    assert key_of(["b", "a"]) == key_of(["a", "b"]) != key_of(["a"])


def test_what_cannot_be_is_refused():
    router = make("x")
    with pytest.raises(ValueError, match="there already"):
        router.add("x")
    with pytest.raises(ValueError, match="at least 1"):
        RoutingPolicy(factor=0.9)
    with pytest.raises(KeyError):
        router.remove("y")
    with pytest.raises(AssertionError, match="given back"):
        router.change_load("x", "a", -1)


def test_the_score_is_the_documented_hash():
    """Every ingress of every release has to agree on it."""

    def score(key: str, engine: str) -> int:
        def digest(text: str) -> int:
            return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16)

        z = digest(key) ^ digest(engine)
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    for key in ("a", "sha256:12", "ä"):
        expected = sorted(ENGINES, key=lambda engine: -score(key, engine))
        assert make().homes(key, 6) == tuple(expected)


# ------------------------------------------------------------------ properties
@settings(max_examples=60, deadline=None)
@given(st.sets(names, min_size=2, max_size=12), st.lists(names, min_size=1, max_size=30), st.data())
def test_a_removed_engine_moves_only_its_own_keys(engines, keys, data):
    router = make(*engines)
    before = {key: router.homes(key, 1)[0] for key in keys}
    gone = data.draw(st.sampled_from(sorted(engines)))
    if data.draw(st.booleans()):
        router.remove(gone)
    else:
        router.set_ready(gone, False)
    after = {key: router.homes(key, 1)[0] for key in keys}
    assert all((before[key] == gone) == (before[key] != after[key]) for key in keys)


@settings(max_examples=60, deadline=None)
@given(st.sets(names, min_size=1, max_size=12), st.lists(names, min_size=1, max_size=30), names)
def test_an_added_engine_takes_keys_and_moves_none_between_the_others(engines, keys, added):
    engines.discard(added)
    router = make(*engines) if engines else Router()
    before = {key: router.homes(key, 1) for key in keys}
    router.add(added)
    assert all(router.homes(key, 1) in (before[key], (added,)) for key in keys)
    anew = make(*engines, added)
    assert all(router.homes(key, 1) == anew.homes(key, 1) for key in keys)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_choice_is_the_one_of_the_naive_form_and_names_each_ready_engine_once(data):
    subsets = st.sets(st.sampled_from(ENGINES))
    router = make(least_bound=data.draw(st.integers(1, 50)))
    loads = {e: data.draw(st.integers(0, 100), label=e) for e in ENGINES}
    for engine, load in loads.items():
        router.change_load(engine, data.draw(st.sampled_from(["a", "b"])), load)
    down = data.draw(subsets)
    for engine in down:
        router.set_ready(engine, False)
    router.check_integrity()
    ready = [engine for engine in ENGINES if engine not in down]
    resident, near, roomy = data.draw(subsets), data.draw(subsets), data.draw(subsets)
    demand = Demand("a", data.draw(st.integers(1, 100)))
    bound = router.bound(demand.num_tokens)
    homes = router.homes("a", router.num_homes(demand))
    ranked = list(router.rank(demand, resident=resident, near=near, has_room=roomy.__contains__))
    assert ranked == naive_rank(loads, ready, homes, bound, resident, near, roomy)
    assert sorted(ranked) == sorted(ready)
    again = router.rank(demand, resident=resident, near=near, has_room=roomy.__contains__)
    assert ranked == list(again), "a choice changes nothing"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 40)), min_size=1, max_size=200))
def test_no_engine_is_ever_loaded_beyond_the_bound_and_one_request(requests):
    router = make(least_bound=1)
    holders: dict[str, set[str]] = {}
    for number, size in requests:
        demand = Demand(f"k{number}", size)
        bound = router.bound(size)
        chosen = first(router, demand, resident=holders.get(demand.key, ()))
        assert router.load(chosen) < bound
        router.change_load(chosen, demand.key, size)
        holders.setdefault(demand.key, set()).add(chosen)
    router.check_integrity()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ENGINES), st.sampled_from("ab"), st.integers(1, 9))))
def test_loads_are_what_was_taken_and_not_given_back(shares):
    router = make()
    for engine, key, size in shares:
        router.change_load(engine, key, size)
    router.check_integrity()
    assert {e: router.load(e) for e in ENGINES} == {
        e: sum(size for engine, _, size in shares if engine == e) for e in ENGINES
    }
    router.remove(ENGINES[0])
    for engine, key, size in shares:
        router.change_load(engine, key, -size)
    router.check_integrity()
    assert router.bound() == router.policy.least_bound
    assert not router._by_key


def test_homes_are_spread_evenly():
    router = make()
    counts = Counter(router.homes(f"adapter-{i}", 1)[0] for i in range(6000))
    assert set(counts) == set(ENGINES)
    assert max(abs(count - 1000) for count in counts.values()) < 5 * (1000 * 5 / 6) ** 0.5
