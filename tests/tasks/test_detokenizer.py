"""Incremental decoding: the pieces, joined, are the decoded whole, for every decoder."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import byte_tokenizer

from polyadapt.tasks.detokenizer import Detokenizer
from polyadapt.tasks.tokenizer import Tokenizer


class Counting:
    """A decoder that counts the tokens it is asked to decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.is_special = tokenizer.is_special
        self.is_byte_fallback = tokenizer.is_byte_fallback
        self.lone_text = tokenizer.lone_text
        self.num_decoded = 0

    def decode(self, ids: Sequence[int]) -> str:
        self.num_decoded += len(ids)
        return self._tokenizer.decode(ids)


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Return what each token released, and what the end did."""
    detokenizer = Detokenizer(Counting(tokenizer))
    return [*(detokenizer.push(i) for i in ids), detokenizer.flush()]


def llama_like() -> Tokenizer:
    """A tokenizer with byte fallback whose decoder strips the first space, as Llama 2's does."""
    vocab = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    for text in ("\u2581", "a", "b", "\u2581the", "\u2581a", "é", "\u2581\u2581"):
        vocab[text] = len(vocab)
    serialized = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": 1, "content": "</s>", "single_word": False, "lstrip": False,
                "rstrip": False, "normalized": False, "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True,
            "unk_token": "<unk>",
        },
    }  # fmt: skip
    return Tokenizer(json.dumps(serialized), named_tokens={}, template=None)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer.load(tmp_path_factory.mktemp("bytes"))


LLAMA = llama_like()
# Bytes of one to four byte characters, lone continuation bytes, bytes that begin nothing.
BYTES = [*"a é€🙂".encode(), 0x80, 0xBF, 0xC3, 0xE2, 0xF0, 0xFF]


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_pieces_of_byte_level_tokens_join_to_the_whole(
    byte_level: Tokenizer, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.sampled_from([*BYTES, 256, 257]), max_size=120))
    assert "".join(pieces(byte_level, ids)) == byte_level.decode(ids)


@settings(max_examples=400, deadline=None)
@given(ids=st.lists(st.sampled_from([1, *(2 + b for b in BYTES), *range(258, 265)]), max_size=80))
def test_pieces_of_byte_fallback_tokens_join_to_the_whole(ids: list[int]) -> None:
    assert "".join(pieces(LLAMA, ids)) == LLAMA.decode(ids)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_pieces_of_the_default_model_join_to_the_whole(
    real: Tokenizer, data: st.DataObject
) -> None:
    ids = data.draw(st.lists(st.integers(0, real.vocab_size - 1), max_size=150))
    assert "".join(pieces(real, ids)) == real.decode(ids)


def test_text_is_released_as_soon_as_it_is_certain(byte_level: Tokenizer) -> None:
    assert pieces(byte_level, [*b"h", *"é".encode(), *b"!"]) == ["h", "", "é", "!", ""]


def test_an_incomplete_character_is_released_at_the_end(byte_level: Tokenizer) -> None:
    assert pieces(byte_level, [104, 0xE2, 0x82]) == ["h", "", "", "\ufffd"]


def test_the_leading_space_belongs_to_every_piece_but_the_first() -> None:
    the, a = 261, 262
    assert "".join(pieces(LLAMA, [the, a, the])) == "the a the"


@pytest.mark.parametrize(
    "run", [[0xFF], [0x80], [0xE2, 0x82], [97], [256], [0xFF, 256], [0xF0, 0x9F, 0x99, 0x82]]
)
def test_the_work_per_token_is_bounded(byte_level: Tokenizer, run: list[int]) -> None:
    ids = run * 2000
    decoder = Counting(byte_level)
    detokenizer = Detokenizer(decoder)
    text = "".join([*(detokenizer.push(i) for i in ids), detokenizer.flush()])
    assert text == byte_level.decode(ids)
    assert decoder.num_decoded <= 60 * len(ids)


def test_a_long_run_of_byte_tokens_is_decoded_once() -> None:
    ids = [2 + 0xE2, 2 + 0x82, 2 + 0xAC] * 1000
    decoder = Counting(LLAMA)
    detokenizer = Detokenizer(decoder)
    text = "".join([*(detokenizer.push(i) for i in ids), detokenizer.flush()])
    assert text == LLAMA.decode(ids)
    assert decoder.num_decoded <= 2 * len(ids)


def test_text_of_whole_characters_is_never_decoded_again(real: Tokenizer) -> None:
    text = "The quick brown fox: naïve café, 東京, and so on.\n" * 20
    ids = real.encode(text, add_special_tokens=False)
    whole = [i for i in ids if real.lone_text(i) is not None]
    decoder = Counting(real)
    detokenizer = Detokenizer(decoder)
    assert "".join(detokenizer.push(i) for i in whole) == real.decode(whole)
    assert decoder.num_decoded == 0
    assert len(whole) > 0.7 * len(ids)


def test_a_token_has_a_text_of_its_own_only_where_no_neighbour_can_change_it(
    byte_level: Tokenizer,
) -> None:
    assert byte_level.lone_text(ord("a")) == "a"
    assert byte_level.lone_text(0xC3) is None, "half a character"
    assert byte_level.lone_text(257) is None, "a special token"
    assert byte_level.lone_text(10**6) is None, "no token"
    assert LLAMA.lone_text(261) is None, "its decoder strips the first token's space"
