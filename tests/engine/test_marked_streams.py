"""Marked requests through the engine: neither neighbours nor memory nor guesses nor what a device
still has in flight change a marked text, and a reader finds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.engine.fake_device import overlapping
from tests.oracle import adapters, tiny
from tests.support.engines import Driver, Transcript, greedy_request, new_engine, put_blob
from transformers import LlamaConfig, WatermarkDetector, WatermarkingConfig

from polyadapt.engine.output import Submit
from polyadapt.engine.wire import decode_command, encode_command
from polyadapt.types import AdapterId, AppliedAdapter, MarkSettings, Request, TextMark, Tokens
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.text import detect, scheme_of, user_key
from polyadapt.watermark.text_compatible import hashing_key_of
from polyadapt.watermark.text_reading import read_text

MASTER = SecretKey(bytes(range(32)))
KGW = MarkSettings("kgw", 2, bias=4.0)
SYNTHID = MarkSettings("synthid", 3, depth=8)
GUMBEL = MarkSettings("gumbel", 2)
LEFTHASH = MarkSettings("kgw", 1, bias=4.0, is_lefthash=True)
ALL = [KGW, SYNTHID, GUMBEL, LEFTHASH, None]


@pytest.fixture(scope="module")
def model_dir(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def blob_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blobs")


@pytest.fixture(scope="module")
def adapter(
    model_dir: Path, blob_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> AdapterId:
    root = tmp_path_factory.mktemp("adapters")
    return put_blob(blob_root, adapters.make_lora(model_dir, root / "a", 4, seed=1), "a")


@pytest.fixture
def start(model_dir, blob_root):
    """A function that makes a driver over a new engine; its loader thread ends with the test."""
    made: list[Driver] = []

    def make(*, is_overlapping: bool = False, **settings: Any) -> Driver:
        engine = new_engine(model_dir, blob_root, **settings)
        made.append(Driver(overlapping(engine, 3) if is_overlapping else engine))
        return made[-1]

    yield make
    for driver in made:
        driver.engine.pool.close()


def marked(request: Request, settings: MarkSettings | None, user: str = "ann") -> Request:
    if settings is None:
        return request
    first, second = user_key(MASTER, user).tolist()
    return replace(request, text_mark=TextMark(settings, (first, second)))


def texts(transcripts: dict[str, Transcript]) -> dict[str, dict[int, list[int]]]:
    return {name: found.token_ids for name, found in transcripts.items()}


def requests_of_all_kinds(adapter: AdapterId) -> list[Request]:
    """Every scheme and none, by users of their own, under every kind of sampling."""
    options: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "num_logprobs": 2},
        {"temperature": 1.2, "top_k": 30, "frequency_penalty": 0.4},
        {"temperature": 0.0, "min_tokens": 6, "ignore_eos": False},
    ]
    made = []
    for i, settings in enumerate(ALL):
        for j, sampling in enumerate(options):
            number = len(options) * i + j
            prompt = tiny.prompt_ids(5 + number, seed=number)
            request = greedy_request(f"r{number}", prompt, None, 24, seed=number, **sampling)
            used = (AppliedAdapter(adapter),) if number % 2 else ()
            request = replace(request, adapters=used, n=1 + (number % 3 == 0))
            made.append(marked(request, settings, f"user-{number % 5}"))
    return made


def test_in_one_batch_everybody_gets_what_each_gets_alone(start, adapter):
    requests = requests_of_all_kinds(adapter)
    together = texts(start(exact=True).run(*requests))
    alone = start(exact=True)
    for request in requests:
        assert texts(alone.run(request)) == {request.id: together[request.id]}


def test_unmarked_requests_are_the_same_bit_for_bit_beside_marked_ones(start, adapter):
    requests = requests_of_all_kinds(adapter)
    plain = [replace(request, text_mark=None) for request in requests]
    mixed = [request if i % 2 else plain[i] for i, request in enumerate(requests)]
    without = start(exact=True).run(*plain)
    beside = start(exact=True).run(*mixed)
    for i, request in enumerate(requests):
        events = [
            [event for event in run[request.id].events if isinstance(event, Tokens)]
            for run in (without, beside)
        ]
        if i % 2 == 0:
            assert events[0] == events[1]
    num_changed = sum(
        without[r.id].token_ids != beside[r.id].token_ids
        for i, r in enumerate(requests)
        if i % 2 and r.text_mark
    )
    assert num_changed == 6, (
        "all but greedy draws of two schemes; marks that change nothing would pass all of this"
    )


def test_preemption_goes_on_with_the_same_context(start, adapter):
    requests = requests_of_all_kinds(adapter)
    roomy = texts(start().run(*requests))
    tight = start(kv_cache_bytes=28 * 2 * 2 * 2 * 16 * 4 * 16)
    assert texts(tight.run(*requests)) == roomy
    assert tight.engine.counters["preemptions"] > 2


@pytest.mark.parametrize("settings", [KGW, SYNTHID, GUMBEL])
def test_guesses_change_no_marked_text(start, settings):
    prompt = tiny.prompt_ids(5, seed=3) * 5
    bias = tuple((token_id, 30.0) for token_id in tiny.prompt_ids(4, seed=99))
    requests = [
        marked(greedy_request(f"r{i}", prompt, None, 60, seed=i, temperature=t, logit_bias=b), s)
        for i, (t, b, s) in enumerate([
            (0.0, bias, settings), (0.7, bias, settings), (1.0, (), settings), (0.7, bias, None),
        ])
    ]  # fmt: skip
    plain = texts(start().run(*requests))
    driver = start()
    guessed = [replace(request, speculative_tokens=8) for request in requests]
    assert texts(driver.run(*guessed)) == plain
    assert driver.engine.counters["spec_accepted_tokens"] > 20


def test_cached_prompts_change_no_marked_text(start):
    prompt = tiny.prompt_ids(40, seed=1)
    request = marked(greedy_request("r", prompt, None, 20, seed=1, temperature=1.0), KGW)
    driver = start()
    first = driver.run(request)["r"].tokens
    again = driver.run(replace(request, id="again"))["again"].tokens
    assert first == again
    assert driver.engine.counters["prefix_hit_tokens"] > 0


@pytest.mark.parametrize("has_lefthash", [False, True])
def test_a_device_with_steps_in_flight_marks_the_same(start, adapter, has_lefthash):
    requests = [
        request
        for request in requests_of_all_kinds(adapter)
        if has_lefthash or not (request.text_mark and request.text_mark.settings.is_lefthash)
    ]
    expected = texts(start().run(*requests))
    driver = start(is_overlapping=True)
    assert texts(driver.run(*requests)) == expected
    # A green list of that form is made by torch's generator on the host: nothing is in flight.
    assert (driver.engine.counters["drained_by_watermark"] > 10) is not has_lefthash


@pytest.mark.parametrize("settings", [KGW, SYNTHID, GUMBEL])
def test_what_was_served_is_traced_to_its_user(start, settings):
    users = [f"user-{i}" for i in range(200)]
    requests = [
        marked(greedy_request(user, tiny.prompt_ids(6, seed=i), None, 150, seed=i, temperature=1.0),
               settings, user)
        for i, user in enumerate(users[:3])
    ]  # fmt: skip
    unmarked = greedy_request("nobody", tiny.prompt_ids(6, seed=7), None, 150, temperature=1.0)
    found = start().run(*requests, unmarked)
    for user in users[:3]:
        trace = read_text(MASTER, [settings], users, found[user].tokens)
        assert [entry.user for entry in trace.accused] == [user]
        assert (
            detect(scheme_of(settings), user_key(MASTER, user), found[user].tokens).p_value < 1e-6
        )
    assert read_text(MASTER, [settings], users, found["nobody"].tokens).is_nobody


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_transformers_detector_finds_what_was_served_in_the_compatible_form(start, temperature):
    num_vocab = start().engine.info.base.vocab_size
    made = {}
    for user in ("ann", "bob", "nobody"):
        prompt = tiny.prompt_ids(6, seed=5)
        request = greedy_request(user, prompt, None, 200, seed=3, temperature=temperature)
        made[user] = marked(request, None if user == "nobody" else LEFTHASH, user)
    found = start().run(*made.values())
    first, second = user_key(MASTER, "ann").tolist()
    detector = WatermarkDetector(
        LlamaConfig(vocab_size=num_vocab, bos_token_id=num_vocab - 1),
        "cpu",
        WatermarkingConfig(
            bias=4.0, hashing_key=hashing_key_of((first, second)), seeding_scheme="lefthash"
        ),
        ignore_repeated_ngrams=True,
    )
    z = {
        user: float(detector(torch.tensor([found[user].tokens]), return_dict=True).z_score[0])
        for user in made
    }
    assert z["ann"] > 4.0
    assert max(z["bob"], z["nobody"]) < 4.0
    assert np.isfinite(list(z.values())).all()


def test_a_mark_crosses_the_wire_whole():
    request = marked(greedy_request("r", [1, 2], None, 3), SYNTHID)
    sent = encode_command(Submit(request))
    received = decode_command(sent)
    assert isinstance(received, Submit)
    assert received.request == request
