"""Runs over a scripted engine: what reaches it, what is counted, how runs end, what they hold."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from tests.support import byte_tokenizer
from tests.support.fake_engine import EOS, FakeEngine
from tests.tasks.test_directory import Judge, files, until_gone, upload

from polyadapt.config import LimitsConfig
from polyadapt.errors import (
    AdapterDeleted,
    ContextLengthExceeded,
    InvalidRequest,
    ModelNotFound,
    NumericalError,
    PolyadaptError,
    QueueFull,
    RequestTimeout,
)
from polyadapt.tasks.directory import AdapterDirectory
from polyadapt.tasks.text import Accepted, Completed, TextEvent, TextService
from polyadapt.tasks.text_marks import TextMarks
from polyadapt.tasks.workflows.kinds import AnyDefinition, stored_definition
from polyadapt.tasks.workflows.library import WorkflowLibrary
from polyadapt.tasks.workflows.runner import (
    WorkflowRequest,
    WorkflowResult,
    WorkflowRunner,
    member_seed,
)
from polyadapt.types import Request, SamplingParams
from polyadapt_store.store import AdapterStore

pytestmark = pytest.mark.anyio
TENANT = "default"
ROLES = ("ir", "kg", "dr")


def lorid(**fields: Any) -> AnyDefinition:
    """Three adapters of the roles' names with short prompts; sampled with 40 tokens at most."""
    templates = {"ir": "I {question}", "kg": "K {question}", "dr": "D {question} <{knowledge}>"}
    members = {
        role: {"adapter": role, "instruction": "", "template": template}
        for role, template in templates.items()
    }
    sampling = {"max_tokens": 40}
    return stored_definition.validate_python(
        {"kind": "lorid", "sampling": sampling, "max_iterations": 3, **members, **fields}
    )


def who(request: Request) -> str:
    return "+".join(applied.adapter.name for applied in request.adapters) or "base"


def prompt_of(request: Request) -> str:
    return bytes(i for i in request.prompt_ids if i < 256).decode()


class Bench:
    """A runner and everything under it; `says` holds what each adapter says, by turns."""

    def __init__(self, root: Path) -> None:
        self.engine = FakeEngine(reply=self.reply)
        self.store = AdapterStore(root / "store", Judge())
        self.directory = AdapterDirectory(self.store, self.engine)
        self.library = WorkflowLibrary(self.store.workflows, self.directory)
        tokenizer = byte_tokenizer.load(root / "model")
        text = TextService(
            self.engine,
            self.directory,
            TextMarks(self.store.text_policies, None),
            tokenizer,
            LimitsConfig(),
        )
        self.runner = WorkflowRunner(text, self.library)
        self.says: dict[str, list[str]] = {"ir": [], "kg": [], "dr": [], "base": []}
        self.num_said: dict[str, int] = {}
        self.events: list[TextEvent] = []

    def reply(self, request: Request, index: int) -> Sequence[int]:
        name = who(request)
        turn = self.num_said.get(name, 0)
        self.num_said[name] = turn + 1
        texts = self.says[name]
        text = texts[turn % len(texts)] if texts else f"s{request.sampling.seed}"
        return [*text.encode(), EOS]

    async def put(self, definition: AnyDefinition) -> None:
        await self.library.put(TENANT, "solver", definition, may_replace=True)

    async def run(self, **fields: Any) -> WorkflowResult:
        workflow = self.library.get(TENANT, "solver")
        request = WorkflowRequest("r", TENANT, workflow, "why?", "messages", **fields)
        return await self.runner.run(request, lambda: nullcontext(self.events.append))

    def num_uses(self) -> int:
        names = [self.directory.find(TENANT, role) for role in ROLES]
        return sum(self.directory.num_uses(n.adapter_id) for n in names if n is not None)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    await made.engine.start()
    with made.store:
        for role in ROLES:
            await upload(made.directory, role)
        await made.put(lorid())
        yield made
        made.directory.check_integrity()
        assert not made.engine.running, "a member was left running"
        assert not made.directory._uses, "a lease was left"


async def test_every_sample_is_one_ordinary_request_of_its_adapter(bench: Bench) -> None:
    bench.says |= {"ir": ["it is 1", "it is 3"], "kg": ["water", "fire"], "dr": ["it is 2", "3"]}
    result = await bench.run(seed=7, priority=4, cache_salt="salt", speculative_tokens=2)
    assert result.outcome.answer == "3"
    assert [(s.round, s.role, s.adapter, s.text, s.answer) for s in result.trace] == [
        (1, "ir", "ir@1", "it is 1", "1"),
        (1, "kg", "kg@1", "water", None),
        (1, "dr", "dr@1", "it is 2", "2"),
        (2, "ir", "ir@1", "it is 3", "3"),
        (2, "kg", "kg@1", "fire", None),
        (2, "dr", "dr@1", "3", "3"),
    ]
    prompts = {(who(r), prompt_of(r)) for r in bench.engine.requests}
    shown = "user\n{}\nassistant\n"
    assert prompts == {
        ("ir", shown.format("I why?")),
        ("kg", shown.format("K why?")),
        ("dr", shown.format("D why? <water>")),
        ("dr", shown.format("D why? <fire>")),
    }
    for request in bench.engine.requests:
        assert request.n == 1
        assert (request.priority, request.speculative_tokens) == (4, 2)
        assert request.cache_salt == ("tenant", TENANT, "salt")
        assert request.sampling == SamplingParams(
            max_tokens=40, temperature=1.5, top_p=0.9, top_k=50, seed=request.sampling.seed
        )
    assert len({request.id for request in bench.engine.requests}) == 6
    # Once each, as they were asked for, whichever came to the queue first.
    assert [served.adapter.name for served in result.served] == ["ir", "kg", "dr"]


async def test_usage_counts_every_token_of_every_sample(bench: Bench) -> None:
    bench.says |= {"ir": ["1"], "kg": ["abc"], "dr": ["22"]}
    bench.engine.num_cached_tokens = 2
    result = await bench.run()
    assert result.outcome.num_rounds == 3
    assert result.used == Completed(
        sum(len(r.prompt_ids) for r in bench.engine.requests), 3 * (2 + 4 + 3), 9 * 2
    )
    assert result.used.num_completion_tokens == sum(s.num_tokens for s in result.trace)
    assert result.used.num_prompt_tokens == sum(s.num_prompt_tokens for s in result.trace)
    assert sum(isinstance(event, Accepted) for event in bench.events) == 9
    assert sum(isinstance(event, Completed) for event in bench.events) == 9


async def test_the_time_limit_is_the_whole_runs(bench: Bench) -> None:
    bench.says |= {"ir": ["1"], "kg": ["abc"], "dr": ["22"]}
    bench.engine.gate = asyncio.Semaphore(12)  # enough for a round, and then nothing goes on
    bench.runner = WorkflowRunner(bench.runner._text, bench.library, timeout_s=0.2)
    with pytest.raises(RequestTimeout, match=r"'solver' did not end within 0\.2 s; 3 of its"):
        await bench.run()
    bench.engine.gate = None
    bench.runner = WorkflowRunner(bench.runner._text, bench.library, timeout_s=60.0)
    assert (await bench.run()).outcome.num_rounds == 3


async def test_a_seed_makes_the_run_and_each_sample_repeatable(bench: Bench) -> None:
    first, again, other, free, free_too = [
        await bench.run(seed=seed) for seed in (7, 7, 8, None, None)
    ]
    assert first == again
    traces = [[s.seed for s in result.trace] for result in (first, other, free, free_too)]
    seeds = [seed for trace in traces for seed in trace]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 1 << 52 for seed in seeds)
    assert (
        traces[0]
        == [member_seed(7, round_id, role, 0) for round_id in (1, 2, 3) for role in ROLES][
            : len(traces[0])
        ]
    )
    assert [s.text for s in first.trace] == [f"s{s.seed}" for s in first.trace]


async def test_a_requests_sampling_takes_the_place_of_the_definitions(bench: Bench) -> None:
    await bench.run(sampling={"temperature": 0.25, "top_k": -1, "max_tokens": 3, "min_p": 0.1})
    for request in bench.engine.requests:
        assert request.sampling == SamplingParams(
            max_tokens=3, temperature=0.25, top_p=0.9, min_p=0.1, seed=request.sampling.seed
        )


async def test_a_member_may_have_fewer_tokens_where_the_context_ends(bench: Bench) -> None:
    await bench.put(lorid(sampling={"max_tokens": 5000}))
    bench.says |= {"ir": ["1"], "kg": ["k" * 100], "dr": ["1"]}
    result = await bench.run()
    for request in bench.engine.requests:
        assert request.sampling.max_tokens == 256 - len(request.prompt_ids)
    assert result.outcome.agreed
    bench.says["kg"] = ["k" * 230]
    with pytest.raises(ContextLengthExceeded, match="dr, round 1: the context is 256") as caught:
        await bench.run()
    assert caught.value.param == "messages"


async def test_earlier_turns_are_shown_to_every_member(bench: Bench) -> None:
    bench.says |= {"ir": ["1"], "kg": ["w"], "dr": ["1"]}
    await bench.run(earlier=({"role": "system", "content": "Be brief."},))
    for request in bench.engine.requests:
        assert prompt_of(request).startswith("system\nBe brief.\nuser\n")
    await bench.put(lorid(format="text"))
    with pytest.raises(InvalidRequest, match="no turns") as caught:
        await bench.run(earlier=({"role": "system", "content": "Be brief."},))
    assert caught.value.param == "messages"


async def test_the_text_format_is_the_bare_prompt(bench: Bench) -> None:
    bench.says |= {"ir": ["1"], "kg": ["w"], "dr": ["1"]}
    await bench.put(lorid(format="text"))
    await bench.run()
    prompts = sorted(prompt_of(request) for request in bench.engine.requests)
    assert prompts == ["D why? <w>", "I why?", "K why?"]


async def test_a_run_keeps_the_versions_that_it_began_with(bench: Bench) -> None:
    """Replaced and deleted under way: leases hold, and the deletion waits for the run."""
    bench.says |= {"ir": ["1", "2", "5"], "kg": ["w"], "dr": ["3", "4", "6"]}
    bench.engine.gate = asyncio.Semaphore(0)
    run = asyncio.create_task(bench.run())
    while not bench.engine.running:
        await asyncio.sleep(0)
    first = bench.directory.find(TENANT, "ir")
    assert first is not None
    await bench.directory.upload(TENANT, "ir", files("another"))
    deletions = [
        asyncio.create_task(bench.directory.delete(TENANT, "ir", 1, "drain")),
        asyncio.create_task(bench.directory.delete(TENANT, "dr", None, "drain")),
    ]
    await until_gone(bench.directory, "dr")
    await until_gone(bench.directory, "ir@1")
    assert not any(task.done() for task in deletions)
    for _ in range(500):
        bench.engine.gate.release()
    result = await run
    await asyncio.gather(*deletions)
    assert result.outcome.num_rounds == 3
    assert {s.adapter for s in result.trace} == {"ir@1", "kg@1", "dr@1"}
    digests = {a.adapter.digest for r in bench.engine.requests for a in r.adapters}
    assert first.digest in digests
    assert len(digests) == 3
    with pytest.raises(ModelNotFound, match="the workflow's dr: ") as caught:
        await bench.run()
    assert caught.value.param == "model"


async def test_deletion_with_now_ends_a_run_of_which_nothing_runs_with_the_adapter(
    bench: Bench,
) -> None:
    """DR has nothing in the engine while KG speaks; its turn must not come all the same."""
    bench.says |= {"ir": ["1"], "kg": ["w"], "dr": ["1"]}
    bench.engine.gate = asyncio.Semaphore(0)
    run = asyncio.create_task(bench.run())
    while len(bench.engine.running) < 2:
        await asyncio.sleep(0)
    deletion = asyncio.create_task(bench.directory.delete(TENANT, "dr", None, "now"))
    while not bench.engine.deleted:
        await asyncio.sleep(0.001)
    for _ in range(100):
        bench.engine.gate.release()
    with pytest.raises(AdapterDeleted, match="the workflow's dr, round 1: "):
        await run
    await deletion
    assert {who(request) for request in bench.engine.requests} == {"ir", "kg"}


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ((2, "numerical_error", "not finite"), NumericalError),
        ((0, "adapter_deleted", "gone"), AdapterDeleted),
    ],
)
async def test_a_member_that_fails_fails_the_run_and_is_named(
    bench: Bench, failure: tuple[int, str, str], expected: type[PolyadaptError]
) -> None:
    bench.engine.failure = failure
    with pytest.raises(expected, match=r"the workflow's (ir|kg), round 1: (not finite|gone)"):
        await bench.run()


async def test_a_full_queue_says_when_to_retry(bench: Bench) -> None:
    shared = QueueFull("full", retry_after_s=9)
    bench.engine.refusal = shared
    for _ in range(2):
        with pytest.raises(QueueFull) as caught:
            await bench.run()
        assert caught.value.message in (
            "the workflow's ir, round 1: full",
            "the workflow's kg, round 1: full",
        )
        assert caught.value.retry_after_s == 9
    assert shared.message == "full", "an error that others see is not changed"


@pytest.mark.parametrize("num_steps", [0, 3, 12, 20])
async def test_a_run_that_is_cancelled_leaves_nothing(bench: Bench, num_steps: int) -> None:
    bench.says |= {"ir": ["one: 1"], "kg": ["water"], "dr": ["two: 2"]}
    bench.engine.gate = asyncio.Semaphore(num_steps)
    run = asyncio.create_task(bench.run())
    while len(bench.engine.running) < 1 or not bench.engine.gate.locked():
        await asyncio.sleep(0)
    for _ in range(20):
        await asyncio.sleep(0)
    assert bench.num_uses() >= 3
    num_running = len(bench.engine.running)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert len(bench.engine.cancelled) == num_running > 0
    assert bench.num_uses() == 0


async def test_the_base_may_be_a_member(bench: Bench) -> None:
    bench.says["base"] = ["it is 4"]
    definition = {"kind": "self_consistency", "reasoner": {"adapter": None}, "num_samples": 3}
    await bench.put(stored_definition.validate_python(definition))
    result = await bench.run()
    assert (result.outcome.answer, result.outcome.agreed) == ("4", True)
    assert result.served == ()
    assert {s.adapter for s in result.trace} == {None}
