"""One sequence: what is released when, and which tokens' logprobs go with it."""

from __future__ import annotations

import pytest
from tests.support import byte_tokenizer
from tests.support.fake_engine import EOS

from polyadapt.tasks.sequence_text import SequenceText, TextDelta
from polyadapt.tasks.text import _SkippingDecoder
from polyadapt.tasks.tokenizer import Tokenizer
from polyadapt.types import FinishReason, TokenLogprob, Tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer.load(tmp_path_factory.mktemp("bytes"))


def feed(
    sequence: SequenceText, text: bytes, *, reason: FinishReason | None = None
) -> list[TextDelta | None]:
    """Send one token after the other; the last one carries the reason."""
    deltas: list[TextDelta | None] = []
    for position, token in enumerate(text):
        is_last = position == len(text) - 1
        score = TokenLogprob(token, -1.0)
        deltas.append(
            sequence.take(Tokens("r", 0, (token,), (score,), reason if is_last else None))
        )
    return deltas


def new(tokenizer: Tokenizer, *stop: str, min_tokens: int = 0) -> SequenceText:
    return SequenceText(0, _SkippingDecoder(tokenizer), stop=stop, min_tokens=min_tokens)


def text_of(deltas: list[TextDelta | None]) -> str:
    return "".join(delta.text for delta in deltas if delta is not None)


def scored_of(deltas: list[TextDelta | None]) -> bytes:
    return bytes(
        token.score.token_id for delta in deltas if delta is not None for token in delta.scored
    )


def test_a_stop_string_ends_the_text_before_it_and_drops_its_tokens(tokenizer: Tokenizer) -> None:
    sequence = new(tokenizer, "END")
    deltas = feed(sequence, b"one END two", reason="length")
    assert text_of(deltas) == "one "
    assert scored_of(deltas) == b"one "
    assert sequence.finish_reason == "stop"
    assert sequence.is_cut
    assert sequence.num_tokens == len("one END")
    assert deltas[7:] == [None] * 4


def test_held_text_comes_with_its_logprobs_when_it_was_no_stop_string(tokenizer: Tokenizer) -> None:
    sequence = new(tokenizer, "END")
    deltas = feed(sequence, b"aENx")
    assert [d.text for d in deltas if d] == ["a", "", "", "ENx"]
    assert [len(d.scored) for d in deltas if d] == [1, 0, 0, 3]


def test_a_length_end_releases_what_was_held(tokenizer: Tokenizer) -> None:
    sequence = new(tokenizer, "END")
    deltas = feed(sequence, b"aEN", reason="length")
    assert text_of(deltas) == "aEN"
    assert scored_of(deltas) == b"aEN"
    assert sequence.finish_reason == "length"


def test_half_a_character_at_the_end_is_shown_and_scored(tokenizer: Tokenizer) -> None:
    sequence = new(tokenizer)
    deltas = feed(sequence, b"a\xe2\x82", reason="length")
    assert text_of(deltas) == "a\ufffd"
    assert scored_of(deltas) == b"a\xe2\x82"


def test_a_stop_token_has_an_id_and_no_text(tokenizer: Tokenizer) -> None:
    sequence = new(tokenizer)
    event = Tokens("r", 0, (104, EOS), (TokenLogprob(104, -1.0), TokenLogprob(EOS, -1.0)),
                   "stop", EOS)  # fmt: skip
    delta = sequence.take(event)
    assert delta is not None
    assert (delta.text, delta.token_ids, delta.finish_reason) == ("h", (104, EOS), "stop")
    assert [token.score.token_id for token in delta.scored] == [104]
    assert not sequence.is_cut


def test_a_stop_token_that_is_ordinary_text_is_left_out_too(tokenizer: Tokenizer) -> None:
    sequence = new(tokenizer)
    delta = sequence.take(Tokens("r", 0, (104, 33), (), "stop", 33))
    assert delta is not None
    assert delta.text == "h"


def test_min_tokens_hold_off_stop_strings(tokenizer: Tokenizer) -> None:
    sequence = new(tokenizer, "ab", min_tokens=3)
    deltas = feed(sequence, b"abaxab", reason="length")
    assert text_of(deltas) == "abax"
    assert sequence.finish_reason == "stop"


def test_offsets_count_characters(tokenizer: Tokenizer) -> None:
    sequence = new(tokenizer)
    deltas = feed(sequence, "aé!".encode(), reason="length")
    offsets = [token.text_offset for delta in deltas if delta for token in delta.scored]
    assert offsets == [0, 1, 1, 2]


def test_a_stop_string_completed_by_the_last_token_wins_over_length(tokenizer: Tokenizer) -> None:
    sequence = new(tokenizer, "cd")
    deltas = feed(sequence, b"abcd", reason="length")
    assert text_of(deltas) == "ab"
    assert sequence.finish_reason == "stop"


def test_the_real_tokenizer_finds_a_stop_string_across_tokens(real: Tokenizer) -> None:
    ids = real.encode("The answer is forty-two.\nQuestion: next", add_special_tokens=False)
    sequence = SequenceText(0, _SkippingDecoder(real), stop=("two.\nQu",), min_tokens=0)
    deltas = [sequence.take(Tokens("r", 0, (i,))) for i in ids]
    assert text_of(deltas) == "The answer is forty-"


def test_tokens_that_nothing_watches_have_the_same_text_as_watched_ones(
    tokenizer: Tokenizer,
) -> None:
    text = "one é two 🙂 ".encode() + bytes([0xC3, 0x61, 0xFF, 256 - 1])
    plain, watched = new(tokenizer), new(tokenizer, "\x01 is not said")
    for tokens in (text[:3], text[3:8], text[8:9], text[9:]):
        event = Tokens("r", 0, tuple(tokens))
        assert plain.take(event) == watched.take(event)
    end = Tokens("r", 0, (97, EOS), (), "stop", EOS)
    last = plain.take(end)
    assert last == watched.take(end)
    assert last is not None
    assert last.finish_reason == "stop"
    assert plain.num_tokens == watched.num_tokens == len(text) + 2
