"""What the router does to a fleet that no machine here could hold: a discrete-event simulation.

    python -m bench.simulate [--out DIR] [--skip-measured]

The routing is the server's own (polyadapt.engine.routing), and so is the order of eviction
(polyadapt.adapters.eviction); engines are a few lines: rows that decode together, a queue, slots.
First it is held to a measured run: two real engines behind the real EngineFleet, a tiny model, Zipf
traffic, with what a step and a load take measured before. Then 100,000 adapters on 1,000 devices,
whose times are assumptions that simulation.json states. Results go to bench/results/simulation/,
plots to docs/figures/.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bench.plots import bar_chart

from polyadapt.adapters.eviction import EvictionOrder, Standing
from polyadapt.engine.routing import Demand, Router, RoutingPolicy

ROOT = Path(__file__).parents[1]
TOLERANCE = 0.20  # of the measured run's figures


@dataclass(frozen=True, slots=True)
class Service:
    """What things take on one engine, in seconds."""

    step_s: float  # a decode step of one row
    row_s: float  # more for every further row
    prompt_token_s: float
    load_s: float  # an adapter, from wherever it lies to the device


@dataclass(frozen=True, slots=True)
class Setup:
    """One simulated run."""

    num_adapters: int
    num_engines: int
    num_slots: int  # adapters that fit on an engine
    num_rows: int  # sequences of a step
    zipf: float  # popularity of the i-th adapter: i to the power of minus this
    rate: float  # requests a second, Poisson
    num_requests: int
    num_prompt: int
    num_output: int
    num_warm: int  # requests at the start that are not counted
    policy: str = "home"  # or "two" (the less loaded of two at random), "hash" (one home, no bound)
    least_bound: int = 512
    lose: float = 0.0  # part of the engines that are gone from the middle on
    seed: int = 0


@dataclass(slots=True)
class Outcome:
    """What was counted after the warm-up."""

    hit_rate: float  # of requests whose adapter was on the device when they were admitted
    cold_starts: int  # loads
    copies: float  # devices that hold an adapter, over the resident ones
    busiest_share: float  # requests of the busiest engine, over an even share
    latencies: tuple[float, float, float]  # mean, median, 99th percentile
    loads: list[float]  # requests of each engine over an even share, sorted
    cold_over_time: list[tuple[float, float]] = field(default_factory=list)  # second, part cold


class _Engine:
    """Rows, a queue and slots."""

    __slots__ = ("order", "queue", "rows", "slots", "uses")

    def __init__(self) -> None:
        self.rows = 0
        self.queue: deque[tuple[float, int, bool]] = deque()
        self.slots: dict[int, Standing] = {}
        self.uses: Counter[int] = Counter()
        self.order = EvictionOrder()


def simulate(setup: Setup, service: Service) -> Outcome:
    """Run it; the same setup gives the same outcome."""
    return _Run(setup, service).run()


class _Run:
    def __init__(self, setup: Setup, service: Service) -> None:
        self.setup, self.service = setup, service
        self.rng = random.Random(setup.seed)
        self.router = Router(RoutingPolicy(least_bound=setup.least_bound))
        self.names = [f"e{i}" for i in range(setup.num_engines)]
        for name in self.names:
            self.router.add(name)
        self.engines = {name: _Engine() for name in self.names}
        self.holders: dict[int, set[str]] = {}
        self.loading: dict[int, dict[str, float]] = {}  # adapter -> engine -> when it is there
        self.events: list[tuple[float, int, str, int]] = []  # end, order, engine, adapter
        self.order = itertools.count()
        self.hits = self.total = self.cold = 0
        self.counts: Counter[str] = Counter()
        self.latencies: list[float] = []
        self.windows: dict[int, list[int]] = {}

    def run(self) -> Outcome:
        setup = self.setup
        tokens = setup.num_prompt + setup.num_output
        lost = self.names[: int(setup.lose * len(self.names))]
        for number, (now, adapter) in enumerate(self._arrivals()):
            self._finish(now)
            if lost and number == setup.num_requests // 2:
                for name in lost:
                    self._lose(name)
                lost = []
            name = self._choose(adapter, tokens)
            self.router.change_load(name, str(adapter), tokens)
            engine, counted = self.engines[name], number >= setup.num_warm
            self.counts[name] += counted
            if engine.rows < setup.num_rows:
                self._start(name, now, now, adapter, counted)
            else:
                engine.queue.append((now, adapter, counted))
        self._finish(float("inf"))
        return self._outcome()

    def _arrivals(self) -> Iterator[tuple[float, int]]:
        setup, rng = self.setup, np.random.default_rng(self.setup.seed)
        weights = np.arange(1, setup.num_adapters + 1, dtype=np.float64) ** -setup.zipf
        bounds = np.cumsum(weights / weights.sum())
        adapters = np.searchsorted(bounds, rng.random(setup.num_requests)).clip(
            max=setup.num_adapters - 1
        )
        times = np.cumsum(rng.exponential(1 / setup.rate, setup.num_requests))
        yield from zip(times.tolist(), adapters.tolist(), strict=True)

    def _choose(self, adapter: int, tokens: int) -> str:
        key = str(adapter)
        if self.setup.policy == "two":
            alive = [self.rng.choice(self.names) for _ in range(2)]
            return min(alive, key=self.router.load)
        if self.setup.policy == "hash":
            return self.router.homes(key, 1)[0]
        return next(
            self.router.rank(
                Demand(key, tokens),
                resident=self.holders.get(adapter, ()),
                near=self.loading.get(adapter, ()),
                has_room=lambda name: len(self.engines[name].slots) < self.setup.num_slots,
            )
        )

    def _start(self, name: str, arrived: float, now: float, adapter: int, counted: bool) -> None:
        setup, service, engine = self.setup, self.service, self.engines[name]
        engine.rows += 1
        ready, is_cold = now, False
        pending = self.loading.get(adapter, {}).get(name)
        if adapter in engine.slots:
            if pending is not None and pending > now:
                ready = pending
            elif pending is not None:
                self._land(name, adapter)
        else:
            is_cold = True
            ready = now + service.load_s
            self._make_room(name)
            engine.slots[adapter] = Standing()
            self.loading.setdefault(adapter, {})[name] = ready
            heapq.heappush(self.events, (ready, next(self.order), name, -1 - adapter))
        engine.order.use(engine.slots[adapter])
        engine.uses[adapter] += 1
        step = service.step_s + service.row_s * (engine.rows - 1)
        end = ready + setup.num_prompt * service.prompt_token_s + setup.num_output * step
        heapq.heappush(self.events, (end, next(self.order), name, adapter))
        if counted:
            self.total += 1
            self.hits += ready == now
            self.cold += is_cold
            self.latencies.append(end - arrived)
        window = self.windows.setdefault(int(now), [0, 0])
        window[0] += is_cold
        window[1] += 1

    def _make_room(self, name: str) -> None:
        engine = self.engines[name]
        if len(engine.slots) < self.setup.num_slots:
            return
        idle = [a for a in engine.slots if not engine.uses[a]]
        if not idle:  # more rows than slots: the engine would wait, which is not modelled
            return
        score = {a: engine.order.score(engine.slots[a], self.service.load_s, 1) for a in idle}
        victim = min(idle, key=score.__getitem__)
        engine.order.evicted(score[victim])
        del engine.slots[victim]
        self._forget(name, victim)

    def _forget(self, name: str, adapter: int) -> None:
        for table in (self.holders, self.loading):
            there: Any = table.get(adapter)
            if there and name in there:
                there.remove(name) if isinstance(there, set) else there.pop(name)

    def _land(self, name: str, adapter: int) -> None:
        if self.loading.get(adapter, {}).pop(name, None) is not None:
            self.holders.setdefault(adapter, set()).add(name)

    def _finish(self, now: float) -> None:
        setup = self.setup
        tokens = setup.num_prompt + setup.num_output
        while self.events and self.events[0][0] <= now:
            end, _, name, adapter = heapq.heappop(self.events)
            engine = self.engines.get(name)
            if engine is None:
                continue
            if adapter < 0:
                self._land(name, -1 - adapter)
                continue
            engine.rows -= 1
            engine.uses[adapter] -= 1
            self.router.change_load(name, str(adapter), -tokens)
            if engine.queue:
                arrived, waiting, counted = engine.queue.popleft()
                self._start(name, arrived, end, waiting, counted)

    def _lose(self, name: str) -> None:
        engine = self.engines.pop(name)
        for adapter in engine.slots:
            self._forget(name, adapter)
        tokens = self.setup.num_prompt + self.setup.num_output
        for adapter, count in engine.uses.items():
            self.router.change_load(name, str(adapter), -tokens * count)
        for _, adapter, _ in engine.queue:
            self.router.change_load(name, str(adapter), -tokens)
        self.router.remove(name)
        self.names.remove(name)

    def _outcome(self) -> Outcome:
        even = sum(self.counts.values()) / len(self.names)
        loads = sorted(self.counts[name] / even for name in self.names)
        held = [len(there) for there in self.holders.values() if there]
        ordered = sorted(self.latencies)
        return Outcome(
            hit_rate=self.hits / self.total,
            cold_starts=self.cold,
            copies=statistics.fmean(held),
            busiest_share=loads[-1],
            latencies=(
                statistics.fmean(ordered), ordered[len(ordered) // 2],
                ordered[int(len(ordered) * 0.99)],
            ),
            loads=loads,
            cold_over_time=[(t, c / n) for t, (c, n) in sorted(self.windows.items()) if n],
        )  # fmt: skip


# ------------------------------------------------------------------ the measured run
NUM_ADAPTERS, RANK, ZIPF, NUM_PROMPT, NUM_OUTPUT = 40, 4, 1.0, 24, 16
NUM_SLOTS, NUM_REQUESTS, NUM_WARM, LEAST_BOUND = 10, 500, 100, 64
NUM_BUSY = 8  # rows at which an engine is taken as full: half of that is asked of it


async def measure(root: Path) -> dict[str, Any]:
    """Drive two real engines; return what was calibrated, measured and simulated."""
    from bench.simulate_measured import Rig

    rig = await Rig.start(
        root, num_adapters=NUM_ADAPTERS, rank=RANK, num_slots=NUM_SLOTS, least_bound=LEAST_BOUND
    )
    try:
        service = await rig.calibrate(NUM_PROMPT, NUM_OUTPUT)
        step_s = service.step_s + (NUM_BUSY - 1) * service.row_s
        taken_s = NUM_PROMPT * service.prompt_token_s + NUM_OUTPUT * step_s
        rate = 2 * 0.5 * NUM_BUSY / taken_s
        setup = Setup(
            NUM_ADAPTERS, 2, NUM_SLOTS, rig.num_rows, ZIPF, rate, NUM_REQUESTS, NUM_PROMPT,
            NUM_OUTPUT, NUM_WARM, least_bound=LEAST_BOUND,
        )  # fmt: skip
        measured = await rig.drive(setup, list(_Run(setup, service)._arrivals()))
    finally:
        await rig.stop()
    outcome = simulate(setup, service)
    simulated = {
        "hit_rate": outcome.hit_rate,
        "cold_starts": float(outcome.cold_starts),
        "busiest_share": outcome.busiest_share,
        "mean_latency_s": outcome.latencies[0],
    }
    errors = {name: simulated[name] / measured[name] - 1 for name in simulated}
    return {
        "service": asdict(service),
        "setup": asdict(setup),
        "measured": measured,
        "simulated": simulated,
        "relative_error": errors,
        "is_within": {name: abs(error) <= TOLERANCE for name, error in errors.items()},
    }


# ------------------------------------------------------------------ the large fleet
# Assumed, for an 8B model and rank-16 adapters of 80 MiB (`polyadapt plan --gpu h100` gives the
# step's bound): nobody has measured them on 1,000 devices.
ASSUMED = Service(step_s=0.012, row_s=0.0001, prompt_token_s=0.0001, load_s=0.15)


# The policy, and the exponent of the popularity.
RUNS = (("home", 1.0), ("two", 1.0), ("hash", 1.0), ("home", 0.8), ("home", 1.2))


def large(**changes: Any) -> Setup:
    """The large fleet with some things otherwise."""
    given: dict[str, Any] = {
        "num_adapters": 100_000, "num_engines": 1000, "num_slots": 100, "num_rows": 32,
        "zipf": 1.0, "num_requests": 60_000, "num_prompt": 256, "num_output": 128,
        "num_warm": 30_000, "rate": 8_000.0, "least_bound": 2048,
    } | changes  # fmt: skip
    return Setup(**given)


def extrapolate(say: Callable[[str], None]) -> dict[str, Any]:
    """Simulate the large fleet under each policy and skew; return figures."""
    runs: dict[str, Any] = {}
    for policy, zipf in RUNS:
        began = time.monotonic()
        outcome = simulate(large(policy=policy, zipf=zipf), ASSUMED)
        runs[f"{policy} zipf {zipf}"] = _figures(outcome)
        say(f"{policy} {zipf}: hits {outcome.hit_rate:.3f}, busiest {outcome.busiest_share:.2f}, "
            f"copies {outcome.copies:.2f}, p99 {outcome.latencies[2]:.2f} s, "
            f"{time.monotonic() - began:.0f} s")  # fmt: skip
    outcome = simulate(large(lose=0.1), ASSUMED)
    runs["home zipf 1.0, a tenth of the engines lost"] = _figures(outcome)
    return {"assumed": asdict(ASSUMED), "setup": asdict(large()), "runs": runs}


def _figures(outcome: Outcome) -> dict[str, Any]:
    found = asdict(outcome)
    every = max(len(outcome.loads) // 100, 1)
    found["loads"] = [round(load, 3) for load in outcome.loads[every - 1 :: every]]
    found["cold_over_time"] = [(t, round(part, 4)) for t, part in outcome.cold_over_time]
    return found


def draw(found: dict[str, Any], folder: Path) -> None:
    """Write the three plots."""
    runs = found["runs"]
    names = {"home": "Polyadapt", "hash": "one home, no bound", "two": "less loaded of two"}
    hits = {
        label: {
            f"{z}": 100 * runs[f"{own} zipf {z}"]["hit_rate"] for own, z in RUNS if own == policy
        }
        for policy, label in names.items()
    }
    loads = {
        label: dict(_at(runs[f"{policy} zipf 1.0"]["loads"])) for policy, label in names.items()
    }
    cold = {
        label: {f"{t}": 100 * part for t, part in runs[key]["cold_over_time"] if t < _LAST_S}
        for label, key in (
            ("Polyadapt", "home zipf 1.0"),
            ("a tenth lost midway", "home zipf 1.0, a tenth of the engines lost"),
            ("less loaded of two", "two zipf 1.0"),
        )
    }
    charts: tuple[tuple[str, str, str, str, Any], ...] = (
        ("hits", "Adapters found on the device, simulated", "Zipf exponent", "% of requests", hits),
        (
            "load", "Load of each engine, simulated", "percentile of the engines",
            "load over an even share", loads,
        ),
        ("cold", "Cold starts over time, simulated", "second", "% of requests", cold),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, title, x_label, y_label, series in charts:
        (folder / f"simulation-{name}.svg").write_text(
            bar_chart(title, x_label, y_label, series), encoding="utf-8"
        )


_LAST_S = 18  # seconds of arrivals that are drawn
_PERCENTILES = (1, 10, 50, 90, 99, 100)


def _at(loads: Sequence[float]) -> Iterator[tuple[str, float]]:
    """The percentiles of sorted figures; what lies beyond ten even shares is drawn as ten."""
    for percentile in _PERCENTILES:
        place = max(round(percentile / 100 * len(loads)) - 1, 0)
        yield f"{percentile}", min(loads[place], 10.0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, simulate, write and say."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "simulation")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs" / "figures")
    parser.add_argument("--skip-measured", action="store_true")
    options = parser.parse_args(arguments)
    saved = options.out / "simulation.json"
    found: dict[str, Any] = {"measured": []}
    if saved.exists():  # measured runs are kept beside each other: what else ran decides much
        found["measured"] = json.loads(saved.read_text())["measured"]
    if not options.skip_measured:
        load = {"load_average": round(os.getloadavg()[0], 1)}
        with tempfile.TemporaryDirectory() as folder:
            found["measured"].append(load | asyncio.run(measure(Path(folder))))
        print(json.dumps(found["measured"][-1], indent=2), flush=True)
    found["large"] = extrapolate(lambda text: print(text, flush=True))
    options.out.mkdir(parents=True, exist_ok=True)
    saved.write_text(json.dumps(found, indent=1) + "\n")
    draw(found["large"], options.plots)


if __name__ == "__main__":
    main()
