"""The text task over a scripted engine: bounds, ends, failures, and leases that come back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from tests.support import byte_tokenizer
from tests.support.fake_engine import EOS, FakeEngine, make_info, say
from tests.tasks.test_directory import Judge, upload

from polyadapt.config import LimitsConfig
from polyadapt.errors import (
    ContextLengthExceeded,
    EngineUnavailable,
    InternalError,
    InvalidRequest,
    ModelNotFound,
    NumericalError,
    PolyadaptError,
    QueueFull,
    RequestCancelled,
)
from polyadapt.tasks.directory import AdapterDirectory
from polyadapt.tasks.sequence_text import TextDelta
from polyadapt.tasks.text import (
    Accepted,
    ChatPrompt,
    Completed,
    PromptScores,
    Queued,
    TextEvent,
    TextPrompt,
    TextRequest,
    TextService,
    TokenPrompt,
)
from polyadapt.tasks.text_marks import TextMarks
from polyadapt.tasks.tokenizer import Tokenizer
from polyadapt.types import Finished, Request, SamplingParams, Started
from polyadapt_store.store import AdapterStore

pytestmark = pytest.mark.anyio


class Bench:
    """A text service and everything under it."""

    def __init__(self, root: Path) -> None:
        self.engine = FakeEngine(reply=say("Hello, world!"))
        self.store = AdapterStore(root / "store", Judge())
        self.directory = AdapterDirectory(self.store, self.engine)
        self.limits = LimitsConfig()
        self.tokenizer = byte_tokenizer.load(root / "model")

    @property
    def service(self) -> TextService:
        marks = TextMarks(self.store.text_policies, None)
        return TextService(self.engine, self.directory, marks, self.tokenizer, self.limits)

    async def run(self, **fields: Any) -> list[TextEvent]:
        return [event async for event in self.service.generate(request(**fields))]

    async def texts(self, **fields: Any) -> dict[int, str]:
        return texts_of(await self.run(**fields))


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    made = Bench(tmp_path)
    await made.engine.start()
    with made.store:
        yield made
        made.directory.check_integrity()
        assert not made.engine.running, "a request was left running"


def request(**fields: Any) -> TextRequest:
    """Return a request for the prompt "hi" unless fields say otherwise."""
    defaults: dict[str, Any] = {
        "id": "r",
        "tenant": "default",
        "model": "fake-base",
        "prompts": (TextPrompt("hi"),),
        "sampling": SamplingParams(max_tokens=1),
        "max_tokens": 50,
    }
    return TextRequest(**{**defaults, **fields})


def texts_of(events: Sequence[TextEvent]) -> dict[int, str]:
    texts: dict[int, str] = {}
    for event in events:
        if isinstance(event, TextDelta):
            texts[event.index] = texts.get(event.index, "") + event.text
    return texts


async def test_a_request_is_accepted_queued_told_and_completed(bench: Bench) -> None:
    events = await bench.run()
    assert isinstance(events[0], Accepted)
    assert isinstance(events[1], Queued)
    assert events[-1] == Completed(2, len("Hello, world!") + 1)
    assert texts_of(events) == {0: "Hello, world!"}
    assert bench.engine.cancelled == []


async def test_the_lease_is_held_until_the_end(bench: Bench) -> None:
    poet = await upload(bench.directory, "poet")
    async for _ in bench.service.generate(request(model="poet")):
        assert bench.directory.num_uses(poet) == 1
    assert bench.directory.num_uses(poet) == 0


@pytest.mark.parametrize("num_events", [0, 1, 2, 3, 6])
async def test_closing_at_any_point_cancels_and_returns_the_lease(
    bench: Bench, num_events: int
) -> None:
    poet = await upload(bench.directory, "poet")
    async with aclosing(bench.service.generate(request(model="poet", n=2))) as events:
        for _ in range(num_events):
            await anext(events)
        assert bench.directory.num_uses(poet) == (1 if num_events else 0)
    assert bench.directory.num_uses(poet) == 0
    await bench.engine.until_idle()
    assert len(bench.engine.cancelled) == (num_events >= 2)


async def test_cancelling_while_it_waits_frees_the_request(bench: Bench) -> None:
    poet = await upload(bench.directory, "poet")
    bench.engine.gate = asyncio.Semaphore(0)

    async def consume() -> None:
        async for _ in bench.service.generate(request(model="poet")):
            pass

    task = asyncio.create_task(consume())
    while not bench.engine.running:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert bench.engine.cancelled == ["r-0"]
    assert bench.directory.num_uses(poet) == 0


async def test_a_stop_string_ends_the_text_and_cancels_the_rest(bench: Bench) -> None:
    events = await bench.run(stop=("wor",))
    assert texts_of(events) == {0: "Hello, "}
    assert events[-1] == Completed(2, len("Hello, wor"))
    assert bench.engine.cancelled == ["r-0"]


async def test_a_sequence_that_stopped_does_not_end_the_others(bench: Bench) -> None:
    def reply(request: Request, index: int) -> list[int]:
        return [*(b"stop here" if index == 0 else b"go on until the end"), EOS]

    bench.engine.reply = reply
    events = await bench.run(n=2, stop=("here",))
    assert texts_of(events) == {0: "stop ", 1: "go on until the end"}
    reasons = {e.index: e.finish_reason for e in events
               if isinstance(e, TextDelta) and e.finish_reason}  # fmt: skip
    assert reasons == {0: "stop", 1: "stop"}


async def test_a_prompt_that_stopped_is_cancelled_while_the_others_run(bench: Bench) -> None:
    bench.engine.reply = lambda request, index: [*request.prompt_ids, *b"-" * 20, EOS]
    bench.engine.gate = asyncio.Semaphore(10)

    async def consume() -> list[TextEvent]:
        return await bench.run(prompts=(TextPrompt("stop"), TextPrompt("go")), stop=("stop",))

    task = asyncio.create_task(consume())
    while bench.engine.cancelled != ["r-0"]:
        assert not task.done()
        await asyncio.sleep(0)
    assert list(bench.engine.running) == ["r-1"]
    bench.engine.gate = None
    task.cancel()
    await asyncio.wait({task})


async def test_every_prompt_has_its_own_sequences(bench: Bench) -> None:
    bench.engine.reply = lambda request, index: [*request.prompt_ids, 48 + index, EOS]
    texts = await bench.texts(prompts=(TextPrompt("a"), TokenPrompt((98,))), n=2)
    assert texts == {0: "a0", 1: "a1", 2: "b0", 3: "b1"}
    assert sorted(r.id for r in bench.engine.requests) == ["r-0", "r-1"]


async def test_one_failing_prompt_ends_the_whole_call(bench: Bench) -> None:
    bench.engine.failure = (2, NumericalError.code, "non-finite logits")
    with pytest.raises(NumericalError):
        await bench.run(prompts=(TextPrompt("a"), TextPrompt("b")))
    await bench.engine.until_idle()


@pytest.mark.parametrize("error", [QueueFull("full"), EngineUnavailable("down")])
async def test_a_refusal_is_raised_after_acceptance(bench: Bench, error: PolyadaptError) -> None:
    poet = await upload(bench.directory, "poet")
    bench.engine.refusal = error
    with pytest.raises(type(error)):
        await bench.run(model="poet")
    assert bench.directory.num_uses(poet) == 0


async def test_a_bug_below_is_an_internal_error_with_a_closed_message(bench: Bench) -> None:
    bench.engine.crash = RuntimeError("secret path /etc/x")
    with pytest.raises(InternalError) as caught:
        await bench.run()
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("ending", "error"),
    [((), InternalError), ((Finished("r-0"),), InternalError),
     ((Finished("r-0", is_cancelled=True),), RequestCancelled)],
)  # fmt: skip
async def test_a_stream_that_ends_early_is_an_error(
    bench: Bench, ending: tuple[Finished, ...], error: type[Exception]
) -> None:
    async def submit(request: Request) -> AsyncIterator[Any]:
        yield Started(request.id)
        for event in ending:
            yield event

    bench.engine.submit = submit  # type: ignore[method-assign, assignment]
    with pytest.raises(error):
        await bench.run()


@pytest.mark.parametrize(
    ("prompt", "wanted", "given"),
    [
        (TextPrompt("hi"), None, 16),
        (TextPrompt("x" * 250), None, 6),
        (ChatPrompt(({"role": "user", "content": "hi"},)), None, 256 - 21),
        (TextPrompt("hi"), 254, 254),
    ],
)
async def test_max_tokens_default_to_what_fits(
    bench: Bench, prompt: Any, wanted: int | None, given: int
) -> None:
    await bench.run(prompts=(prompt,), max_tokens=wanted)
    assert bench.engine.requests[0].sampling.max_tokens == given


@pytest.mark.parametrize(("prompt", "wanted"), [("hi", 255), ("x" * 256, None), ("x" * 300, 5)])
async def test_what_does_not_fit_is_refused_with_all_numbers(
    bench: Bench, prompt: str, wanted: int | None
) -> None:
    with pytest.raises(ContextLengthExceeded) as caught:
        await bench.run(prompts=(TextPrompt(prompt),), max_tokens=wanted)
    for number in (256, len(prompt), wanted or 1):
        assert str(number) in caught.value.message
    assert bench.engine.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompts": (TextPrompt(""),)}, "prompt"),
        ({"prompts": (TokenPrompt(()),)}, "prompt"),
        ({"prompts": (TokenPrompt((260,)),)}, "prompt"),
        ({"prompts": (TokenPrompt((-1,)),)}, "prompt"),
        ({"sampling": SamplingParams(1, stop_token_ids=(260,))}, "stop_token_ids"),
        ({"sampling": SamplingParams(1, logit_bias=((260, 1.0),))}, "logit_bias"),
        ({"sampling": SamplingParams(1, min_tokens=51)}, "min_tokens"),
    ],
)
async def test_bounds_of_the_model_are_checked_before_the_engine(
    bench: Bench, fields: dict[str, Any], param: str
) -> None:
    poet = await upload(bench.directory, "poet")
    with pytest.raises(InvalidRequest) as caught:
        await bench.run(model="poet", **fields)
    assert caught.value.param == param
    assert bench.engine.requests == []
    assert bench.directory.num_uses(poet) == 0


async def test_an_unknown_model_is_found_before_tokenising(bench: Bench) -> None:
    with pytest.raises(ModelNotFound):
        await bench.run(model="nobody", prompts=(TextPrompt("x" * 10_000),))


async def test_a_huge_prompt_is_refused_before_tokenising(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(text: str, *, add_special_tokens: bool) -> list[int]:
        raise AssertionError("tokenised")

    bench.limits = LimitsConfig(max_prompt_bytes=100)
    monkeypatch.setattr(bench.tokenizer, "encode", encode)
    with pytest.raises(InvalidRequest, match="101 bytes"):
        await bench.run(prompts=(TextPrompt("x" * 101),))


async def test_what_cannot_fit_is_refused_before_tokenising(
    bench: Bench, real: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(*arguments: object, **options: object) -> list[int]:
        raise AssertionError("tokenised")

    bench.tokenizer = real
    monkeypatch.setattr(real, "encode", encode)
    with pytest.raises(ContextLengthExceeded, match="at least"):
        await bench.run(prompts=(TextPrompt("x" * 300_000),))


async def test_long_prompts_are_tokenised_off_the_loop(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    threads: list[str] = []
    encode = bench.tokenizer.encode

    def record(text: str, *, add_special_tokens: bool) -> list[int]:
        threads.append(threading.current_thread().name)
        return encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(bench.tokenizer, "encode", record)
    bench.engine.info = make_info(max_model_len=100_000)
    await bench.run()
    await bench.run(prompts=(TextPrompt("x" * 50_000),))
    assert threads[0] == threading.main_thread().name
    assert threads[1] != threading.main_thread().name


async def test_seeds_are_the_callers_or_random(bench: Bench) -> None:
    for seed in (7, None, None):
        await bench.run(seed=seed)
    seeds = [r.sampling.seed for r in bench.engine.requests]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)


async def test_prompts_of_one_call_have_different_seeds(bench: Bench) -> None:
    await bench.run(prompts=(TextPrompt("a"), TextPrompt("b")), seed=2**63 - 1)
    assert sorted(r.sampling.seed for r in bench.engine.requests) == [0, 2**63 - 1]


async def test_prompt_scores_come_once_and_before_the_text(bench: Bench) -> None:
    events = await bench.run(sampling=SamplingParams(1, num_prompt_logprobs=1), n=2)
    scores = [event for event in events if isinstance(event, PromptScores)]
    assert len(scores) == 1
    assert len(scores[0].scores) == 1
    assert events.index(scores[0]) < next(
        i for i, event in enumerate(events) if isinstance(event, TextDelta)
    )


async def test_an_engine_that_is_not_ready_refuses(bench: Bench) -> None:
    bench.engine.is_ready = False
    with pytest.raises(EngineUnavailable):
        await bench.run()
