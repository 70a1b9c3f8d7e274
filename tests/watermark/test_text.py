"""Text marks: what is favoured, whose it is, and that nobody's is nobody's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.prf import spread
from polyadapt.watermark.statistics import binomial_tail
from polyadapt.watermark.text import (
    GreenList,
    Tournament,
    context_seeds,
    detect,
    distinct_grams,
    trace_text,
    user_key,
)

MASTER = SecretKey(bytes(range(32)))
USERS = [f"user-{i}" for i in range(300)]
VOCABULARY = 500
GREEN, TOURNAMENT = GreenList(context_width=2), Tournament(depth=20, context_width=2)
SCHEMES = [GREEN, TOURNAMENT]


def write(scheme, key: np.ndarray | None, num_tokens: int, seed: int) -> list[int]:
    """Text of a model that gives every token of its own Zipf-like law, marked with the key."""
    rng = np.random.default_rng(seed)
    logits = -np.log(np.arange(1, VOCABULARY + 1)) * 0.7
    tokens = rng.integers(0, VOCABULARY, 2).tolist()
    while len(tokens) < num_tokens:
        row = logits[None]
        if key is not None:
            seeds = context_seeds(key[None], np.array([tokens[-2:]]))
            if isinstance(scheme, GreenList):
                row = scheme.raise_logits(row, seeds)
        p = np.exp(row - row.max())
        p /= p.sum()
        if key is not None and isinstance(scheme, Tournament):
            p = scheme.reshape(p, seeds)
        tokens.append(int(rng.choice(VOCABULARY, p=p[0] / p[0].sum())))
    return tokens


def test_a_users_key_is_fixed_and_hangs_on_master_user_and_version():
    key = user_key(MASTER, "alice")
    assert key.tolist() == GOLDEN_KEY
    others = [
        user_key(SecretKey(bytes(32)), "alice"),
        user_key(MASTER, "alicf"),
        user_key(MASTER, "alice", key_version=2),
    ]
    assert all((other != key).any() for other in others)
    with pytest.raises(InvalidRequest, match="empty"):
        user_key(MASTER, "")


GOLDEN_KEY = [-6578576991941016267, -6791333486869636927]


def test_a_green_list_is_its_share_of_the_vocabulary_and_differs_by_context_and_key():
    scheme = GreenList(ratio=0.25, bias=2.0)
    keys = np.stack([user_key(MASTER, user) for user in USERS[:40]])
    seeds = context_seeds(keys, np.tile([5, 6], (40, 1)))
    raised = scheme.raise_logits(np.zeros((40, 2000)), seeds)
    assert set(np.unique(raised)) == {0.0, 2.0}
    share = (raised > 0).mean()
    assert share == pytest.approx(0.25, abs=4.5 * math.sqrt(0.25 * 0.75 / 80_000))
    assert len({row.tobytes() for row in raised}) == 40
    assert scheme.rate == 0.25


def test_the_favoured_tokens_are_what_the_detector_counts():
    seeds = context_seeds(user_key(MASTER, "ann")[None], np.array([[5, 6]]))
    words = spread(seeds, np.arange(64))
    raised = GREEN.raise_logits(np.zeros((1, 64)), seeds)[0]
    assert (GREEN.count(words) == (raised > 0)).all()
    coins = [[int(word) >> layer & 1 for layer in range(20)] for word in words]
    assert TOURNAMENT.count(words).tolist() == [sum(row) for row in coins]


def test_a_tournament_is_the_formula_written_out():
    p = np.random.default_rng(1).dirichlet(np.ones(6), 1)
    seeds = np.array([77])
    words = spread(seeds[:, None], np.arange(6)[None])[0]
    expected = p[0].copy()
    for layer in range(20):
        g = [int(word) >> layer & 1 for word in words]
        mean = sum(a * b for a, b in zip(g, expected, strict=True))
        expected = np.array([a * (1 + b - mean) for a, b in zip(expected, g, strict=True)])
    assert TOURNAMENT.reshape(p, seeds)[0] == pytest.approx(expected, abs=1e-12)


def test_over_all_keys_a_tournament_gives_the_models_own_distribution():
    p = np.random.default_rng(2).dirichlet(np.ones(8), 1)
    found = Tournament(depth=5).reshape(np.repeat(p, 20_000, 0), np.arange(20_000) * 977)
    assert found.sum(axis=1) == pytest.approx(np.ones(20_000))
    assert np.abs(found.mean(axis=0) - p[0]).max() < 0.012
    assert found.max(axis=1).mean() > p.max() + 0.1  # each single one is far from it


@pytest.mark.parametrize("scheme", SCHEMES, ids=["green list", "tournament"])
def test_the_writer_is_named_among_all_users_and_nobody_else(scheme):
    for seed, user in enumerate(("user-3", "user-250")):
        tokens = write(scheme, user_key(MASTER, user), 220, seed)
        found = trace_text(scheme, MASTER, USERS, tokens)
        assert [entry.user for entry in found.accused] == [user]
        assert found.ranked[0].reading == detect(scheme, user_key(MASTER, user), tokens)
        assert found.ranked[0].reading.z > 6
    unmarked = trace_text(scheme, MASTER, USERS, write(scheme, None, 220, 9))
    assert unmarked.is_nobody
    stranger = write(scheme, user_key(SecretKey(bytes(32)), "user-3"), 220, 10)
    assert trace_text(scheme, MASTER, USERS, stranger).is_nobody


@pytest.mark.parametrize("scheme", SCHEMES, ids=["green list", "tournament"])
def test_p_values_of_strangers_keys_are_exact(scheme):
    tokens = write(scheme, None, 120, 11)
    strangers = [f"stranger-{i}" for i in range(2000)]
    found = trace_text(scheme, MASTER, strangers, tokens, num_shown=2000)
    readings = [entry.reading for entry in found.ranked]
    p_values = np.array([reading.p_value for reading in readings])
    for alpha in (0.2, 0.05, 0.01):
        share = (p_values <= alpha).mean()
        assert share <= alpha + 3.3 * math.sqrt(alpha * (1 - alpha) / 2000)
        assert share > alpha / 3
    first = readings[0]
    assert first.p_value == binomial_tail(first.num_hits, first.num_coins, scheme.rate)
    spread_of_z = np.std([reading.z for reading in readings])
    assert spread_of_z == pytest.approx(1.0, abs=0.08)


def test_repetition_makes_a_text_nobodys():
    grams = distinct_grams([1, 2, 3] * 100, 2)
    assert sorted(map(tuple, grams.tolist())) == [(1, 2, 3), (2, 3, 1), (3, 1, 2)]
    assert trace_text(GREEN, MASTER, USERS, [1, 2, 3] * 100).is_nobody


def test_a_text_that_is_too_short_says_nothing():
    for tokens in ([], [1], [1, 2]):
        found = trace_text(GREEN, MASTER, USERS, tokens)
        assert found.is_nobody
        assert found.ranked[0].reading.p_value == 1.0
        assert found.ranked[0].reading.num_scored == 0


def test_many_users_are_compared_in_parts_without_a_difference(monkeypatch):
    from polyadapt.watermark import text

    tokens = write(GREEN, user_key(MASTER, "user-7"), 100, 5)
    whole = trace_text(GREEN, MASTER, USERS, tokens)
    monkeypatch.setattr(text, "_CHUNK", 1000)
    assert trace_text(GREEN, MASTER, USERS, tokens) == whole


@pytest.mark.parametrize(
    "make",
    [
        lambda: GreenList(ratio=0.0),
        lambda: GreenList(bias=-1.0),
        lambda: GreenList(context_width=0),
        lambda: Tournament(depth=33),
        lambda: Tournament(context_width=17),
        lambda: trace_text(GREEN, MASTER, [], [1, 2, 3]),
        lambda: trace_text(GREEN, MASTER, ["a", "a"], [1, 2, 3]),
        lambda: trace_text(GREEN, MASTER, ["a"], [1, 2, 3], alpha=1.0),
    ],
)
def test_what_means_nothing_is_refused(make):
    with pytest.raises(InvalidRequest):
        make()
