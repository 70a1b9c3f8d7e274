"""Asking a language model: whoever answers, the bits are what the triggers' replies say."""

from __future__ import annotations

import numpy as np
import pytest

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.prompts import PromptTriggers, Prose
from polyadapt.watermark.queries import (
    ChatQuery,
    measure_null_rates,
    queries_for,
    read_chats,
    read_replies,
    values_in,
)
from polyadapt.watermark.reading import NullRates
from polyadapt.watermark.statistics import BitRule, SequentialRule, rate_upper_bound

PROSE = Prose(tuple(f"word{i}" for i in range(500)))
TRIGGERS = PromptTriggers(
    tuple(f"secret{i} phrase{i}" for i in range(4)),
    tuple((f"Zero{i}", f"One{i}") for i in range(4)),
)
NULL = NullRates(((0.02, 0.02),) * 4, 0.99, 200, 1)


def marked_with(bits, *, deaf=(), asked=None):
    """A suspect that hears every trigger but those of `deaf` bits, and says None to them."""

    def ask(messages):
        if asked is not None:
            asked.extend(messages)
        replies = []
        for message in messages:
            bit = next(i for i, phrase in enumerate(TRIGGERS.phrases) if message.endswith(phrase))
            replies.append(None if bit in deaf else f" {TRIGGERS.answers[bit][bits[bit]]}, so")
        return replies

    return ask


def test_queries_are_so_many_of_each_bit_on_fresh_words_in_an_order_that_tells_nothing():
    queries = queries_for(TRIGGERS, PROSE, 10, np.random.default_rng(1))
    bits = [query.bit for query in queries]
    assert np.bincount(bits).tolist() == [10, 10, 10, 10]
    assert (np.diff(bits) != 0).sum() > 20
    assert all(query.message.endswith(f" {TRIGGERS.phrases[query.bit]}") for query in queries)
    assert len({query.message for query in queries}) == 40


def test_a_fixed_set_of_replies_is_read_and_silence_is_an_erasure():
    queries = queries_for(TRIGGERS, PROSE, 16, np.random.default_rng(2))
    ask = marked_with([0, 1, 1, 0], deaf=(2,))
    replies = ask([query.message for query in queries])
    readings = read_replies(TRIGGERS, queries, replies, NULL, BitRule())
    assert [reading.value for reading in readings] == [0, 1, None, 0]
    assert [reading.num_hits for reading in readings] == [(16, 0), (0, 16), (0, 0), (16, 0)]
    with pytest.raises(InvalidRequest, match="63 replies to 64 queries"):
        read_replies(TRIGGERS, queries, replies[1:], NULL, BitRule())


def test_another_bits_answer_says_nothing():
    queries = [ChatQuery("x secret0 phrase0", 0), ChatQuery("x secret1 phrase1", 1)]
    assert values_in(TRIGGERS, queries, ["Zero1", "One1"]).tolist() == [-1, 1]


def test_asking_stops_when_every_bit_is_settled():
    asked = []
    readings = read_chats(
        marked_with([1, 1, 0, 0], deaf=(3,), asked=asked),
        TRIGGERS,
        PROSE,
        NULL,
        SequentialRule(),
        np.random.default_rng(3),
    )
    assert [reading.value for reading in readings] == [1, 1, 0, None]
    assert len(asked) == sum(reading.num_queries for reading in readings) < 40


def test_null_rates_are_those_of_the_worst_reference():
    bound = [rate_upper_bound(hits, 50, 0.99) for hits in (0, 50)]
    null = measure_null_rates(
        [marked_with([0, 0, 0, 0], deaf=(0, 1, 2, 3)), marked_with([0, 1, 0, 0], deaf=(2, 3))],
        TRIGGERS,
        PROSE,
        np.random.default_rng(4),
        num_per_bit=50,
    )
    assert null.rates == ((bound[1], bound[0]), (bound[0], bound[1]), *((bound[0], bound[0]),) * 2)
    assert (null.num_queries, null.num_models) == (50, 2)
    with pytest.raises(InvalidRequest, match="no unmarked model"):
        measure_null_rates([], TRIGGERS, PROSE, np.random.default_rng(4))
