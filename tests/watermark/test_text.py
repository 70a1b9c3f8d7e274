"""Text marks: what is favoured, whose it is, and that nobody's is nobody's."""

from __future__ import annotations

import math

import numpy as np
import pytest

from polyadapt.errors import InvalidRequest
from polyadapt.types import MarkSettings
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.prf import spread
from polyadapt.watermark.statistics import binomial_tail
from polyadapt.watermark.text import (
    FLOOR,
    GreenList,
    Race,
    Tournament,
    context_seeds,
    detect,
    distinct_grams,
    raise_favoured,
    reshape_kept,
    scheme_of,
    user_key,
)
from polyadapt.watermark.text_reading import TextFinding, read_text

MASTER = SecretKey(bytes(range(32)))
USERS = [f"user-{i}" for i in range(300)]
VOCABULARY = 500
GREEN, TOURNAMENT = GreenList(context_width=2), Tournament(depth=20, context_width=2)
RACE = Race(context_width=2)
SCHEMES = [GREEN, TOURNAMENT, RACE]
NAMES = ["green list", "tournament", "race"]
SETTINGS = {
    GREEN: MarkSettings("kgw", 2),
    TOURNAMENT: MarkSettings("synthid", 2, depth=20),
    RACE: MarkSettings("gumbel", 2),
}


def trace(scheme, users: list[str], tokens: list[int], **options) -> TextFinding:
    """Whose a text is, by one scheme."""
    return read_text(MASTER, [SETTINGS[scheme]], users, tokens, **options)


def write(scheme, key: np.ndarray | None, num_tokens: int, seed: int) -> list[int]:
    """Text of a model that gives every token of its own Zipf-like law, marked with the key."""
    rng = np.random.default_rng(seed)
    logits = -np.log(np.arange(1, VOCABULARY + 1)) * 0.7
    tokens = rng.integers(0, VOCABULARY, 2).tolist()
    while len(tokens) < num_tokens:
        row = logits
        if key is not None:
            seed = context_seeds(key[None], np.array([tokens[-2:]]))
            if isinstance(scheme, GreenList):
                row = row + scheme.bias * scheme.evidence(seed, np.arange(VOCABULARY))
        p = np.exp(row - row.max())
        if key is not None and not isinstance(scheme, GreenList):
            p = reshape_kept(scheme, p, None, seed)
        tokens.append(int(rng.choice(VOCABULARY, p=p / p.sum())))
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
    green = scheme.evidence(seeds[:, None], np.arange(2000))
    assert set(np.unique(green)) == {0, 1}
    assert green.mean() == pytest.approx(0.25, abs=4.5 * math.sqrt(0.25 * 0.75 / 80_000))
    assert len({row.tobytes() for row in green}) == 40
    assert scheme.mean == 0.25


def test_green_tokens_are_raised_as_far_down_as_it_can_matter():
    seed = context_seeds(user_key(MASTER, "ann")[None], np.array([[5, 6]]))
    scores = np.linspace(0.0, -20.0, 2000, dtype=np.float32)
    green = GREEN.evidence(seed, np.arange(2000))
    for temperature in (0.0, 0.5, 1.0):
        raised = raise_favoured(GREEN, scores, 0, temperature, seed)
        reach = 2.0 + temperature * math.log(1 / FLOOR)
        expected = scores + np.float32(2.0) * ((green == 1) & (scores >= -np.float32(reach)))
        assert (raised == expected.astype(np.float32)).all()
    assert scores[1] < 0.0, "the scores are left as they were"
    all_raised = scores + 2.0 * green
    assert raise_favoured(GREEN, scores, 0, 0.0, seed).argmax() == all_raised.argmax()


def test_a_tournaments_coins_are_what_the_detector_counts():
    seed = context_seeds(user_key(MASTER, "ann")[None], np.array([[5, 6]]))
    words = spread(seed, np.arange(64))
    coins = [[int(word) >> layer & 1 for layer in range(20)] for word in words]
    assert TOURNAMENT.evidence(seed, np.arange(64)).tolist() == [sum(row) for row in coins]


def test_a_tournament_is_the_formula_written_out():
    p = np.random.default_rng(1).dirichlet(np.ones(6))
    words = spread(np.array([77]), np.arange(6))
    expected = p.copy()
    for layer in range(20):
        g = [int(word) >> layer & 1 for word in words]
        mean = sum(a * b for a, b in zip(g, expected, strict=True))
        expected = np.array([a * (1 + b - mean) for a, b in zip(expected, g, strict=True)])
    assert TOURNAMENT.reshape(p * 3, words) == pytest.approx(expected * 3, abs=1e-12)


@pytest.mark.parametrize("scheme", [Tournament(depth=5), Race()], ids=["tournament", "race"])
def test_over_all_keys_the_mean_is_the_models_own_distribution(scheme):
    p = np.random.default_rng(2).dirichlet(np.ones(8))
    p = np.append(p, [1e-7, 0.0])  # too light to take part, and impossible
    found = np.stack([reshape_kept(scheme, p, None, np.array([i * 977])) for i in range(20_000)])
    assert found.sum(axis=1) == pytest.approx(np.full(20_000, p.sum()))
    assert np.abs(found.mean(axis=0) - p).max() < 0.012
    assert (found[:, 8:] == p[8:]).all()
    assert found.max(axis=1).mean() > p.max() + 0.1  # each single one is far from it


def test_the_winner_of_a_race_is_drawn_as_often_as_it_is_likely_and_is_evident():
    weights = np.array([6.0, 3.0, 1.0])
    seeds = np.arange(4000) * 31
    wins = [int(reshape_kept(RACE, weights, None, seeds[i : i + 1]).argmax()) for i in range(4000)]
    shares = np.bincount(wins, minlength=3) / 4000
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.03)
    evidence = RACE.evidence(seeds, np.array(wins))
    assert RACE.evidence(seeds, np.zeros(4000, int)).mean() == pytest.approx(1.0, abs=0.06)
    # E[-ln(1 - u)] of a winner of chance p is the sum over k of 1 / (k + 1 / p) - 1 / ..., which
    # grows as p falls; the likeliest one's is above 1 already.
    rare = evidence[np.array(wins) == 2].mean()
    assert rare > evidence[np.array(wins) == 0].mean() > 1.2


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_the_writer_is_named_among_all_users_and_nobody_else(scheme):
    for seed, user in enumerate(("user-3", "user-250")):
        tokens = write(scheme, user_key(MASTER, user), 220, seed)
        found = trace(scheme, USERS, tokens)
        assert [entry.user for entry in found.accused] == [user]
        assert found.ranked[0].reading == detect(scheme, user_key(MASTER, user), tokens)
        assert found.ranked[0].reading.z > 6
    unmarked = trace(scheme, USERS, write(scheme, None, 220, 9))
    assert unmarked.is_nobody
    stranger = write(scheme, user_key(SecretKey(bytes(32)), "user-3"), 220, 10)
    assert trace(scheme, USERS, stranger).is_nobody


@pytest.mark.parametrize("scheme", SCHEMES, ids=NAMES)
def test_p_values_of_strangers_keys_are_exact(scheme):
    tokens = write(scheme, None, 120, 11)
    strangers = [f"stranger-{i}" for i in range(2000)]
    found = trace(scheme, strangers, tokens, num_shown=2000)
    readings = [entry.reading for entry in found.ranked]
    p_values = np.array([reading.p_value for reading in readings])
    for alpha in (0.2, 0.05, 0.01):
        share = (p_values <= alpha).mean()
        assert share <= alpha + 3.3 * math.sqrt(alpha * (1 - alpha) / 2000)
        assert share > alpha / 3
    first = readings[0]
    if isinstance(scheme, Race):
        expected = poisson_below(first.num_scored, first.score)
    else:
        num_coins = first.num_scored * (1 if scheme is GREEN else 20)
        rate = 0.25 if scheme is GREEN else 0.5
        expected = binomial_tail(int(first.score), num_coins, rate)
    assert first.p_value == pytest.approx(expected, rel=1e-9)
    spread_of_z = np.std([reading.z for reading in readings])
    assert spread_of_z == pytest.approx(1.0, abs=0.08)


def poisson_below(count: int, mean: float) -> float:
    """The chance of fewer than `count` events where `mean` are expected, term by term."""
    term, total = math.exp(-mean), 0.0
    for number in range(count):
        total += term
        term *= mean / (number + 1)
    return total


def test_settings_name_their_schemes():
    assert all(scheme_of(settings) == scheme for scheme, settings in SETTINGS.items())
    assert scheme_of(MarkSettings("kgw", 3, ratio=0.5, bias=1.0)) == GreenList(0.5, 1.0, 3)
    assert scheme_of(MarkSettings("synthid", 4, depth=9)) == Tournament(9, 4)
    assert scheme_of(MarkSettings("gumbel", 5)) == Race(5)
    with pytest.raises(InvalidRequest, match="WatermarkDetector"):
        scheme_of(MarkSettings("kgw", 1, is_lefthash=True))


def test_repetition_makes_a_text_nobodys():
    grams = distinct_grams([1, 2, 3] * 100, 2)
    assert sorted(map(tuple, grams.tolist())) == [(1, 2, 3), (2, 3, 1), (3, 1, 2)]
    assert trace(GREEN, USERS, [1, 2, 3] * 100).is_nobody


def test_a_text_that_is_too_short_says_nothing():
    for tokens in ([], [1], [1, 2]):
        found = trace(GREEN, USERS, tokens)
        assert found.is_nobody
        assert found.ranked[0].reading.p_value == 1.0
        assert found.ranked[0].reading.num_scored == 0


def test_many_users_are_compared_in_parts_without_a_difference(monkeypatch):
    from polyadapt.watermark import text

    tokens = write(GREEN, user_key(MASTER, "user-7"), 100, 5)
    whole = trace(GREEN, USERS, tokens)
    monkeypatch.setattr(text, "_CHUNK", 1000)
    assert trace(GREEN, USERS, tokens) == whole


@pytest.mark.parametrize(
    "make",
    [
        lambda: GreenList(ratio=0.0),
        lambda: GreenList(bias=-1.0),
        lambda: GreenList(bias=20.5),
        lambda: Race(context_width=0),
        lambda: GreenList(context_width=0),
        lambda: Tournament(depth=33),
        lambda: Tournament(context_width=17),
        lambda: trace(GREEN, [], [1, 2, 3]),
        lambda: trace(GREEN, ["a", "a"], [1, 2, 3]),
        lambda: trace(GREEN, ["a"], [1, 2, 3], alpha=1.0),
        lambda: read_text(MASTER, [], ["a"], [1, 2, 3]),
    ],
)
def test_what_means_nothing_is_refused(make):
    with pytest.raises(InvalidRequest):
        make()
