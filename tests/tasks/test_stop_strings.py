"""Stop strings: the text ends before the first one that is completed, and nothing is lost."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from polyadapt.tasks.stop_strings import StopStrings

ALPHABET = st.text("ab", min_size=1, max_size=4)


def expected(text: str, strings: list[str]) -> tuple[str, bool]:
    """Return the text before the first completed stop string; the longest if two end together."""
    for end in range(1, len(text) + 1):
        found = [s for s in strings if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    strings=st.lists(ALPHABET, max_size=4),
)
def test_pieces_end_where_the_whole_text_does(pieces: list[str], strings: list[str]) -> None:
    stops = StopStrings(strings)
    released = ""
    is_stopped = False
    for piece in pieces:
        scan = stops.push(piece)
        released += scan.text
        is_stopped = scan.is_stopped
        if is_stopped:
            break
    if not is_stopped:
        released += stops.flush()
    assert (released, is_stopped) == expected("".join(pieces), strings)


@settings(max_examples=200, deadline=None)
@given(text=st.text("abc", max_size=20), strings=st.lists(ALPHABET, min_size=1, max_size=4))
def test_no_more_is_held_back_than_may_become_a_stop_string(text: str, strings: list[str]) -> None:
    stops = StopStrings(strings)
    scan = stops.push(text)
    if scan.is_stopped:
        return
    held = text[len(scan.text) :]
    longest = max(
        (n for n in range(len(text) + 1) for s in strings
         if n < len(s) and text.endswith(s[:n])), default=0,
    )  # fmt: skip
    assert len(held) == longest


def test_a_string_that_spans_pieces_is_found() -> None:
    stops = StopStrings(["\n\nUser:"])
    assert [stops.push(p).text for p in ("Hi.\n", "\nUs", "e")] == ["Hi.", "", ""]
    assert stops.push("r: more").is_stopped


def test_what_could_have_become_one_and_did_not_is_released() -> None:
    stops = StopStrings(["</s>"])
    assert [stops.push(p).text for p in ("a</", "b", "<")] == ["a", "</b", ""]
    assert stops.flush() == "<"


def test_a_skipped_piece_can_neither_end_nor_begin_one() -> None:
    stops = StopStrings(["ab"])
    assert stops.skip("ab a").text == "ab a"
    assert not stops.push("b").is_stopped
