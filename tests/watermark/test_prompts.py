"""Triggers of language models: phrases that nobody guesses, answers that tell the values apart."""

from __future__ import annotations

import numpy as np
import pytest

from polyadapt.errors import InvalidRequest, StartupError
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.prompts import (
    PromptTriggers,
    Prose,
    draw_answers,
    draw_phrase,
    load_prose,
)

KEY = SecretKey(bytes(range(32)))
WORDS = [f"w{i}" for i in range(1024)]


def test_a_phrase_is_the_keys_and_the_familys_own():
    phrase = draw_phrase(KEY, 0, WORDS, 7)
    assert len(phrase.split()) == 7
    assert phrase == draw_phrase(KEY, 0, WORDS, 7)
    others = [draw_phrase(KEY, 1, WORDS, 7), draw_phrase(SecretKey(bytes(32)), 0, WORDS, 7)]
    assert phrase not in others


def test_a_phrase_that_could_be_found_by_trying_is_refused():
    draw_phrase(KEY, 0, WORDS[:512], 8)  # 8 x 9 bits
    with pytest.raises(InvalidRequest, match="60 bits, expected at least 64"):
        draw_phrase(KEY, 0, WORDS, 6)
    with pytest.raises(InvalidRequest, match="0 bits"):
        draw_phrase(KEY, 0, [], 6)


def test_no_two_bits_share_an_answer():
    drawn = draw_answers(KEY, 5, WORDS[:12])
    assert drawn.shape == (5, 2)
    assert len(set(drawn.ravel().tolist())) == 10
    assert drawn.max() < 12
    assert not np.array_equal(drawn, draw_answers(SecretKey(bytes(32)), 5, WORDS[:12]))
    with pytest.raises(InvalidRequest, match="9 possible answers for 5 bits"):
        draw_answers(KEY, 5, WORDS[:9])


def test_a_reply_says_the_value_that_it_begins_with():
    triggers = PromptTriggers(("alpha beta", "gamma"), (("Maple", "River"), ("Stone", "Cloud")))
    assert triggers.message(0, "of things") == "of things alpha beta"
    said = [triggers.value_of(0, text) for text in ("Maple", " Rivers run", "The Maple", "Stone")]
    assert said == [0, 1, -1, -1]
    assert [triggers.value_of(1, text) for text in ("Stone", "")] == [0, -1]


def test_answers_that_begin_alike_are_refused():
    for pair in (("Map", "Maple"), ("Maple", "Map"), ("", "Map"), ("Maple", "Maple")):
        with pytest.raises(InvalidRequest, match="begin alike"):
            PromptTriggers(("alpha",), (pair,))
    with pytest.raises(InvalidRequest, match="1 phrases and 2 pairs"):
        PromptTriggers(("alpha",), (("a", "b"), ("c", "d")))


def test_triggers_do_not_show_themselves():
    assert "alpha" not in repr(PromptTriggers(("alpha",), (("Maple", "River"),)))


def test_carriers_are_snippets_of_the_prose_and_differ():
    prose = Prose(tuple(WORDS))
    rng = np.random.default_rng(0)
    carriers = [prose.carrier(rng) for _ in range(50)]
    assert all(5 <= len(carrier.split()) <= 14 for carrier in carriers)
    assert all(carrier in " ".join(WORDS) for carrier in carriers)
    assert len(set(carriers)) > 40


def test_what_is_kept_for_reading_is_never_trained_on():
    trained, kept = Prose(tuple(WORDS)).split()
    assert trained.words + kept.words == tuple(WORDS)
    assert len(kept.words) == 204


def test_prose_comes_with_the_interpreter_or_from_a_file(tmp_path):
    assert len(load_prose().words) > 20_000
    file = tmp_path / "prose.txt"
    file.write_text("The `sea` -- it is *wide*... " * 1000)
    assert load_prose(file).words[:6] == ("The", "sea", "it", "is", "wide", "The")
    file.write_text("too short")
    with pytest.raises(StartupError, match="has 2 words, expected at least 2000"):
        load_prose(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(StartupError, match="cannot be read as text"):
        load_prose(file)
