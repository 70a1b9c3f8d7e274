"""Guesses from the text itself: which occurrence counts, and what failures lead to."""

from __future__ import annotations

from polyadapt.engine.prompt_lookup import NgramIndex, PromptLookup


def new_lookup(prompt: list[int], max_length: int = 8) -> PromptLookup:
    return PromptLookup(NgramIndex.of_prompt(prompt), len(prompt), max_length)


def eager_lookup(prompt: list[int], max_length: int = 8) -> PromptLookup:
    """One whose guesses have been right so often that they have full length."""
    lookup = new_lookup(prompt, max_length)
    for _ in range(5):
        lookup.observe(1, 1)
    return lookup


def test_a_guess_is_what_followed_the_last_tokens():
    prompt = [1, 2, 3, 4, 5, 6, 7, 8]
    assert eager_lookup(prompt).propose([*prompt, 2, 3], 4) == (4, 5, 6, 7)
    assert eager_lookup(prompt).propose([*prompt, 9, 3], 4) == (), "one token is no match"
    assert eager_lookup(prompt).propose(prompt, 4) == (), "the end does not find itself"


def test_the_longest_match_wins_and_of_those_the_latest():
    prompt = [1, 2, 3, 10, 0, 9, 2, 3, 20, 0, 9, 2, 3, 30]
    assert eager_lookup(prompt).propose([*prompt, 7, 2, 3], 1) == (30,)
    assert eager_lookup(prompt).propose([*prompt, 1, 2, 3], 1) == (10,)
    own = [*prompt, 2, 3, 40, 8, 2, 3]
    assert eager_lookup(prompt).propose(own, 1) == (40,), "the output is newer than the prompt"


def test_a_short_period_fills_a_long_guess():
    prompt = [5, 6, 5, 6, 5, 6]
    assert eager_lookup(prompt).propose(prompt, 7) == (5, 6, 5, 6, 5, 6, 5)
    assert eager_lookup([4, 4, 4]).propose([4, 4, 4], 3) == (4, 4, 4)


def test_a_guess_is_bounded_by_the_limit_and_the_maximum():
    prompt = [1, 2] * 10
    assert len(eager_lookup(prompt, 3).propose(prompt, 9)) == 3
    assert len(eager_lookup(prompt, 3).propose(prompt, 2)) == 2
    assert eager_lookup(prompt).propose(prompt, 0) == ()
    assert eager_lookup(prompt).propose(prompt, -1) == ()


def test_guesses_grow_while_they_are_right_and_shrink_when_wrong():
    lookup = new_lookup([1, 2] * 40)
    lengths = []
    for num_accepted in (2, 4, 8, 3, 1):
        guess = lookup.propose([1, 2] * 40, 16)
        lengths.append(len(guess))
        lookup.observe(len(guess), num_accepted)
    assert lengths == [2, 4, 8, 8, 4]


def test_wrong_guesses_become_rare():
    """A text whose pairs repeat and never go on alike: few rows are lost to it."""
    lookup = new_lookup([1, 2])
    text = [1, 2]
    num_drafted = 0
    for number in range(1000):
        text += [1, 2] if number % 2 else [3 + number]
        guess = lookup.propose(text, 16)
        if guess:
            num_drafted += len(guess)
            lookup.observe(len(guess), 0)
    assert 0 < num_drafted < 1000 / 32


def test_only_the_end_of_a_long_prompt_is_indexed():
    prompt = [*range(10_000)]
    index = NgramIndex.of_prompt(prompt)
    assert len(index._behind) == 3 * 4096, "of each size one for every token"
    assert index.find((9997, 9998)) == 9999
    assert index.find((5902, 5903)) == 5904
    assert index.find((5901, 5902)) is None
    assert eager_lookup(prompt).propose([*prompt, 8000, 8001], 2) == (8002, 8003)


def test_sequences_of_one_prompt_share_its_index_and_keep_their_own():
    prompt = [1, 2, 3]
    index = NgramIndex.of_prompt(prompt)
    first, second = (PromptLookup(index, len(prompt), 4) for _ in range(2))
    assert first.propose([*prompt, 7, 8, 9, 7, 8], 4)[:1] == (9,)
    assert second.propose([*prompt, 5, 7, 8], 4) == ()
    assert second.propose([*prompt, 5, 7, 8, 1, 2], 1) == (3,)
