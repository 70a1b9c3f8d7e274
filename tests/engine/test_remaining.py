"""What is left of a request's tokens after each of its events."""

from __future__ import annotations

from tests.support.engines import greedy_request

from polyadapt.engine.remaining import Remaining
from polyadapt.types import Finished, Started, Tokens


def test_the_prompt_is_done_with_the_first_event_that_tells():
    remaining = Remaining(greedy_request("r", [1, 2, 3]), 3 + 4)
    assert remaining.take(Started("r", ())) == 0
    assert remaining.take(Tokens("r", 0, (9,))) == 3 + 1
    assert remaining.take(Tokens("r", 0, (9, 9))) == 2
    assert remaining.take_all() == 1
    assert remaining.take_all() == 0


def test_a_request_without_tokens_has_done_its_prompt_at_its_end():
    remaining = Remaining(greedy_request("r", [1, 2, 3]), 3)
    assert remaining.take(Finished("r")) == 3
    assert remaining.take_all() == 0


def test_an_answer_longer_than_expected_takes_no_more_than_was_left():
    remaining = Remaining(greedy_request("r", [1, 2, 3]), 3 + 2)
    assert remaining.take(Tokens("r", 0, (9, 9, 9, 9))) == 5
    assert remaining.take(Tokens("r", 0, (9,))) == 0
