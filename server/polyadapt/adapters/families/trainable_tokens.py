"""Trainable tokens: rows of the embedding or head replaced, and nothing else.

Formats and rules: huggingface/peft:src/peft/tuners/trainable_tokens/{config,model,layer}.py,
version 0.21.2. PeftFamily replaces the rows, as it does for families that have them beside their
own tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from polyadapt.adapters.adapter import BaseWeights, Delta
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import Module, PeftFamily
from polyadapt.adapters.peft_modules import ModuleTargets
from polyadapt.errors import AdapterRejected, Problem
from polyadapt.types import BaseSpec
from polyadapt_store.checkpoint import Checkpoint


class TrainableTokens(PeftFamily[ModuleTargets | None]):
    """The family `trainable_tokens`."""

    name = "trainable_tokens"
    peft_types = frozenset({"TRAINABLE_TOKENS"})
    summary = "one component of low rank per replaced row"
    scaling = "no"
    read_keys = frozenset({"token_indices"})
    training_keys = frozenset({"init_weights"})
    refused_keys: ClassVar = {
        "trainable_token_indices": "token_indices names the tokens of this family"
    }
    token_key = "token_indices"

    def settings(self, reader: ConfigReader, base: BaseSpec) -> ModuleTargets | None:
        """See PeftFamily.settings: which tables get the rows."""
        given = reader.config.get(self.token_key)
        if not given or not isinstance(given, list):
            reader.invalid(self.token_key, given, "a list of token ids")
        return ModuleTargets.read(reader.config, [])  # PeftFamily reports what is wrong

    def check(
        self,
        modules: Mapping[int, Module],
        settings: ModuleTargets | None,
        base: BaseSpec,
        problems: list[Problem],
        notes: list[str],
    ) -> None:
        """See PeftFamily.check. Of a tied base PEFT stores the rows of the head as well."""
        assert settings is not None  # else its problems would have stopped the plan
        selected = {site.path for site in base.sites if settings.selects(site, base)}
        if base.is_tied and base.embedding_path in selected:
            selected.add(base.head_path)
        for _, module in sorted(modules.items()):
            path = module.site.path
            if "token_rows" in module.keys and path not in selected:
                problems.append(
                    Problem(
                        "not_targeted",
                        f"the checkpoint has new rows of {path}, which target_modules does not "
                        "select",
                        path,
                    )
                )

    def read(
        self,
        config: Mapping[str, Any],
        checkpoint: Checkpoint,
        base: BaseSpec,
        weights: BaseWeights,
    ) -> dict[int, Delta]:
        """See PeftFamily.read. A tied base has one table, so that both copies must be the same."""
        deltas = super().read(config, checkpoint, base, weights)
        site_ids = {site.path: site_id for site_id, site in enumerate(base.sites)}
        table = deltas.get(site_ids.get(base.embedding_path, -1))
        head = deltas.get(site_ids.get(base.head_path, -1))
        if (
            base.is_tied
            and table is not None
            and head is not None
            and (table.b.t() != head.a).any()
        ):
            raise AdapterRejected(
                [
                    Problem(
                        "config_mismatch",
                        f"{base.embedding_path} and {base.head_path} share one table, and the "
                        "checkpoint replaces its rows by two different ones",
                        base.head_path,
                    )
                ]
            )
        return deltas
