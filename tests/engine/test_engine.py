"""The engine's life on a tiny model: cancel, preempt, evict, time out, fail alone, lose nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.oracle import adapters, peft_oracle, tiny
from tests.support.engines import Driver, LogitsRecorder, greedy_request, new_engine, put_blob

from polyadapt.engine.output import Call
from polyadapt.types import (
    AdapterId,
    AppliedAdapter,
    Failed,
    Finished,
    PromptScored,
    Request,
    Started,
    Tokens,
)

NUM_ADAPTERS = 8


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
        for i in range(NUM_ADAPTERS)
    ]


@pytest.fixture
def start(model_dir, blob_root):
    """A function that makes a driver over a new engine; its loader thread ends with the test."""
    made: list[Driver] = []

    def make(**settings) -> Driver:
        made.append(Driver(new_engine(model_dir, blob_root, **settings)))
        return made[-1]

    yield make
    for driver in made:
        driver.engine.pool.close()


def ids(number: int, length: int = 12) -> list[int]:
    return tiny.prompt_ids(length, seed=number)


def test_events_come_in_order_and_end_once(start, identities):
    request = greedy_request("r", ids(0), identities[0], 3, num_prompt_logprobs=1, num_logprobs=2)
    (transcript,) = start().run(request).values()
    kinds = [type(event) for event in transcript.events]
    assert kinds == [Started, PromptScored, Tokens, Tokens, Tokens, Finished]
    started, scored, first = transcript.events[:3]
    assert started.served[0].adapter == identities[0]
    assert started.served[0].tier == "store"
    assert len(scored.logprobs) == len(ids(0)) - 1
    assert [p.token_id for p in scored.logprobs] == ids(0)[1:]
    assert len(first.logprobs[0].top) == 2


def test_a_fault_in_sampling_fails_its_request_alone(start, monkeypatch):
    from polyadapt.engine import engine as engine_module

    def faulty(logits, sequence, end_token_ids):
        if sequence.group.request.id == "r1":
            raise IndexError("injected")
        return inner(logits, sequence, end_token_ids)

    def broken(logits, sequences):
        raise IndexError("injected")

    inner = engine_module.sample
    monkeypatch.setattr(engine_module, "sample", faulty)
    monkeypatch.setattr(engine_module, "sample_rows", broken)
    driver = start()
    transcripts = driver.run(*(greedy_request(f"r{i}", ids(i), None, 3) for i in range(3)))
    last = transcripts["r1"].last
    assert isinstance(last, Failed)
    assert last.code == "internal_error"
    assert transcripts["r0"].last == Finished("r0")
    assert driver.engine.counters["isolated_samplings"] > 0


def test_plain_rows_are_drawn_together_and_the_others_alone(start):
    driver = start()
    driver.run(
        greedy_request("a", ids(0), None, 4),
        greedy_request("b", ids(1), None, 4, temperature=0.7, top_p=0.9),
        greedy_request("c", ids(2), None, 4, num_logprobs=1),
        greedy_request("d", ids(3), None, 4, num_prompt_logprobs=0),
    )
    drawn = driver.engine.counters["rows_drawn_together"]
    # Behind the scored prompt of the first step nothing is drawn together.
    assert 4 + 4 + 3 <= drawn <= 4 + 4 + 4


def test_a_snapshot_comes_with_answers_and_before_a_rest_and_else_now_and_then(start, monkeypatch):
    from polyadapt.engine import engine as engine_module
    from polyadapt.engine.output import Submit

    monkeypatch.setattr(engine_module, "_STATS_INTERVAL_S", 1e9)
    engine = start().engine
    engine.execute(Submit(greedy_request("r", ids(0), None, 4)))
    outputs = []
    while engine.has_work:
        outputs.append(engine.step())
    assert [output.stats is not None for output in outputs] == [True, False, False, True]
    assert outputs[-1].stats.num_running == 0
    engine.execute(Submit(greedy_request("s", ids(0), None, 4)))
    engine.execute(Call(1, "cancel_adapter", "sha256:none"))
    answered = engine.step()
    assert answered.replies
    assert answered.stats is not None
    assert engine.step().stats is None
    monkeypatch.setattr(engine_module, "_STATS_INTERVAL_S", 0.0)
    assert engine.step().stats is not None


def test_a_preemption_in_the_middle_of_a_scored_prompt_scores_it_once(start):
    driver = start(max_num_batched_tokens=16)
    driver.submit(greedy_request("r", ids(0, 50), None, 2, num_prompt_logprobs=0))
    driver.step()
    (sequence,) = driver.engine.scheduler.running
    assert len(sequence.prompt_logprobs) == 16
    driver.engine.scheduler._preempt(sequence)
    driver.run()
    (scored,) = [e for e in driver.transcripts["r"].events if isinstance(e, PromptScored)]
    assert [p.token_id for p in scored.logprobs] == ids(0, 50)[1:]


def test_prompt_logprobs_survive_chunks(start):
    request = greedy_request("r", ids(0, 50), None, 2, num_prompt_logprobs=0)
    whole = start().run(request)["r"].events[1]
    chunked = start(max_num_batched_tokens=16).run(request)["r"].events[1]
    assert [p.token_id for p in chunked.logprobs] == [p.token_id for p in whole.logprobs]
    assert [p.logprob for p in chunked.logprobs] == pytest.approx(
        [p.logprob for p in whole.logprobs], abs=1e-4
    )


def test_a_stop_token_ends_a_sequence_and_ignore_eos_does_not(start):
    free = start().run(greedy_request("r", ids(1), None, 12))["r"].tokens
    stop = free[3]
    first = free.index(stop)
    request = greedy_request("r", ids(1), None, 12, stop_token_ids=(stop,))
    transcript = start().run(request)["r"]
    assert transcript.tokens == free[: first + 1]
    last = [e for e in transcript.events if isinstance(e, Tokens)][-1]
    assert (last.finish_reason, last.stop_token_id) == ("stop", stop)


def test_max_tokens_and_the_context_end_a_sequence_with_length(start):
    transcript = start(max_model_len=20).run(greedy_request("r", ids(1, 15), None, 100))["r"]
    assert len(transcript.tokens) == 5
    last = [e for e in transcript.events if isinstance(e, Tokens)][-1]
    assert last.finish_reason == "length"


def test_n_sequences_differ_and_repeat_with_the_seed(start):
    request = replace(greedy_request("r", ids(2), None, 6, temperature=1.0, seed=9), n=3)
    first = start().run(request)["r"].token_ids
    again = start(max_num_seqs=1).run(request)["r"].token_ids
    assert first == again, "neither the batch nor its size changes a seeded answer"
    assert len({tuple(tokens) for tokens in first.values()}) == 3


def test_more_adapters_than_fit_at_once_are_all_served_rightly(start, identities, model_dir):
    one = new_engine_bytes(start, identities[0])
    driver = start(max_adapter_bytes=int(one * 2.5))
    requests = [greedy_request(f"r{i}", ids(i), identities[i % NUM_ADAPTERS], 4) for i in range(24)]
    transcripts = driver.run(*requests)
    assert driver.engine.counters["adapter_evictions"] > 0
    for request in requests:
        alone = start().run(replace(request, id="alone"))["alone"].tokens
        assert transcripts[request.id].tokens == alone


def test_an_overdue_request_gets_the_room_of_those_behind_it(start, identities, monkeypatch):
    from polyadapt.engine import scheduler

    monkeypatch.setattr(scheduler, "MAX_OVERTAKEN", 3)
    one = new_engine_bytes(start, identities[0])
    driver = start(max_adapter_bytes=2 * one, max_num_seqs=3)
    driver.load(*identities[:2])
    driver.call(Call(9, "prepare", identities[2].digest))
    while driver.engine.has_work:
        driver.step_or_wait()
    running = [greedy_request(f"runs{i}", ids(i), identities[i], 8) for i in range(2)]
    driver.submit(*running)
    driver.step()
    driver.submit(greedy_request("cold", ids(2), identities[2], 2))
    behind = [greedy_request(f"r{i}", ids(i), identities[i % 2], 4) for i in range(10)]
    driver.run(*behind, max_steps=500)
    assert driver.engine.counters["overdue_requests"] > 0
    assert driver.transcripts["cold"].last == Finished("cold")


def test_a_request_whose_adapters_never_fit_together_fails_alone(start, identities):
    one = new_engine_bytes(start, identities[0])
    driver = start(max_adapter_bytes=one * 3 // 2)
    both = tuple(AppliedAdapter(identity) for identity in identities[:2])
    transcripts = driver.run(
        greedy_request("r0", ids(0), identities[0], 2),
        replace(greedy_request("both", ids(1), None, 2), adapters=both),
        greedy_request("r1", ids(1), identities[1], 2),
        max_steps=500,
    )
    failed = transcripts["both"].last
    assert isinstance(failed, Failed)
    assert failed.code == "invalid_request"
    assert f"{2 * one} bytes" in failed.message
    for name in ("r0", "r1"):
        assert transcripts[name].last == Finished(name)


def test_requests_that_each_hold_what_another_needs_are_served_in_turn(start, identities):
    one = new_engine_bytes(start, identities[0])
    driver = start(max_adapter_bytes=2 * one)
    driver.load(*identities[:2])

    def request(name: str, *chosen: int) -> Request:
        adapters = tuple(AppliedAdapter(identities[i]) for i in chosen)
        return replace(greedy_request(name, ids(1), None, 2), adapters=adapters)

    # Idle 0 and 1 are each wanted by a request that lacks its other adapter.
    transcripts = driver.run(
        request("r1", 2), request("r2", 0, 2), request("r3", 1, 2), max_steps=500
    )
    for name, transcript in transcripts.items():
        assert transcript.last == Finished(name)


def new_engine_bytes(start, identity: AdapterId) -> int:
    """Device bytes of one adapter."""
    driver = start()
    driver.load(identity)
    return driver.engine.pool.nbytes_used


def test_preemption_changes_no_answer_and_leaks_no_page(start, identities):
    requests = [
        greedy_request(f"r{i}", ids(i, 20), identities[i % 3], 40, temperature=0.7, seed=i)
        for i in range(6)
    ]
    expected = {r.id: start().run(r)[r.id].tokens for r in requests}
    page_bytes = 2 * 2 * 2 * 16 * 4 * 16  # layers, k and v, kv heads, dim, float32, tokens a page
    driver = start(kv_cache_bytes=9 * page_bytes, max_model_len=60)
    transcripts = driver.run(*requests)
    assert driver.engine.counters["preemptions"] > 0
    assert {r.id: transcripts[r.id].tokens for r in requests} == expected
    assert driver.engine.scheduler.pages.num_used == 0


def test_cancel_frees_pages_and_leases_at_the_next_step(start, identities):
    driver = start()
    driver.load(identities[0])
    driver.submit(
        greedy_request("gone", ids(0, 40), identities[0], 400),
        greedy_request("stays", ids(1), None, 8),
    )
    driver.step()
    used = driver.engine.stats().num_used_pages
    driver.cancel("gone")
    driver.step()
    stats = driver.engine.stats()
    assert stats.num_used_pages < used
    assert [r.num_leases for r in driver.residencies.values()] == [0]
    assert driver.transcripts["gone"].last == Finished("gone", is_cancelled=True)
    driver.run()
    assert driver.transcripts["stays"].last == Finished("stays")


def test_cancel_in_the_queue_during_a_load_and_after_the_end_are_harmless(start, identities):
    driver = start(max_num_seqs=1)
    driver.submit(
        greedy_request("first", ids(0), None, 3),
        greedy_request("queued", ids(1), identities[1], 3),
    )
    driver.step()
    driver.cancel("queued")
    driver.run()
    driver.cancel("first")
    driver.cancel("never")
    driver.run()
    assert driver.transcripts["queued"].last == Finished("queued", is_cancelled=True)


def test_a_timeout_fails_its_request_alone(start):
    driver = start()
    slow = replace(greedy_request("slow", ids(0), None, 400), timeout_s=0.02)
    driver.submit(slow, greedy_request("other", ids(1), None, 5))
    driver.step()
    time.sleep(0.03)
    driver.run()
    last = driver.transcripts["slow"].last
    assert isinstance(last, Failed)
    assert last.code == "request_timeout"
    assert driver.transcripts["other"].last == Finished("other")


def test_an_unreadable_adapter_fails_only_its_requests_and_can_come_back(
    start, identities, blob_root
):
    lost = AdapterId("lost", 1, "sha256:" + "0" * 64)
    driver = start()
    transcripts = driver.run(
        greedy_request("lost0", ids(0), lost, 3),
        greedy_request("lost1", ids(0), lost, 3),
        greedy_request("fine", ids(0), identities[0], 3),
    )
    for name in ("lost0", "lost1"):
        last = transcripts[name].last
        assert isinstance(last, Failed)
        assert last.code == "adapter_unavailable"
    assert transcripts["fine"].last == Finished("fine")


def test_a_forward_that_raises_for_one_request_fails_it_alone(start, monkeypatch):
    driver = start()
    requests = [greedy_request(f"r{i}", ids(i), None, 5) for i in range(4)]
    expected = {r.id: start().run(r)[r.id].tokens for r in requests}
    run = driver.engine.runner.run

    def poisoned(batch):
        if any(rows.sequence.group.request.id == "r2" for rows in batch):
            raise RuntimeError("injected")
        return run(batch)

    monkeypatch.setattr(driver.engine.runner, "run", poisoned)
    transcripts = driver.run(*requests)
    assert driver.engine.counters["isolated_steps"] > 0
    last = transcripts["r2"].last
    assert isinstance(last, Failed)
    assert last.code == "internal_error"
    assert "injected" not in last.message
    for name in ("r0", "r1", "r3"):
        assert transcripts[name].tokens == expected[name]


def test_non_finite_logits_fail_their_request_and_leave_neighbours_bit_identical(start):
    requests = [greedy_request(f"r{i}", ids(i), None, 5, num_logprobs=0) for i in range(3)]

    def run(is_poisoned: bool) -> dict:
        driver = start()
        inner = driver.engine.runner.run

        def poisoned(batch):
            results = inner(batch)
            for rows, logits in zip(batch, results, strict=True):
                if rows.sequence.group.request.id == "r1":
                    with torch.inference_mode():
                        logits[:, 0] = float("nan")
            return results

        if is_poisoned:
            driver.engine.runner.run = poisoned
        return driver.run(*requests)

    clean, poisoned = run(False), run(True)
    last = poisoned["r1"].last
    assert isinstance(last, Failed)
    assert last.code == "numerical_error"
    for name in ("r0", "r2"):
        assert poisoned[name].events == clean[name].events


def test_unload_lets_running_requests_finish_and_cancel_adapter_ends_them(start, identities):
    driver = start()
    driver.load(identities[0], identities[1])
    driver.submit(
        greedy_request("a", ids(0), identities[0], 10),
        greedy_request("b", ids(0), identities[1], 200),
    )
    driver.step()
    driver.call(Call(100, "unload", identities[0].digest))
    driver.call(Call(101, "unload", identities[1].digest))
    driver.step()
    assert not [r for r in driver.replies if r.id >= 100]
    driver.call(Call(102, "cancel_adapter", identities[1].digest))
    driver.run()
    assert len(driver.transcripts["a"].tokens) == 10
    last = driver.transcripts["b"].last
    assert isinstance(last, Failed)
    assert last.code == "adapter_deleted"
    replies = {r.id: r for r in driver.replies if r.id >= 100}
    assert replies[102].count == 1
    assert set(replies) == {100, 101, 102}
    assert not driver.residencies


def test_a_rejected_adapter_tells_every_problem_to_whoever_prepares_it(start, tmp_path, tiny_model):
    other = adapters.make_lora(tiny_model("gpt2"), tmp_path / "wrong", 4)
    driver = start()
    root = driver.engine.pool._read._blobs._blobs.parent  # the reader's own store
    wrong = put_blob(root, other, "wrong")
    driver.call(Call(1, "prepare", wrong.digest))
    driver.run()
    (reply,) = driver.replies
    assert reply.error_code == "adapter_rejected"
    assert len(reply.problems) > 1


def test_two_lanes_of_one_request_equal_the_sum_of_both_adapters(start, identities, model_dir):
    """Composition reaches the engine as several adapters of a request: y + B1 A1 x + B2 A2 x."""
    driver = start()
    driver.load(identities[0], identities[1])
    recorder = LogitsRecorder(driver.engine)
    both = replace(
        greedy_request("both", ids(0, 30), None, 2, num_prompt_logprobs=0),
        adapters=(AppliedAdapter(identities[0], 0.5), AppliedAdapter(identities[1])),
    )
    driver.run(both, greedy_request("one", ids(1), identities[0], 2))
    seen = [*both.prompt_ids, *driver.transcripts["both"].tokens[:-1]]
    model = peft_oracle.load_base(model_dir)
    weights = {id(m): m for m in model.modules()}
    assert weights
    root = driver.engine.pool._read._blobs
    for identity, scale in ((identities[0], 0.5), (identities[1], 1.0)):
        _merge(model, root.path(identity.digest), scale)
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([seen]), use_cache=False).logits[0]
    peft_oracle.assert_matches(recorder.of("both"), expected)


@torch.no_grad()
def _merge(model: torch.nn.Module, directory: Path, scale: float) -> None:
    """Add scale * alpha/r * B A to each weight, by hand from the files."""
    import json

    from safetensors.torch import load_file

    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    for key, a in tensors.items():
        if ".lora_A." in key:
            path = key.removeprefix("base_model.model.").split(".lora_A.")[0]
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            delta = scale * config["lora_alpha"] / config["r"] * (b @ a)
            model.get_submodule(path).weight += delta


def test_a_plan_is_kept_while_the_same_sequences_go_on_and_made_anew_for_others(
    start, identities, monkeypatch
):
    from polyadapt.engine import runner as runner_module

    made = []

    def counted(sequences, *rest, **options):
        made.append(len(sequences))
        return inner(sequences, *rest, **options)

    inner = runner_module._plans
    monkeypatch.setattr(runner_module, "_plans", counted)
    requests = [greedy_request(f"r{i}", ids(i), identities[i], 4 + 3 * i) for i in range(3)]
    alone = {r.id: start().run(r)[r.id].tokens for r in requests}
    made.clear()
    driver = start()
    driver.load(*identities[:3])
    together = driver.run(*requests)
    assert {name: transcript.tokens for name, transcript in together.items()} == alone
    # The prompts, then three, two and one of them decoding.
    assert made == [3, 3, 2, 1]


def test_a_prepared_adapter_is_in_the_very_next_step(start, identities):
    driver = start()
    driver.call(Call(1, "prepare", identities[0].digest))
    while driver.engine.has_work:
        driver.step_or_wait()
    driver.submit(greedy_request("cold", ids(1), identities[0], 2))
    driver.step()
    assert driver.rows_per_step[-1] == 12, "the copy was waited for"
    assert driver.engine.counters["adapter_loads_waited"] == 1
    driver.run()
    assert driver.engine.counters["adapter_loads_overlapped"] == 0


def test_a_step_says_nothing_of_adapters_that_merely_lie_there(start, identities):
    driver = start()
    driver.load(*identities)
    assert len(driver.residencies) == NUM_ADAPTERS
    driver.submit(greedy_request("r", ids(1), identities[3], 4))
    told = [driver.engine.step().residencies for _ in range(4)]
    assert [[r.digest for r in each] for each in told] == [
        [identities[3].digest], [], [], [identities[3].digest]
    ]  # fmt: skip


def test_a_full_batch_does_not_keep_the_queues_adapters_cold(start, identities):
    driver = start(max_num_seqs=1)
    driver.load(identities[0])
    driver.submit(greedy_request("runs", ids(1), identities[0], 400))
    driver.submit(greedy_request("waits", ids(2), identities[1], 2))
    while identities[1].digest not in driver.residencies or (
        driver.residencies[identities[1].digest].tier != "device"
    ):
        driver.step_or_wait()
        assert Finished("runs") not in driver.transcripts["runs"].events, "too late"
    assert not driver.transcripts["waits"].events
    driver.run()
