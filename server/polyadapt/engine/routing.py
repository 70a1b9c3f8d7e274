"""Which of several engines serves a request: pure arithmetic over what is known of them.

Torch-free, without a clock, without chance and without I/O, so that the server's fleet, the Ray
router and the simulation share it. Knows engines by name and load alone: where adapters are is told
at every choice.

A request goes to the first ready engine of these groups, the least loaded of its group, where `load
bound` is as in Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads" (2018):
  1. its adapters are on the device, and the load is below the bound;
  2. they are on their way there, or in host memory, and the load is below the bound;
  3. of the home set: the k engines with the highest rendezvous score (Thaler and Ravishankar,
     "Using name-based mappings to increase hit rates", 1998), below the bound; k grows with the
     load that the request's adapters have on the whole fleet;
  4. has room for them without evicting, and the load is below the bound;
  5. any.
Inside groups 1 and 2 the home set comes first, so that copies which a burst has made elsewhere fall
out of use when it is over.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

_MOST_REMEMBERED = 200_000  # keys whose rendezvous order is kept; the oldest leave first


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """When an engine counts as loaded.

    The bound is `factor` times the mean load of the ready engines, and never less than
    `least_bound` tokens: below that engines are as good as idle, and nothing is spread.
    """

    factor: float = 1.25
    least_bound: int = 512

    def __post_init__(self) -> None:
        """Refuse a bound below which somebody has to be: raises ValueError."""
        if self.factor < 1.0 or self.least_bound < 1:
            raise ValueError(
                f"factor is {self.factor} and least_bound {self.least_bound}; expected at least 1"
            )


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request asks of whoever serves it.

    key: requests with an equal one are best served by the same engine; num_tokens: its work.
    """

    key: str
    num_tokens: int = 1


class Router:
    """Owns the load of every engine, in tokens that are still to be computed, and by key."""

    def __init__(self, policy: RoutingPolicy | None = None) -> None:
        self.policy = policy or RoutingPolicy()
        self._seeds: dict[str, int] = {}  # engine -> the hash of its name
        self._ready: dict[str, int] = {}  # engine that takes requests -> its load
        self._unready: dict[str, int] = {}
        self._total = 0  # of the ready engines
        self._by_key: Counter[str] = Counter()
        self._names: list[str] = []  # of all engines, and in `_hashes` their seeds, when asked for
        self._hashes: np.ndarray | None = None
        self._orders: dict[str, tuple[str, ...]] = {}  # key -> the first engines of its order

    # ------------------------------------------------------------------ members
    def add(self, engine: str, *, is_ready: bool = True) -> None:
        """Have one more engine, without load; raises ValueError for a name that there is."""
        if engine in self._seeds:
            raise ValueError(f"the engine {engine!r} is there already")
        self._seeds[engine] = _hash(engine)
        (self._ready if is_ready else self._unready)[engine] = 0
        self._orders.clear()
        self._hashes = None

    def remove(self, engine: str) -> None:
        """Have it no more; its load is forgotten with it. Raises KeyError."""
        del self._seeds[engine]
        self._total -= self._ready.pop(engine, 0)
        self._unready.pop(engine, None)
        self._orders.clear()
        self._hashes = None

    def set_ready(self, engine: str, is_ready: bool) -> None:
        """Say whether it takes requests. Its place in every order stays its own meanwhile."""
        if is_ready == (engine in self._ready):
            return
        source, target = self._unready, self._ready
        if not is_ready:
            source, target = target, source
        load = source.pop(engine)
        target[engine] = load
        self._total += load if is_ready else -load

    # ------------------------------------------------------------------ load
    def load(self, engine: str) -> int:
        """Tokens that the engine has still to compute."""
        return self._ready[engine] if engine in self._ready else self._unready[engine]

    def change_load(self, engine: str, key: str, num_tokens: int) -> None:
        """Add tokens to an engine and a key, or take them away again.

        An engine that was removed takes its own share along; the key's is still to be given back.
        """
        if engine in self._ready:
            self._ready[engine] += num_tokens
            self._total += num_tokens
        elif engine in self._unready:
            self._unready[engine] += num_tokens
        left = self._by_key[key] + num_tokens
        assert left >= 0, f"more of {key!r} was given back than was taken"
        if left:
            self._by_key[key] = left
        else:
            del self._by_key[key]

    def set_load(self, engine: str, num_tokens: int) -> None:
        """Replace what is known of an engine's load by what it says itself."""
        loads = self._ready if engine in self._ready else self._unready
        if loads is self._ready:
            self._total += num_tokens - loads[engine]
        loads[engine] = num_tokens

    def bound(self, num_tokens: int = 0) -> float:
        """The load from which on an engine takes no more by preference, with so much to come."""
        mean = (self._total + num_tokens) / max(len(self._ready), 1)
        return max(self.policy.factor * mean, float(self.policy.least_bound))

    # ------------------------------------------------------------------ the choice
    def num_homes(self, demand: Demand) -> int:
        """k: as many engines as hold the key's load without one of them being above the bound."""
        bound = self.bound(demand.num_tokens)
        return min(1 + int(self._by_key[demand.key] / bound), max(len(self._ready), 1))

    def homes(self, key: str, count: int) -> tuple[str, ...]:
        """The first `count` ready engines in the key's rendezvous order."""
        found = tuple(e for e in self._order(key, count) if e in self._ready)
        if len(found) < count and len(found) < len(self._ready):
            found = tuple(e for e in self._order(key, len(self._seeds)) if e in self._ready)
        return found[:count]

    def rank(
        self,
        demand: Demand,
        *,
        resident: Collection[str],
        near: Collection[str] = (),
        has_room: Callable[[str], bool] = lambda engine: False,
    ) -> Iterator[str]:
        """Yield every ready engine once, the best first.

        resident: the engines with all of the request's adapters on the device; near: those with
        all of them at least on their way; has_room: whether they fit there without evicting. A
        request for the base alone gives all engines as resident. Later ones are for a failover: the
        loads are those of the first choice.
        """
        bound = self.bound(demand.num_tokens)
        homes = self.homes(demand.key, self.num_homes(demand))
        ready, seen = self._ready, set[str]()

        def least(engines: Iterable[str], *, is_bounded: bool = True) -> Iterator[str]:
            """Those that were not yielded yet, in order; the first one without sorting."""
            while True:
                best = min(
                    (e for e in engines
                     if e not in seen and e in ready and (not is_bounded or ready[e] < bound)),
                    key=lambda engine: (ready[engine], engine),
                    default=None,
                )  # fmt: skip
                if best is None:
                    return
                seen.add(best)
                yield best

        for holders in (resident, near):
            yield from least([engine for engine in homes if engine in holders])
            yield from least(holders)
        yield from least(homes)
        yield from least([e for e in ready if e not in seen and ready[e] < bound and has_room(e)])
        yield from least(ready, is_bounded=False)

    def check_integrity(self) -> None:
        """Raise AssertionError unless the sums are those of the parts."""
        assert self._total == sum(self._ready.values())
        assert self._ready.keys() | self._unready.keys() == self._seeds.keys()
        assert not self._ready.keys() & self._unready.keys()
        assert all(load > 0 for load in self._by_key.values())

    def _order(self, key: str, count: int) -> tuple[str, ...]:
        """At least the first `count` of all engines in the key's order, or all there are."""
        order = self._orders.get(key)
        if order is not None and len(order) >= min(count, len(self._seeds)):
            return order
        if self._hashes is None:
            self._names = sorted(self._seeds)
            self._hashes = np.array([self._seeds[name] for name in self._names], np.uint64)
        scores = _mix(self._hashes ^ np.uint64(_hash(key)))
        best = np.argsort(scores, kind="stable")[::-1]
        # The next power of two, so that a growing k seldom asks again.
        order = tuple(self._names[i] for i in best[: max(8, 1 << count.bit_length())])
        self._orders.pop(key, None)
        self._orders[key] = order
        if len(self._orders) > _MOST_REMEMBERED:
            del self._orders[next(iter(self._orders))]
        return order


def key_of(digests: Iterable[str]) -> str:
    """The key of requests for these adapters together, in whatever order."""
    return "+".join(sorted(digests))


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
    generators", 2014): every bit of the input turns about half of the output's. uint64 in and out.
    """
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
