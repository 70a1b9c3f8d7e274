"""The grammar of `model`: base, adapter, name@version, base:adapter, base::adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass

from polyadapt_store.manifest import NAME

AUTO = "auto"  # asks for a choice among the caller's adapters; no adapter has this name

_REF = re.compile(rf"(?P<name>{NAME})(?:@(?P<version>[1-9][0-9]{{0,8}}))?")


@dataclass(frozen=True, slots=True)
class NamedAdapter:
    """An adapter's name and, when the caller fixed one, its version."""

    name: str
    version: int | None = None


def parse_adapter(text: str) -> NamedAdapter | None:
    """Return what `name` or `name@version` names; None when the text can name no adapter."""
    match = _REF.fullmatch(text)
    if match is None:
        return None
    version = match["version"]
    return NamedAdapter(match["name"], None if version is None else int(version))


def split_base(model: str, base_name: str) -> str | None:
    """Return the adapter's part of `model`, or None when it names the base alone."""
    if model == base_name:
        return None
    for separator in ("::", ":"):
        if model.startswith(base_name + separator):
            return model[len(base_name) + len(separator) :]
    return model
