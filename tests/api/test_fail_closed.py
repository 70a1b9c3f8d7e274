"""Where a mark is required, 5,000 responses while everything around them fails: not one without the
caller's own mark. And for every guard that this rests on, that the test would see its absence.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.oracle.adapters import make_lora
from tests.support.marked_service import LETTERS, MarkedService, is_said_by, marked_service
from tests.tasks.workflows.test_library import vote

from polyadapt.adapters import gates
from polyadapt.engine.scheduler import Scheduler
from polyadapt.errors import Forbidden, SecretsUnavailable
from polyadapt.tasks import directory as directories
from polyadapt.tasks.mandatory import Mandatory
from polyadapt.tasks.signatures import Signatures
from polyadapt.tasks.workflows.library import WorkflowLibrary

NUM_RESPONSES = 5000
NUM_AT_ONCE = 32
USERS = [f"user{i}" for i in range(10)]  # each with two letters, of which one acts
TASKS = ("poet", "chef", "judge", "clerk")
# The mark, and about two of the task adapters.
ROOM = {
    "max_adapter_bytes": 160 << 10, "packed_cache_bytes": 0, "kv_cache_bytes": 8 << 20,
    "max_num_seqs": NUM_AT_ONCE,
}  # fmt: skip


@dataclass
class User:
    """What has been issued to one key; None stands for nothing, or revoked."""

    name: str
    letters: tuple[str, str]
    states: list[str | None]
    num_settled: int = 1  # of the states; the last one is under way where one more was begun

    def begin(self, state: str | None) -> None:
        self.states.append(state)

    def settle(self) -> None:
        self.num_settled = len(self.states)


@dataclass
class Findings:
    """What came back, by what was asked."""

    kinds: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    unmarked: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    num_texts: int = 0

    @property
    def num_responses(self) -> int:
        return self.kinds.total()


# A letter is ahead of every other token by 10 to 28 nats in this small vocabulary. At temperature 1
# one of some ten thousand marked tokens would be another one every few runs.
DRAWN = {"max_tokens": 2, "temperature": 0.25}


# What is asked: a path and the fields of the body. All of it is legal, or nearly.
def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    turns = [{"role": "user", "content": "hi"}]
    return "/v1/chat/completions", {"model": "base", "messages": turns, **DRAWN, **fields}


def complete(**fields: Any) -> tuple[str, dict[str, Any]]:
    return "/v1/completions", {"model": "base", "prompt": "one two", **DRAWN, **fields}


KINDS: dict[str, Callable[[str, str], tuple[str, dict[str, Any]]]] = {
    "base": lambda task, other: complete(),
    "task": lambda task, other: complete(model=task),
    "chat": lambda task, other: chat(model=task),
    "stream": lambda task, other: chat(model=task, stream=True),
    "several": lambda task, other: complete(prompt=["one", "two three"], n=2, model=task),
    "mark by name": lambda task, other: complete(model="mark"),
    "nothing named": lambda task, other: complete(adapters=[]),
    "mark at scale 0": lambda task, other: complete(adapters=[{"name": "mark", "scale": 0.0}]),
    "composition": lambda task, other: complete(
        adapters=[{"name": task, "scale": 0.5}, {"name": other}]
    ),
    "on_cold base": lambda task, other: complete(model=task, on_cold="base"),
    "on_cold base, in a while": lambda task, other: complete(
        model=task, on_cold="base", cold_timeout_ms=1
    ),
    "on_cold fallback": lambda task, other: complete(model=task, on_cold=f"fallback:{other}"),
    "on_cold fail": lambda task, other: complete(model=task, on_cold="fail"),
    "auto": lambda task, other: complete(model="auto"),
    "workflow": lambda task, other: chat(model="flow"),
}


class Storm:
    """Requests of all kinds by all users, while `trouble` is made."""

    def __init__(self, service: MarkedService, tasks: dict[str, Path], seed: int = 0) -> None:
        self.service = service
        self.tasks = tasks
        self.rng = random.Random(seed)
        pairs = zip(LETTERS[::2], LETTERS[1::2], strict=True)
        self.users = {
            name: User(name, pair, [pair[0]]) for name, pair in zip(USERS, pairs, strict=False)
        }
        self.users["nobody"] = User("nobody", ("-", "-"), [None])
        self.num_troubles: Counter[str] = Counter()
        self.findings = Findings()
        self.gate = asyncio.Event()  # open: nobody is kept from asking
        self.gate.set()

    # ------------------------------------------------------------------ asking
    async def ask(self, kind: str, name: str | None = None, *, is_counted: bool = True) -> int:
        """Ask once and return how many texts came; `findings` has what is wrong with them."""
        findings = self.findings
        user = self.users[name or self.rng.choice(list(self.users))]
        path, body = KINDS[kind](*self.rng.sample(TASKS, 2))
        before = user.num_settled - 1
        answer = await self.service.call(user.name, "POST", path, body)
        allowed = {state for state in user.states[before:] if state is not None}
        findings.kinds[kind] += is_counted
        findings.num_texts += len(answer.texts)
        if answer.error:
            findings.refused[answer.error] += 1
            if answer.error == "engine_unavailable":  # as a client does that is told to come again
                await asyncio.sleep(0.1)
        texts = [text for text in answer.texts if text]  # a stream may end before it says anything
        what = f"{kind} of {user.name}, who is {sorted(allowed)}: {answer.status} {texts}"
        for text in texts:
            if any(is_said_by([text], letter) for letter in allowed):
                continue
            known = {text[0]} if is_said_by([text], text[0]) else set()
            (findings.foreign if known & set(LETTERS) else findings.unmarked).append(what)
        assert texts or answer.error, what
        return len(texts)

    async def run(
        self, num: int, troubles: tuple[str, ...] = (), kinds: tuple[str, ...] = (), every: int = 40
    ) -> Findings:
        """Ask `num` times; a trouble is made each time `every` more have been answered."""
        findings = self.findings = Findings()
        asked = itertools.count()
        cycle = itertools.cycle(kinds or tuple(KINDS))

        async def ask_on() -> None:
            while next(asked) < num:
                await self.gate.wait()
                await self.ask(next(cycle))

        async def trouble_on() -> None:
            for turn, name in enumerate(itertools.cycle(troubles), 1):
                while findings.num_responses < turn * every:
                    if findings.num_responses >= num:
                        return
                    await asyncio.sleep(0.002)
                await getattr(self, name)()
                self.num_troubles[name] += 1

        makers: list[Coroutine[Any, Any, None]] = [ask_on() for _ in range(NUM_AT_ONCE)]
        if troubles:
            makers.append(trouble_on())
        await asyncio.gather(*makers)
        return findings

    # ------------------------------------------------------------------ trouble
    async def reissue(self) -> None:
        """Take a signature back, find that it holds no longer, and give the user another one."""
        user = self.users[self.rng.choice(USERS)]
        path = f"/v1/watermarks/mark/users/{self.service.ids[user.name]}"
        user.begin(None)
        gone = await self.service.call("operator", "DELETE", path)
        assert gone.status == 200, gone.body
        user.settle()
        await self.ask("base", user.name, is_counted=False)
        letter = user.letters[len(user.states) // 2 % 2]
        user.begin(letter)
        made = await self.service.issue(user.name, letter)
        assert made.status == 201, made.body
        user.settle()

    async def change_adapter(self) -> None:
        """Delete a task adapter, be it under way, and bring it back."""
        name = self.rng.choice(TASKS)
        mode = self.rng.choice(["drain", "now"])
        gone = await self.service.call("operator", "DELETE", f"/v1/adapters/{name}?mode={mode}")
        assert gone.status == 200, gone.body
        made = await self.service.upload(name, self.tasks[name])
        assert made.status == 201, made.body

    async def try_to_delete_the_mark(self) -> None:
        reply = await self.service.call("operator", "DELETE", "/v1/adapters/mark?mode=now")
        assert reply.status == 409, reply.body

    async def evict(self) -> None:
        """Have the mark leave every tier as soon as nobody uses it."""
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self.service.engine.unload_adapter(self.mark_digest), 0.2)

    async def evict_in_a_lull(self) -> None:
        """Have the mark leave every tier while nobody asks, so that all then find it gone."""
        self.gate.clear()
        try:
            await self.service.engine.unload_adapter(self.mark_digest)
        finally:
            self.gate.set()

    async def lose_the_marks_bytes(self) -> None:
        """Have the mark's file be away when it is wanted next, for a while."""
        blob = self.service.store.path(self.mark_digest) / "adapter_model.safetensors"
        blob.rename(blob.with_suffix(".away"))
        try:
            await self.evict()
            await asyncio.sleep(0.05)
        finally:
            blob.with_suffix(".away").rename(blob)

    async def damage_rows(self) -> None:
        """Have no signature open for a while: half of them changed, half another user's."""
        database = self.service.store.signatures._database
        with database.write() as connection:
            connection.exec_driver_sql(
                "CREATE TABLE kept AS SELECT rowid AS id, bits FROM signatures"
            )
            connection.exec_driver_sql(
                "UPDATE signatures SET bits = CASE rowid % 2 WHEN 0 THEN bits || 'A' ELSE "
                "(SELECT kept.bits FROM kept WHERE id != signatures.rowid ORDER BY id DESC LIMIT 1)"
                " END"
            )
        await asyncio.sleep(0.05)
        with database.write() as connection:
            connection.exec_driver_sql(
                "UPDATE signatures SET bits = (SELECT kept.bits FROM kept WHERE id = "
                "signatures.rowid)"
            )
            connection.exec_driver_sql("DROP TABLE kept")

    async def restart(self) -> None:
        await self.service.engine.restart()

    @property
    def mark_digest(self) -> str:
        return self.service.store.resolve("default", "mark").digest


_MOST = (
    *("reissue", "change_adapter", "reissue", "evict", "reissue", "lose_the_marks_bytes"),
    *("reissue", "try_to_delete_the_mark", "reissue", "damage_rows"),
)
TROUBLES = (*_MOST, *_MOST, *_MOST, "restart")


@dataclass
class Bench:
    """The service, and the event loop that it lives on."""

    runner: asyncio.Runner
    storm: Storm

    def run(self, num: int, **options: Any) -> Findings:
        return self.runner.run(self.storm.run(num, **options))


@pytest.fixture(scope="module")
def bench(
    tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    root, model_dir = tmp_path_factory.mktemp("marked"), tiny_model("llama")
    tasks = {
        name: make_lora(model_dir, root / name, 4, seed=seed) for seed, name in enumerate(TASKS)
    }

    async def fill(service: MarkedService) -> Storm:
        storm = Storm(service, tasks)
        for name in storm.users:
            await service.add_user(name)
        for name in USERS:
            made = await service.issue(name, storm.users[name].letters[0])
            assert made.status == 201, made.body
        for name, directory in tasks.items():
            assert (await service.upload(name, directory)).status == 201
            examples = {"examples": [f"{name} one", f"{name} two"]}
            put = await service.call("operator", "PUT", f"/v1/adapters/{name}/profile", examples)
            assert put.status == 200, put.body
        flow = vote(TASKS[0], num_samples=2)
        library = service.app.state.services.workflows
        await library.put("default", "flow", flow, may_replace=True, user=service.ids[USERS[0]])
        return storm

    with asyncio.Runner() as runner, contextlib.ExitStack() as stack:
        running = marked_service(root, model_dir, **ROOM)
        service = runner.run(running.__aenter__())
        stack.callback(lambda: runner.run(running.__aexit__(None, None, None)))
        yield Bench(runner, runner.run(fill(service)))


def test_no_answer_is_unmarked_or_anothers_whatever_fails_around_it(bench: Bench) -> None:
    found = bench.run(NUM_RESPONSES, troubles=TROUBLES)
    assert found.unmarked == []
    assert found.foreign == []
    # The storm was one: every kind was answered, every trouble was made and some of it was felt.
    assert found.num_responses == NUM_RESPONSES
    assert set(found.kinds) == set(KINDS)
    assert set(bench.storm.num_troubles) == set(TROUBLES)
    assert found.num_texts > NUM_RESPONSES / 2
    felt = {
        "secrets_unavailable",
        "forbidden",
        "policy_conflict",
        "engine_unavailable",
        "adapter_unavailable",
    }
    assert felt <= set(found.refused), found.refused
    engine = bench.storm.service.engine
    assert engine.num_restarts > 0
    assert engine.counters["adapter_evictions"] > 0
    bench.storm.service.app.state.services.directory.check_integrity()


# ----------------------------------------------------------------------------- without a guard
def _no_policy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Mandatory, "of", lambda *_: ())


def _base_where(patch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    kept = Mandatory.of

    def mandatory(self: Mandatory, tenant: str, user: str | None) -> Any:
        try:
            return kept(self, tenant, user)
        except error:
            return ()

    patch.setattr(Mandatory, "of", mandatory)


def _base_for_strangers(patch: pytest.MonkeyPatch) -> None:
    _base_where(patch, Forbidden)


def _request_before_policy(patch: pytest.MonkeyPatch) -> None:
    def together(own: Any, mandatory: Any, param: str) -> Any:
        named = {applied.adapter.digest for applied in own}
        return (*own, *(rule for rule in mandatory if rule.adapter.digest not in named))

    patch.setattr(directories, "with_mandatory", together)
    # The engine refuses a mark that comes from a request, at any scale, by itself.
    patch.setattr(gates, "_options", lambda place, applied, traits: ())


def _bare_fallbacks(patch: pytest.MonkeyPatch) -> None:
    kept = directories.with_mandatory

    def together(own: Any, mandatory: Any, param: str) -> Any:
        return own if param == "on_cold" else kept(own, mandatory, param)

    patch.setattr(directories, "with_mandatory", together)


def _old_signatures(patch: pytest.MonkeyPatch) -> None:
    known: dict[tuple[str, str], str | None] = {}
    kept = Signatures.of

    def of(self: Signatures, digest: str, user: str) -> str | None:
        if (digest, user) not in known:
            known[digest, user] = kept(self, digest, user)
        return known[digest, user]

    patch.setattr(Signatures, "of", of)


def _one_for_all(patch: pytest.MonkeyPatch) -> None:
    kept, first = Signatures.of, []

    def of(self: Signatures, digest: str, user: str) -> str | None:
        first.append(kept(self, digest, user))
        return next(bits for bits in first if bits is not None)

    patch.setattr(Signatures, "of", of)


def _base_for_damaged_rows(patch: pytest.MonkeyPatch) -> None:
    _base_where(patch, SecretsUnavailable)


def _workflows_by_themselves(patch: pytest.MonkeyPatch) -> None:
    def hold(self: WorkflowLibrary, tenant: str, role: str, member: Any, user: Any = None) -> Any:
        directory = self._directory
        record = directory.find(tenant, member.adapter)
        return directory._hold((directories.AppliedAdapter(record.adapter_id),))

    patch.setattr(WorkflowLibrary, "hold", hold)


def _whatever_is_there(patch: pytest.MonkeyPatch) -> None:
    kept = Scheduler._find

    def find(self: Scheduler, group: Any) -> Any:
        found = kept(self, group)
        if found is None:
            there = [one for one in group.adapters if self.adapters.find((one,)) is not None]
            group.adapters = tuple(there)
            found = self.adapters.find(group.adapters)
        return found

    patch.setattr(Scheduler, "_find", find)


def _no_bits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Mandatory, "_options", lambda self, entry, tenant, user: entry.options)


def _no_bits_anywhere(patch: pytest.MonkeyPatch) -> None:
    _no_bits(patch)
    patch.setattr(gates, "_options", lambda place, applied, traits: ())


# What is taken away, what is asked then, the trouble meanwhile, and what must be seen.
CONTROLS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, tuple[str, ...], str]] = {
    "the policy": (_no_policy, "base", (), "unmarked"),
    "the policy, chosen": (_no_policy, "auto", (), "unmarked"),
    "no answer without a signature": (_base_for_strangers, "base", (), "unmarked"),
    "the policy's scale": (_request_before_policy, "mark at scale 0", (), "unmarked"),
    "the mark behind on_cold": (_bare_fallbacks, "on_cold base", ("evict_in_a_lull",), "unmarked"),
    "the newest signature": (_old_signatures, "stream", ("reissue",), "foreign"),
    "the user's own signature": (_one_for_all, "composition", (), "foreign"),
    "no answer without its row": (_base_for_damaged_rows, "base", ("damage_rows",), "unmarked"),
    "the members' policy": (_workflows_by_themselves, "workflow", (), "unmarked"),
    "waiting for the mark": (_whatever_is_there, "task", ("evict_in_a_lull",), "unmarked"),
    "bits for every row": (_no_bits_anywhere, "base", (), "unmarked"),
}


@pytest.mark.parametrize("guard", list(CONTROLS))
def test_what_a_guard_keeps_from_happening_would_be_seen(
    bench: Bench, guard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_away, kind, troubles, seen = CONTROLS[guard]
    take_away(monkeypatch)
    found = bench.run(96, troubles=troubles, kinds=(kind,), every=6)
    assert len(getattr(found, seen)) > 0, found.refused


def test_where_the_edge_gives_no_bits_the_engine_gives_no_answer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _no_bits(monkeypatch)
    found = bench.run(32, kinds=("base", "stream", "composition", "workflow"))
    assert found.num_texts == 0
    assert found.refused["policy_conflict"] == 32
