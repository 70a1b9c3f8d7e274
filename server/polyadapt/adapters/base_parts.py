"""What an adapter of PEFT's replaces of the base itself: biases, weights and rows of tokens.

Which tensors those are, whether config and checkpoint agree about them, and what they make of a
module's Delta. Knows no family. Torch-free.

Formats: huggingface/peft:src/peft/utils/save_and_load.py and src/peft/utils/other.py, 0.21.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import (
    SiteBase,
    compare_weight,
    joined,
    replaced_bias,
    replaced_rows,
    replaced_weight,
)
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.errors import Problem
from polyadapt.ops import cells
from polyadapt.types import BaseSpec
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch

    from polyadapt.adapters.peft_family import Common, Module

_REPLACING = cells.OUT_SCALE | cells.TRANSFORM | cells.SWAP | cells.WEIGHT

# What a checkpoint of any of these families may hold of the base itself.
BASE_ENDINGS = {
    ("base_layer", "bias"): "new_bias",
    ("bias",): "new_bias",
    ("modules_to_save", "bias"): "new_bias",
    ("modules_to_save", "default", "bias"): "new_bias",
    ("base_layer", "weight"): "new_weight",
    ("weight",): "new_weight",
    ("modules_to_save", "weight"): "new_weight",
    ("modules_to_save", "default", "weight"): "new_weight",
    ("token_adapter", "trainable_tokens_delta"): "token_rows",
    ("token_adapter", "trainable_tokens_delta", "default"): "token_rows",
    ("trainable_tokens_delta",): "token_rows",
    ("trainable_tokens_delta", "default"): "token_rows",
}
BASE_ROLES = frozenset(BASE_ENDINGS.values())


@dataclass(frozen=True, slots=True)
class TiedRows:
    """The embedding whose token rows a tied head takes over."""

    site_id: int
    token_ids: tuple[int, ...]


def token_indices(reader: ConfigReader, key: str) -> dict[str, tuple[int, ...]]:
    """PEFT writes a list for the input embedding, or lists by module name."""
    given = reader.config.get(key)
    table = {"": given} if isinstance(given, list) else given or {}
    if not isinstance(table, dict) or any(
        not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids)
        for ids in table.values()
    ):
        reader.invalid(key, given, "null, token ids, or lists of them by name")
        return {}
    if any(len(set(ids)) < len(ids) for ids in table.values()):
        reader.invalid(key, given, "every token id once")
    return {name: tuple(ids) for name, ids in table.items()}


def check_announced(
    modules: Mapping[int, Module], common: Common, token_key: str, problems: list[Problem]
) -> None:
    """What the config says is replaced must be in the checkpoint: it is not served as the base."""
    for name in common.saved_modules:
        alone = replace(common, saved_modules=(name,))
        if not any(alone.saves(module.site.path) for module in modules.values()):
            problems.append(
                Problem(
                    "missing_tensor",
                    f"modules_to_save names {shown(name)} and the checkpoint holds no tensor of it",
                    "modules_to_save",
                )
            )
    has_rows = any("token_rows" in module.keys for module in modules.values())
    if any(common.token_indices.values()) and not has_rows:
        problems.append(
            Problem(
                "missing_tensor",
                f"{token_key} names tokens and the checkpoint holds no trainable_tokens_delta",
                token_key,
            )
        )


def check_base_parts(
    module: Module,
    is_targeted: bool,
    common: Common,
    base: BaseSpec,
    token_key: str,
    problems: list[Problem],
) -> None:
    """What a module replaces of the base must be what the config says of it."""
    site, keys = module.site, module.keys
    is_saved = common.saves(site.path)
    if "new_bias" in keys and not is_saved:
        is_only = common.bias.endswith("_only") and is_targeted
        if common.bias != "all" and not is_only:
            problems.append(
                Problem(
                    "config_mismatch",
                    f"bias is {common.bias!r} and the checkpoint holds {shown(keys['new_bias'])}",
                    "bias",
                )
            )
    is_table = site.path in (base.embedding_path, base.head_path)
    if "new_weight" in keys and not is_saved and not is_table:
        problems.append(
            Problem(
                "unread_tensor",
                f"{shown(keys['new_weight'])} replaces the weight of {site.path}, which "
                "modules_to_save does not name",
                shown(keys["new_weight"]),
            )
        )
    if "token_rows" in keys:
        token_ids = _ids_of(common, site.path)
        largest = base.vocab_size if site.kind == "linear" else site.in_features
        if token_ids is None or len(token_ids) != module.sizes.get("tokens"):
            count = "none" if token_ids is None else len(token_ids)
            problems.append(
                Problem(
                    "config_mismatch",
                    f"{shown(keys['token_rows'])} has {module.sizes.get('tokens')} rows and "
                    f"{token_key} names {count} tokens of {site.path}",
                    token_key,
                )
            )
        elif any(token_id >= largest for token_id in token_ids):
            problems.append(
                Problem(
                    "invalid_config",
                    f"{token_key} holds {max(token_ids)}, {site.path} has {largest} rows",
                    token_key,
                )
            )


def tied_rows(
    modules: Mapping[int, Module],
    common: Common,
    base: BaseSpec,
    shapes: dict[int, tuple[int, int]],
) -> dict[int, TiedRows]:
    """A head that shares the embedding's weight takes over its new rows; notes their rank."""
    if not base.is_tied:
        return {}
    by_path = {site.path: site_id for site_id, site in enumerate(base.sites)}
    embedding, head = by_path.get(base.embedding_path), by_path.get(base.head_path)
    if embedding is None or head is None or embedding not in modules:
        return {}
    token_ids = _ids_of(common, base.embedding_path)
    has_own_rows = head in modules and "token_rows" in modules[head].keys
    if token_ids is None or has_own_rows or "token_rows" not in modules[embedding].keys:
        return {}
    rank, parts = shapes.get(head, (0, 0))
    shapes[head] = (rank + len(token_ids), parts)
    return {head: TiedRows(embedding, token_ids)}


def replaced_parameters(
    modules: Mapping[int, Module],
    shapes: Mapping[int, tuple[int, int]],
    common: Common,
    base: BaseSpec,
    tied: Mapping[int, TiedRows],
    *,
    multiplies: bool,
) -> tuple[str, ...]:
    """Parameters of the base that the adapter replaces or multiplies."""
    names = []
    for site_id, (_, parts) in sorted(shapes.items()):
        path = base.sites[site_id].path
        keys = modules[site_id].keys if site_id in modules else {}
        is_whole = "new_weight" in keys and common.saves(path)
        has_rows = "token_rows" in keys or site_id in tied
        is_multiplied = multiplies and modules_own(modules, site_id)
        if parts & _REPLACING or is_multiplied or is_whole or has_rows:
            names.append(f"{path}.weight")
        is_bias_scaled = bool(parts & cells.OUT_SCALE) and base.sites[site_id].has_bias
        if "new_bias" in keys or is_bias_scaled:
            names.append(f"{path}.bias")
    return tuple(names)


def with_base_parts(
    delta: Delta | None,
    module: Module,
    tensors: Mapping[str, torch.Tensor],
    common: Common,
    base: SiteBase,
    problems: list[Problem],
) -> Delta | None:
    """The module's Delta with what replaces parameters of the base; None: nothing is left."""
    site = module.site
    if "new_weight" in tensors:
        weight = tensors["new_weight"]
        if common.saves(site.path):
            delta = joined(delta, replaced_weight(site, weight, base))
        else:
            problems += compare_weight(module.keys["new_weight"], weight, base)
    if "new_bias" in tensors:
        delta = joined(delta, replaced_bias(site, tensors["new_bias"], base))
    if "token_rows" in tensors:
        token_ids = _ids_of(common, site.path)
        assert token_ids is not None
        rows = replaced_rows(site, token_ids, tensors["token_rows"], base)
        delta = joined(delta, rows)
    return delta


def modules_own(modules: Mapping[int, Module], site_id: int) -> bool:
    """Whether the site has tensors of the family's own."""
    return site_id in modules and modules[site_id].has_own


def _ids_of(common: Common, path: str) -> tuple[int, ...] | None:
    for name, token_ids in common.token_indices.items():
        if not name or path == name or path.endswith(f".{name}"):
            return token_ids
    return None
