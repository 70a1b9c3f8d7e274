"""Who leaked: leakers and coalitions are found, innocents are named no more often than stated."""

from __future__ import annotations

import numpy as np
import pytest
from bench.mark_codes import ATTACKS, Setting, simulate

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.codebook import Codebook, Design
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.statistics import binomial_tail
from polyadapt.watermark.trace import NUM_SHOWN, trace

KEY = SecretKey(bytes(range(32)))
USERS = tuple(f"user-{i}" for i in range(1000))


def book_of(name: str = "random", length: int = 32) -> Codebook:
    return Codebook(KEY, Design.parse(name), length)


def test_a_lone_leaker_is_named_with_how_sure_it_is():
    book = book_of()
    found = trace(book, USERS, book.row("user-77").tolist())
    assert [entry.user for entry in found.accused] == ["user-77"]
    first = found.accused[0]
    assert (first.score, first.num_matches, found.num_decided) == (32.0, 32, 32)
    assert first.p_value == pytest.approx(2.0**-32)
    assert first.family_p_value == pytest.approx(1000 * 2.0**-32)
    assert found.gap == 32 - found.ranked[1].score > 0
    assert len(found.ranked) == NUM_SHOWN
    assert found.note == ""


def test_a_reading_of_nobodys_copy_names_nobody():
    book = book_of()
    found = trace(book, USERS, book.row("somebody else").tolist())
    assert found.is_nobody
    assert found.ranked[0].family_p_value > found.alpha


def test_a_threshold_is_what_one_user_alone_needs():
    book = book_of(length=64)
    bits = book.row("user-3").tolist()
    found = trace(book, USERS, bits)
    enough = min(k for k in range(65) if binomial_tail(k, 64, 0.5) <= 1e-3 / 1000)
    assert found.threshold == 2 * enough - 64
    wrong = 64 - enough
    assert not trace(book, USERS, [1 - b if i < wrong else b for i, b in enumerate(bits)]).is_nobody
    assert trace(book, USERS, [1 - b if i <= wrong else b for i, b in enumerate(bits)]).is_nobody


def test_erased_bits_count_for_nobody():
    book = book_of(length=64)
    bits = [None if i % 3 == 0 else int(b) for i, b in enumerate(book.row("user-5"))]
    found = trace(book, USERS, bits)
    assert found.num_decided == 42
    assert [entry.user for entry in found.accused] == ["user-5"]
    nothing = trace(book, USERS, [None] * 64)
    assert nothing.is_nobody
    assert "cannot tell so many users apart" in nothing.note


def test_a_code_that_is_too_short_for_so_many_users_says_so_instead_of_guessing():
    book = book_of(length=16)
    found = trace(book, USERS, book.row("user-1").tolist())
    assert found.is_nobody
    assert "longer code" in found.note
    assert not trace(book, USERS[:10], book.row("user-1").tolist()).is_nobody


def test_two_users_with_the_same_row_are_not_told_apart_in_silence():
    class Twins(Codebook):
        def row(self, user):
            return super().row("user-1" if user == "user-2" else user)

    book = Twins(KEY, Design.parse("random"), 32)
    found = trace(book, USERS, book.row("user-1").tolist())
    assert {entry.user for entry in found.accused} == {"user-1", "user-2"}
    assert found.gap == 0
    assert "made for 1" in found.note


def test_the_order_of_the_list_changes_nothing():
    book = book_of()
    bits = book.row("user-9").tolist()
    assert trace(book, USERS[::-1], bits).accused == trace(book, USERS, bits).accused


@pytest.mark.parametrize(
    ("users", "bits", "alpha", "words"),
    [
        ((), [1] * 8, 1e-3, "no users"),
        (("a", "a"), [1] * 8, 1e-3, "listed twice"),
        (("a",), [1] * 7, 1e-3, "another mark"),
        (("a",), [1] * 8, 0.0, "alpha"),
    ],
)
def test_what_cannot_be_traced_is_refused(users, bits, alpha, words):
    with pytest.raises(InvalidRequest, match=words):
        trace(book_of(length=8), users, bits, alpha=alpha)


# ------------------------------------------------------------------------------- coalitions
PAIRS = Setting("nuida2", 192, 2)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_colluder_of_each_pair_is_named_and_no_innocent(attack):
    found = simulate(PAIRS, attack, num_trials=10, num_users=1000, alpha=1e-3, seed=1)
    assert found.num_caught_any == 10
    assert found.num_accused_innocent == 0


@pytest.mark.parametrize("attack", ["majority", "minority", "interleaving", "all ones"])
def test_a_code_with_biases_stands_three_colluders(attack):
    setting = Setting("nuida4", 500, 3)
    found = simulate(setting, attack, num_trials=4, num_users=1000, alpha=1e-3, seed=1)
    assert found.num_caught_any == 4
    assert found.num_accused_innocent == 0


def test_noise_beside_the_collusion_is_borne():
    setting = Setting("nuida2", 192, 2, flip_rate=0.05, erasure_rate=0.1)
    found = simulate(setting, "interleaving", num_trials=10, num_users=1000, alpha=1e-3, seed=2)
    assert found.num_caught_any >= 9


@pytest.mark.parametrize("setting", [Setting("random", 32, 1), Setting("nuida4", 100, 3)], ids=str)
def test_innocents_are_accused_no_more_often_than_alpha(setting):
    """At an alpha that shows: 300 traces among 100 users whose leakers are none of them."""
    found = simulate(
        setting, "interleaving", num_trials=300, num_users=100, alpha=0.1, seed=3, is_outside=True
    )
    assert found.num_accused_innocent <= 300 * 0.1 + 3.3 * np.sqrt(300 * 0.1 * 0.9)
    assert found.num_accused_innocent > 0  # the test could fail
