"""A tokenizer whose ids are bytes: 0..255, then four special tokens and a chat template."""

from __future__ import annotations

import json
from pathlib import Path

from polyadapt.tasks.tokenizer import _BYTE_OF_CHAR as BYTE_OF_CHAR
from polyadapt.tasks.tokenizer import Tokenizer

SPECIAL = {"<|im_start|>": 256, "<|im_end|>": 257, "<|endoftext|>": 258, "<|rstrip|>": 259}
TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write(directory: Path, *, template: str | None = TEMPLATE) -> Path:
    """Write the tokenizer's files as transformers names them and return the directory."""
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": text == "<|rstrip|>",
                "normalized": False,
                "special": True,
            }
            for text, token_id in SPECIAL.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {"type": "BPE", "vocab": {**BYTE_OF_CHAR, **SPECIAL}, "merges": []},
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    config = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def load(directory: Path, *, template: str | None = TEMPLATE) -> Tokenizer:
    """Write and load the tokenizer."""
    return Tokenizer.load(write(directory, template=template))
