"""Text <-> token ids of one model directory: tokenizer.json, its special tokens and chat template.

Torch-free and without transformers. Knows no requests and no HTTP.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from polyadapt.errors import InvalidRequest, StartupError
from polyadapt.tasks.chat_template import ChatTemplate

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Encodes and decodes for one model; immutable after `load` and safe to use from threads.

    Special tokens come from two sources that are kept apart: what the operator's template (or a raw
    prompt) writes is parsed into special ids, what a chat message says is ordinary text.
    """

    def __init__(
        self,
        serialized: str,
        *,
        named_tokens: Mapping[str, str],
        template: ChatTemplate | None,
    ) -> None:
        """Build from the text of a tokenizer.json; raises StartupError when it cannot be read."""
        try:
            self._parsing = tokenizers.Tokenizer.from_str(serialized)
            self._literal = tokenizers.Tokenizer.from_str(serialized)
        except Exception as error:  # the binding raises bare Exception
            raise StartupError(f"the model's tokenizer.json cannot be read: {error}") from None
        for each in (self._parsing, self._literal):
            # A saved truncation or padding would change prompts in silence.
            each.no_truncation()
            each.no_padding()
        self._literal.encode_special_tokens = True
        self.named_tokens = dict(named_tokens)
        self.template = template
        added = self._parsing.get_added_tokens_decoder()
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        self._added_text = {i: token.content for i, token in added.items()}
        special = sorted((added[i] for i in self._special_ids), key=lambda t: -len(t.content))
        literals = [re.escape(token.content) for token in special]
        self._special_pattern = re.compile("|".join(literals)) if literals else None
        # A token that strips swallows the white space beside it, as the tokenizer itself does.
        self._special_span = re.compile(
            "|".join(
                (r"\s*" if token.lstrip else "") + f"({literal})" + (r"\s*" if token.rstrip else "")
                for token, literal in zip(special, literals, strict=True)
            )
        )
        self._special_by_text = {added[i].content: i for i in self._special_ids}
        saved = json.loads(serialized)
        decoder_kinds = _decoder_kinds(saved.get("decoder"))
        self._is_byte_level = "ByteLevel" in decoder_kinds
        self.has_byte_fallback = "ByteFallback" in decoder_kinds
        # Such a decoder joins the tokens' bytes and does nothing else.
        self._is_joining = decoder_kinds == {"ByteLevel"}
        self._lone_texts: dict[int, str | None] = {}
        self.vocab_size = self._parsing.get_vocab_size(with_added_tokens=True)
        self._max_token_bytes = self._longest_token(saved)
        # Byte-level vocabularies may lack control characters; those vanish from a text.
        self._missing_bytes = bytes(
            byte for char, byte in _BYTE_OF_CHAR.items() if self._parsing.token_to_id(char) is None
        )

    @classmethod
    def load(cls, model_dir: Path) -> Tokenizer:
        """Read tokenizer.json, tokenizer_config.json and the chat template; raises StartupError."""
        try:
            serialized = (model_dir / "tokenizer.json").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StartupError(
                f"the model has no readable tokenizer.json ({error}); "
                "convert its tokenizer with transformers' save_pretrained first"
            ) from None
        config = _read_json(model_dir / "tokenizer_config.json")
        named = {
            name: text
            for name in _NAMED_TOKENS
            if (text := _token_text(config.get(name))) is not None
        }
        source = _template_source(model_dir, config)
        template = ChatTemplate(source, named_tokens=named) if source is not None else None
        return cls(serialized, named_tokens=named, template=template)

    def min_tokens(self, text: str) -> int:
        """Return how many tokens a text has at least, without tokenising; 0 when unknown."""
        if self._max_token_bytes == 0:
            return 0
        num_bytes = len(text.encode().translate(None, self._missing_bytes))
        return -(-num_bytes // self._max_token_bytes)

    def _longest_token(self, saved: Mapping[str, Any]) -> int:
        """Return the bytes of the longest token; 0 where text can vanish before it is cut up."""
        keeps_text = saved.get("normalizer") is None and self._is_byte_level
        if not keeps_text or any(t.get("lstrip") or t.get("rstrip") for t in saved["added_tokens"]):
            return 0
        return max((len(self.token_bytes(i)) for i in range(self.vocab_size)), default=0)

    # ----------------------------------------------------------------------------- encoding
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of raw text, in which special tokens are parsed.

        `add_special_tokens` adds what the tokenizer itself puts around a text, such as a BOS.
        """
        return list(self._parsing.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool
    ) -> list[int]:
        """Return the ids of the rendered conversation.

        A special token's literal inside a message stays ordinary text: it is rendered as a
        placeholder, and only what lies outside placeholders is parsed into special ids. Raises
        InvalidRequest when the model has no template or the template refuses the messages.
        """
        if self.template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions with a complete prompt",
                param="messages",
            )
        if self._special_pattern is None or not _mentions(messages, self._special_pattern):
            text = self.template.render(messages, add_generation_prompt=add_generation_prompt)
            return self.encode(text, add_special_tokens=False)
        masked, originals = _mask(messages, self._special_pattern)
        text = self.template.render(masked, add_generation_prompt=add_generation_prompt)
        return self._encode_masked(text, originals)

    def _encode_masked(self, text: str, originals: Mapping[str, str]) -> list[int]:
        """Encode with the template's special tokens parsed and masked literals as plain text."""
        placeholder = re.compile("|".join(map(re.escape, originals)))
        ids: list[int] = []
        position = 0
        for match in [*self._special_span.finditer(text), None]:
            piece = text[position : match.start() if match else len(text)]
            if piece:
                piece = placeholder.sub(lambda found: originals[found[0]], piece)
                ids += self._literal.encode(piece, add_special_tokens=False).ids
            if match:
                ids.append(self._special_by_text[match[match.lastindex or 0]])
                position = match.end()
        return ids

    # ----------------------------------------------------------------------------- decoding
    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of ids; special tokens are left out unless `skip_special` is False."""
        return str(self._parsing.decode(ids, skip_special_tokens=skip_special))

    def is_special(self, token_id: int) -> bool:
        """Whether the id is a special token, which decode leaves out."""
        return token_id in self._special_ids

    def is_byte_fallback(self, token_id: int) -> bool:
        """Whether the id stands for one raw byte whose text depends on the bytes around it."""
        if not self.has_byte_fallback:
            return False
        token = self._parsing.id_to_token(token_id)
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def lone_text(self, token_id: int) -> str | None:
        """Return the text that the id adds wherever whole characters precede it; None when that
        depends on its neighbours, or when it has no text.
        """
        try:
            return self._lone_texts[token_id]
        except KeyError:
            text = self.decode([token_id]) if self._is_joining else ""
            # At most one entry for each id that there is: others are not kept.
            known = text if text and "\ufffd" not in text else None
            if token_id < self.vocab_size:
                self._lone_texts[token_id] = known
            return known

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, with its leading space; b"" for unknown ids."""
        if (added := self._added_text.get(token_id)) is not None:
            return added.encode()
        token = self._parsing.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            if all(char in _BYTE_OF_CHAR for char in token):
                return bytes(_BYTE_OF_CHAR[char] for char in token)
            return token.encode()
        if self.has_byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()


def _byte_of_char() -> dict[str, int]:
    """Return the byte behind each character of a byte-level vocabulary.

    Printable bytes stand for themselves, the others for the characters from U+0100 on, in order
    (openai/gpt-2:src/encoder.py, bytes_to_unicode).
    """
    table: dict[str, int] = {}
    num_moved = 0
    for byte in range(256):
        if 0x21 <= byte <= 0x7E or 0xA1 <= byte <= 0xAC or 0xAE <= byte <= 0xFF:
            table[chr(byte)] = byte
        else:
            table[chr(0x100 + num_moved)] = byte
            num_moved += 1
    return table


_BYTE_OF_CHAR = _byte_of_char()


def _decoder_kinds(decoder: Mapping[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    if decoder.get("type") == "Sequence":
        return set().union(*(_decoder_kinds(part) for part in decoder.get("decoders", [])))
    return {str(decoder.get("type"))}


def _mentions(value: Any, pattern: re.Pattern[str]) -> bool:
    if isinstance(value, str):
        return pattern.search(value) is not None
    if isinstance(value, Mapping):
        return any(_mentions(item, pattern) for item in value.values())
    if isinstance(value, Sequence):
        return any(_mentions(item, pattern) for item in value)
    return False


def _mask(
    messages: Sequence[Mapping[str, Any]], pattern: re.Pattern[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Replace every literal in the messages by a placeholder that occurs nowhere else."""
    taken = json.dumps(messages, ensure_ascii=False, default=str)
    salt = 0
    while f"\ue000{salt}\ue001" in taken:
        salt += 1
    placeholder_of: dict[str, str] = {}

    def replace(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(
                lambda found: placeholder_of.setdefault(
                    found[0], f"\ue000{salt}\ue001{len(placeholder_of)}\ue002"
                ),
                value,
            )
        if isinstance(value, Mapping):
            return {key: replace(item) for key, item in value.items()}
        if isinstance(value, Sequence):
            return [replace(item) for item in value]
        return value

    masked = [replace(message) for message in messages]
    return masked, {placeholder: literal for literal, placeholder in placeholder_of.items()}


def _token_text(value: Any) -> str | None:
    """Return a named token's text, which a config gives as a string or as an object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template_source(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    file = model_dir / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        template = next((t.get("template") for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StartupError(f"{file.name} of the model cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise StartupError(f"{file.name} of the model is not a JSON object")
    return value
