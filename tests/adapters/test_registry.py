"""Exactly one family reads an adapter, or the reason is given."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftType

from polyadapt.adapters.families.lora import Lora
from polyadapt.adapters.registry import FAMILIES, UNSERVED, family_of, read_config
from polyadapt.errors import AdapterRejected, Problem


class Other(Lora):
    name = "other"


def problem(function, *arguments) -> Problem:
    with pytest.raises(AdapterRejected) as caught:
        function(*arguments)
    (found,) = caught.value.problems
    return found


def test_names_of_families_are_unique() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)


def test_the_family_that_claims_is_returned() -> None:
    assert family_of({"peft_type": "LORA"}).name == "lora"


@pytest.mark.parametrize("kind", list(PeftType), ids=lambda kind: kind.value)
def test_every_type_of_peft_is_read_by_one_family_or_refused_with_a_reason(kind: PeftType) -> None:
    config = {"peft_type": kind.value}
    claiming = [family.name for family in FAMILIES if family.claims(config)]
    if claiming:
        assert kind.value not in UNSERVED
        assert family_of(config).name in claiming
        return
    found = problem(family_of, config)
    assert (found.code, found.where) == ("unsupported_family", "peft_type")
    assert f"peft_type is '{kind.value}', not served: {UNSERVED[kind.value]}; " in found.message
    assert "families that are served: " in found.message
    assert "lora" in found.message.partition("served: ")[2]


def test_reasons_differ_and_are_given_for_types_that_peft_has() -> None:
    assert len(set(UNSERVED.values())) == len(UNSERVED)
    assert {kind.value for kind in PeftType} >= set(UNSERVED)


@pytest.mark.parametrize("kind", ["BONES", "LoRA?", 7, ["LORA"], ""])
def test_an_unknown_type_is_refused_by_name(kind: object) -> None:
    found = problem(family_of, {"peft_type": kind})
    assert found.code == "unsupported_family"
    assert ascii(kind) in found.message
    assert "lora" in found.message


def test_a_missing_type_is_refused() -> None:
    assert problem(family_of, {"r": 8}).code == "unsupported_family"


def test_two_claiming_families_are_listed() -> None:
    found = problem(family_of, {"peft_type": "LORA"}, (Lora(), Other()))
    assert found.code == "ambiguous_family"
    assert "lora, other" in found.message


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (b"", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'"LORA"', "invalid_json"),
        (b'{"r": 4', "invalid_json"),
        (b'{"r": "\xff"}', "invalid_json"),
        (b'{"r": 4, "r": 8}', "duplicate_key"),
        (b'{"a": {"q": 1, "q": 2}}', "duplicate_key"),
        (b'{"lora_alpha": NaN}', "non_finite_number"),
        (b'{"lora_alpha": -Infinity}', "non_finite_number"),
        (b'{"lora_alpha": 1e999}', "non_finite_number"),
        (b'{"a": ' + b"[" * 30 + b"]" * 30 + b"}", "json_too_deep"),
        (b'{"a": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "json_too_deep"),
        (b'{"r": ' + b"9" * 10_000 + b"}", "invalid_json"),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "config_too_large"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_config_files_that_are_no_honest_json_are_refused(
    text: bytes, code: str, tmp_path: Path
) -> None:
    path = tmp_path / "adapter_config.json"
    path.write_bytes(text)
    assert problem(read_config, path).code == code
