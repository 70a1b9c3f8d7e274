"""Words and picture of an attribution: every kind of answer, with the numbers of the trace."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from polyadapt.types import MarkSettings
from polyadapt.watermark.attribution import (
    Standing,
    attribute_copy,
    attribute_text,
    standing_of_copy,
    standing_of_text,
)
from polyadapt.watermark.codebook import Codebook, Design
from polyadapt.watermark.figure import figure
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.text import TextReading
from polyadapt.watermark.text_reading import TextFinding, UserReading
from polyadapt.watermark.trace import trace

USERS = [f"user-{i}" for i in range(500)]
BOOK = Codebook(SecretKey(bytes(range(32))), Design.parse("random"), 48)
SVG = "{http://www.w3.org/2000/svg}"


def read_of(user: str) -> list[int | None]:
    bits: list[int | None] = [int(bit) for bit in BOOK.row(user)]
    bits[3], bits[5] = None, 1 - int(BOOK.row(user)[5])
    return bits


def test_a_user_is_named_with_the_numbers_of_the_trace():
    found = trace(BOOK, USERS, read_of("user-7"))
    words = attribute_copy(found, 1e-4)
    assert words.who == ("user-7",)
    assert words.verdict == "It comes from a copy of user-7."
    (bound,) = re.findall(r"with at most (\S+) \(", words.how_sure)
    value = found.accused[0].family_p_value
    assert value <= float(bound) < value * 1.1
    text = str(words)
    assert "47 of 48 bits could be read" in text
    assert "user-7 has what was read in 46 of 47 bits" in text
    assert f"where {found.threshold:.1f} is needed" in text
    other = found.ranked[1]
    assert f"not named, {other.user}, has {other.num_matches} of 47" in text
    assert "That user-7 leaked it" in text


def test_a_chance_that_no_calibration_bears_out_is_only_said_to_be_small():
    words = attribute_copy(trace(BOOK, USERS, read_of("user-7")), 1e-4)
    assert "with a chance of less than 1e-12" in words.why[0]


def test_what_is_at_most_so_much_is_rounded_up():
    bits = [*BOOK.row("user-7").tolist()[:28], *[None] * 20]
    words = attribute_copy(trace(BOOK, USERS, bits), 1e-4)
    (shown,) = [why for why in words.why if "28 of 28" in why]
    assert "a chance of at most 3.8e-09" in shown, "2^-28 is 3.725e-09"


def test_where_nothing_was_read_there_is_no_sign_of_the_mark():
    words = attribute_copy(trace(BOOK, USERS, [None] * 48), 1e-4)
    assert words.is_nobody
    assert words.verdict == "No sign of this mark: nobody can be named."
    assert "That it was never marked" in str(words)
    assert "Limit" not in str(words)


def test_a_mark_of_nobody_who_is_listed_is_told_from_no_mark():
    found = trace(BOOK, USERS, read_of("a stranger"))
    words = attribute_copy(found, 1e-4)
    assert words.is_nobody
    assert words.verdict == "It carries this mark, and none of these users can be named."
    assert "a user who is not listed" in str(words)
    best = found.ranked[0]
    assert f"The best of them, {best.user}, agrees in {best.num_matches} of 47" in str(words)


def test_a_bit_that_an_unmarked_model_gives_anyway_leaves_it_open():
    words = attribute_copy(trace(BOOK, USERS, [1, *[None] * 47]), 1e-4)
    assert words.verdict == "Nobody can be named, and whether it is marked is open."
    assert "with a chance of at most 4.8e-03" in words.how_sure
    assert "Limit: 1 bits that were read cannot tell so many users apart" in str(words)
    # The same bits under a stricter reading are a sign.
    bits = [1, 0, *[None] * 46]
    assert "is open" in attribute_copy(trace(BOOK, USERS, bits), 1e-3).verdict
    assert "carries this mark" in attribute_copy(trace(BOOK, USERS, bits), 1e-5).verdict


def test_several_who_put_copies_together_are_all_named():
    long = Codebook(SecretKey(bytes(range(32))), Design.parse("nuida2"), 256)
    one, two = long.row("user-1"), long.row("user-2")
    bits = [int(a) if a == b else None for a, b in zip(one, two, strict=True)]
    words = attribute_copy(trace(long, USERS, bits), 1e-4)
    assert set(words.who) == {"user-1", "user-2"}
    assert words.verdict.startswith("It comes from copies of user-")
    assert set(words.to_data()) == {"who", "verdict", "how_sure", "why", "not_shown"}


def text_finding(*, is_named: bool) -> TextFinding:
    settings = MarkSettings("kgw", 2)
    ranked = tuple(
        UserReading(user, settings, TextReading(90, 40.0, 22.5, z, p), p, min(1.0, p * 500))
        for user, (z, p) in {
            "ann": (8.25, 1e-11) if is_named else (2.5, 6e-3),
            "ben": (1.0, 0.2),
        }.items()
    )
    return TextFinding(ranked[: int(is_named)], ranked, 500, 92, (settings,), (), 1e-3)


def test_a_text_is_given_to_the_user_whose_key_speaks_for_it():
    words = attribute_text(text_finding(is_named=True))
    assert words.who == ("ann",)
    assert "by 8.2 standard deviations" in str(words)
    assert "at most 5.0e-09" in words.how_sure
    assert "ben" not in str(words)
    nobody = attribute_text(text_finding(is_named=False))
    assert nobody.is_nobody
    assert "by 2.5 standard deviations" in str(nobody)
    assert "too short" in str(nobody)
    standing = standing_of_text(text_finding(is_named=True))
    assert standing.scores == {"ann": 8.25, "ben": 1.0}
    assert standing.accused == ("ann",)
    assert standing.threshold == pytest.approx(4.61, abs=0.01)  # of 2e-6


def test_the_picture_shows_every_user_the_threshold_and_the_bits():
    bits = read_of("user-7")
    found = trace(BOOK, USERS, bits)
    standing = standing_of_copy(BOOK, USERS, bits, found)
    assert list(standing.scores) == USERS
    assert standing.scores["user-7"] == pytest.approx(found.ranked[0].score)
    root = ET.fromstring(figure("a <title>", standing))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "a <title>" in texts
    assert "needed" in texts
    assert "user-7" in texts
    squares = [e for e in root.iter(f"{SVG}rect") if e.get("height") == "19"]
    assert len(squares) == 2 * 48
    # Of the one bit that was flipped both squares are marked; the erased one is crossed.
    assert sum(e.get("stroke") == "#d55e00" for e in squares) == 2
    dashed = [e for e in root.iter(f"{SVG}path") if e.get("stroke-dasharray")]
    named = list(root.iter(f"{SVG}circle"))
    at = float(dashed[0].get("d").split()[0].removeprefix("M"))
    assert float(named[0].get("cx")) > at


def test_the_bars_hold_every_user_once():
    rng = np.random.default_rng(0)
    scores = {f"u{i}": float(x) for i, x in enumerate(rng.standard_normal(300))}
    root = ET.fromstring(figure("t", Standing(scores, float("inf"), (), "z")))
    bars = [e for e in root.iter(f"{SVG}rect") if e.get("fill") == "#0072b2"]
    heights = np.array([float(bar.get("height")) for bar in bars])
    base = [float(bar.get("y")) + float(bar.get("height")) for bar in bars]
    assert np.ptp(base) < 0.2
    # Heights are log2(1 + count), up to the tallest; 48 bars in a row over the range and a margin.
    expected = _histogram(scores)
    places = [round((float(bar.get("x")) - 64) / (720 - 64 - 24) * 48) for bar in bars]
    counts = 2 ** (heights / heights.max() * np.log2(1 + expected.max())) - 1
    assert places == np.flatnonzero(expected).tolist()
    assert counts == pytest.approx(expected[expected > 0], abs=0.2)
    with pytest.raises(ValueError, match="no user's score"):
        figure("t", Standing({}, 1.0, (), "z"))


def _histogram(scores: dict[str, float]) -> np.ndarray:
    values = np.array(list(scores.values()))
    margin = max(np.ptp(values) * 0.04, 0.5)
    return np.histogram(values, 48, (values.min() - margin, values.max() + margin))[0]
