"""The short way to a stream's events writes what the schema would."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import byte_tokenizer

from polyadapt.api.chat import ChatFormat, Head
from polyadapt.api.completions import CompletionFormat
from polyadapt.api.schemas.chat import ChatRequest
from polyadapt.api.schemas.completions import CompletionRequest
from polyadapt.api.stream import data_frame
from polyadapt.tasks.sequence_text import ScoredToken, TextDelta
from polyadapt.tasks.tokenizer import Tokenizer
from polyadapt.types import TokenLogprob

# A name that looks like the place where the text goes.
HEAD = Head("id-1", 1_700_000_000, '"content":"" "text":"" \\ é', "fp_x")
CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
PLAIN = {"model": "m", "prompt": "hi", "stream": True}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer.load(tmp_path_factory.mktemp("bytes"))


def form_of(kind: str, tokenizer: Tokenizer, **options: object) -> ChatFormat | CompletionFormat:
    if kind == "chat":
        return ChatFormat(ChatRequest.model_validate({**CHAT, **options}), HEAD, tokenizer)
    form = CompletionFormat(CompletionRequest.model_validate({**PLAIN, **options}), HEAD, tokenizer)
    form._echoes = [""]
    return form


def by_schema(form: ChatFormat | CompletionFormat, delta: TextDelta) -> bytes:
    chunk = form.piece(delta)
    assert chunk is not None
    return data_frame(chunk.model_dump_json())


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_every_character_is_written_as_the_schema_writes_it(
    kind: str, tokenizer: Tokenizer
) -> None:
    form = form_of(kind, tokenizer)
    chars = [chr(c) for c in [*range(0xD800), *range(0xE000, 0x10000), 0x1F642, 0x10FFFF]]
    for start in range(0, len(chars), 64):
        delta = TextDelta(0, "".join(chars[start : start + 64]), (1,))
        assert form.plain(delta) == by_schema(form, delta)


@pytest.mark.parametrize("kind", ["chat", "completion"])
@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1), index=st.integers(0, 3))
def test_plain_text_is_written_as_the_schema_writes_it(
    kind: str, tokenizer: Tokenizer, text: str, index: int
) -> None:
    form = form_of(kind, tokenizer, n=4)
    delta = TextDelta(index, text, (1, 2))
    assert form.plain(delta) == by_schema(form, delta)


SCORED = (ScoredToken(TokenLogprob(97, -1.0), 0),)


@pytest.mark.parametrize(
    ("kind", "options", "delta"),
    [
        ("chat", {}, TextDelta(0, "", (1,))),
        ("chat", {}, TextDelta(0, "a", (1,), (), "stop")),
        ("chat", {"return_token_ids": True}, TextDelta(0, "a", (1,))),
        ("chat", {"logprobs": True}, TextDelta(0, "a", (1,), SCORED)),
        ("chat", {"logprobs": True}, TextDelta(0, "a", (1,))),
        ("completion", {}, TextDelta(0, "", (1,))),
        ("completion", {}, TextDelta(0, "a", (1,), (), "length")),
        ("completion", {"return_token_ids": True}, TextDelta(0, "a", (1,))),
        ("completion", {"logprobs": 0}, TextDelta(0, "a", (1,), SCORED)),
    ],
)
def test_whatever_is_more_than_text_goes_through_the_schema(
    kind: str, options: dict[str, object], delta: TextDelta, tokenizer: Tokenizer
) -> None:
    assert form_of(kind, tokenizer, **options).plain(delta) is None
