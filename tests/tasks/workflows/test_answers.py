"""Which answer a text has, and when two answers are the same."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polyadapt.tasks.workflows.answers import MAX_ANSWER, extract, normalise


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # each form alone
        ("3 pens, 4 each.\n--> 12 END", "12"),
        ("so -> 12 END of it", "12"),
        ("also typeset → 12 END", "12"),
        ("The final answer is 12. I am sure, as 3 * 4 says.", "12"),
        ("THE FINAL ANSWER IS:\n\n  12", "12"),
        (r"Hence \boxed{12}.", "12"),
        ("So the answer is $12$!", "12"),
        ("It takes 3 of 4, in all 12", "12"),
        # the order of the forms
        (r"The final answer is 1. \boxed{2} The answer is 3. --> 4 END 5", "4"),
        (r"\boxed{2} The answer is 3. The final answer is 1. 5", "1"),
        (r"The answer is 3. \boxed{2} 5", "2"),
        ("The answer is 3. 5", "3"),
        # which one of several
        ("--> 1 END --> 2 END", "1"),
        ("a --> b --> 2 END", "2"),
        ("The final answer is 1. No, the final answer is 2.", "2"),
        (r"\boxed{1} or \boxed{2}", "2"),
        ("The answer is 1. Wait, the answer is 2.", "2"),
        # a form that yields nothing gives way to the next
        ("--> END the answer is 7.", "7"),
        ("--> 5 but it never ends, 6", "6"),
        ("The final answer is", None),
        ("6 of them. The final answer is", "6"),
        (r"\boxed{12", "12"),
        ("SEND --> 3 ENDED", "3"),
        # inside the forms
        (r"The final answer is $\boxed{\dfrac{1}{2}}$.", "1/2"),
        (r"\boxed{\frac{x^{2}}{3}}", r"\frac{x^{2}}{3}"),
        ("The answer is 3.5.", "3.5"),
        ("The answer is 18 dollars per day.", "18"),
        ("That makes 4 (the answer is 4).", "4"),
        ("So the final answer is 18 + 3 = 21 dollars.", "21"),
        ("The answer is **New  York**.", "New York"),
        # the last number
        ("10-3=7", "7"),
        ("from 10-3", "3"),
        ("it fell to -3 degrees", "-3"),
        ("half of it, 3/4 of a mile", "3/4"),
        ("1,234,567 in all", "1234567"),
        ("Nothing comes of nothing", None),
        ("", None),
        ("and " + "9" * (MAX_ANSWER + 1), None),
    ],
)
def test_the_answer_of_a_text(text: str, expected: str | None) -> None:
    assert extract(text) == expected


@pytest.mark.parametrize(
    "same",
    [
        ["1234.5", "1,234.50", "$1,234.5", "+1234.5", "01234.50 dollars", "x = 1234.5", r"\$1234.5",
         "1234.5.", "**1,234.5**", "  1234.5\n", "€1,234.50", "$1234.5$"],
        ["12", "12.0", "12.", r"12\text{ apples}", "12 apples", r"\(12\)", r"12^\circ", "12°",
         "12%", r"12\%", "12 because 3 times 4 is 12", "12, as 3 * 4 says", r"\boxed{12}", "'12'",
         "4 * 3 = 12 dollars", "4 x 3 = 12", "4 \u00d7 3 = 12", "4x3 = $12$", r"4 \times 3 = 12",
         "x = 4 * 3 = 12", "(10 + 2) = 12", "12)"],
        ["-1/2", r"-\frac{1}{2}", r"-\dfrac12", r"\tfrac{-1}{2}", r"$-\frac 12$", "\u22121\u20442"],
        ["0.5", ".5", "0.50"],
        ["0", "-0", "0.0", "+0", "00"],
        ["(1,2)", "( 1, 2 )", r"\left(1,\,2\right)"],
        ["x+1", "x + 1", r"x\ +\ 1", "y = x + 1"],
        ["New York", " New  York. ", r"\text{New York}"],
    ],
)  # fmt: skip
def test_answers_that_are_the_same(same: list[str]) -> None:
    assert {normalise(text) for text in same} == {same[0]}


@pytest.mark.parametrize(
    "different",
    [
        ["2/4", "1/2", "0.5", "5"],
        ["3 million", "3", "3, or 4", "3 times 4", "3 and 4", "3 or 5", "2 pi", "2"],
        ["12", "-12", "1.2", "120", "1,2"],
        ["x", "X", "x+1", "x-1"],
        ["5x", "5", "2x = 5", "x^2 + y^2 = 5", "5 = x"],
        ["(1, 2)", "1, 2", "(2)"],
        ["A", "B", "(A)"],
        ["yes", "no", "Yes"],
    ],
)
def test_answers_that_differ(different: list[str]) -> None:
    assert len({normalise(text) for text in different}) == len(different)


@pytest.mark.parametrize("nothing", ["", " ", "$$", "...", "**", ": ,", r"\text{}", "\n"])
def test_nothing_is_no_answer(nothing: str) -> None:
    assert normalise(nothing) == ""


@given(st.text(alphabet="0123456789.,-+/ $%xX=\\{}()fracboedtANSWERENDanswer is>\n", max_size=80))
def test_any_text_has_a_normalised_answer_or_none(text: str) -> None:
    answer = extract(text)
    assert answer is None or answer
    assert normalise(text) == normalise(f" {text} ")


@given(st.integers(-(10**9), 10**9), st.integers(0, 999))
def test_a_number_is_found_in_every_form(whole: int, thousandths: int) -> None:
    plain = f"{whole}.{thousandths:03d}"
    expected = normalise(plain)
    for text in (
        f"--> {plain} END", f"the final answer is {plain}", rf"\boxed{{{plain}}}",
        f"the answer is {plain}.", f"it is {plain}", f"the answer is {whole:,}.{thousandths:03d}",
    ):  # fmt: skip
        assert extract(text) == expected


def test_reading_a_long_text_takes_linear_time() -> None:
    for piece in ("--> ", "9", "9,", "answer is ", "\\boxed{", "{", "- ", "END ", "1,234", ".5"):
        began = time.perf_counter()
        extract(piece * 50_000)
        assert time.perf_counter() - began < 2.0, piece
