"""The families that this server knows, and which one reads a given adapter. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from polyadapt.adapters.adapter import Family
from polyadapt.adapters.families.adalora import AdaLora
from polyadapt.adapters.families.deft import Deft
from polyadapt.adapters.families.delora import Delora
from polyadapt.adapters.families.gralora import Gralora
from polyadapt.adapters.families.hra import Hra
from polyadapt.adapters.families.loha import Loha
from polyadapt.adapters.families.lora import Lora
from polyadapt.adapters.families.miss import Miss
from polyadapt.adapters.families.pvera import Pvera
from polyadapt.adapters.families.randlora import Randlora
from polyadapt.adapters.families.vblora import Vblora
from polyadapt.adapters.families.vera import Vera
from polyadapt.errors import AdapterRejected, Problem
from polyadapt_store.limits import StoreLimits
from polyadapt_store.strict_json import StrictJsonError, parse_object, shown

FAMILIES: tuple[Family, ...] = (
    Lora(),
    AdaLora(),
    Vera(),
    Pvera(),
    Miss(),
    Hra(),
    Delora(),
    Gralora(),
    Loha(),
    Deft(),
    Vblora(),
    Randlora(),
)


def read_config(path: Path, limits: StoreLimits | None = None) -> dict[str, Any]:
    """Return the adapter_config.json at `path`; raises AdapterRejected if it is no config
    we read.
    """
    limits = limits or StoreLimits()
    with path.open("rb") as file:
        text = file.read(limits.config_bytes + 1)
    if len(text) > limits.config_bytes:
        raise AdapterRejected(
            [
                Problem(
                    "config_too_large",
                    f"{path.name} is larger than {limits.config_bytes} bytes",
                    path.name,
                )
            ]
        )
    try:
        return parse_object(text, where=path.name, max_depth=limits.json_depth)
    except StrictJsonError as error:
        raise AdapterRejected([error.problem]) from None


def family_of(config: Mapping[str, Any], families: Sequence[Family] = FAMILIES) -> Family:
    """Return the one family that claims the config; raises AdapterRejected if none or
    several do.
    """
    claiming = [family for family in families if family.claims(config)]
    if len(claiming) == 1:
        return claiming[0]
    if claiming:
        names = ", ".join(sorted(family.name for family in claiming))
        raise AdapterRejected(
            [Problem("ambiguous_family", f"several families claim this adapter: {names}")]
        )
    kind = config.get("peft_type")
    given = (
        "adapter_config.json has no peft_type" if kind is None else f"peft_type is {shown(kind)}"
    )
    known = ", ".join(sorted(family.name for family in families))
    raise AdapterRejected(
        [
            Problem(
                "unsupported_family",
                f"{given}, which no family of this server reads; known families: {known}",
                "peft_type",
            )
        ]
    )
