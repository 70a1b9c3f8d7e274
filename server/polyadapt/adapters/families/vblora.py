"""VB-LoRA as PEFT writes it: A and B are put together of mixtures of a few vectors that all modules
share, each of the k vectors of the largest logits by their softmax, or of k that are stored.

Format and rules: huggingface/peft:src/peft/tuners/vblora/{config,layer,model}.py, version 0.21.2.
Paper: arXiv 2405.15179.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import MisfitError, Module, PeftFamily, TensorForm
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    rank: int
    num_vectors: int
    length: int  # of a vector
    num_mixed: int  # vectors in a mixture
    is_chosen: bool  # whether the vectors of each mixture are stored, and not logits of all


def _forms(role: str, name: str) -> dict[str, TensorForm]:
    """Logits of all vectors, or the numbers of the chosen ones and all shares but the last."""
    return {
        role: TensorForm(name, ("rows", "columns", "vectors"), is_optional=True),
        f"{role}_places": TensorForm(
            f"{name}_topk_indices", ("rows", "columns", "chosen"), is_optional=True, is_index=True
        ),
        f"{role}_shares": TensorForm(
            f"{name}_topk_weights", ("rows", "columns", "chosen but one"), is_optional=True
        ),
    }


class Vblora(PeftFamily[_Settings]):
    """The family `vblora`."""

    name = "vblora"
    peft_types = frozenset({"VBLORA"})
    summary = "low rank: A and B put together of the shared vectors at load"
    forms: ClassVar = {
        **_forms("a", "vblora_logits_A"),
        **_forms("b", "vblora_logits_B"),
    }
    shared_forms: ClassVar = {"bank": TensorForm("vblora_vector_bank", ("vectors", "length"))}
    read_keys = frozenset(
        {
            *("r", "num_vectors", "vector_length", "topk", "save_only_topk_weights"),
            "fan_in_fan_out",
        }
    )
    training_keys = frozenset({"vblora_dropout", "init_vector_bank_bound", "init_logits_std"})
    may_be_empty = True  # the shares of mixtures of one vector

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. PEFT's defaults stand for keys that are left out."""
        settings = _Settings(
            rank=reader.rank("r", 4),
            num_vectors=reader.whole("num_vectors", 256, least=1),
            length=reader.whole("vector_length", 256, least=1),
            num_mixed=reader.whole("topk", 2, least=1),
            is_chosen=reader.flag("save_only_topk_weights"),
        )
        if settings.num_mixed > settings.num_vectors:
            reader.invalid("topk", settings.num_mixed, f"at most {settings.num_vectors} vectors")
        return settings

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        factor, _, part = role.partition("_")
        num = {"places": settings.num_mixed, "shares": settings.num_mixed - 1}
        last = num.get(part, settings.num_vectors)
        if factor == "a":
            return (settings.rank, site.in_features // settings.length, last)
        return (site.out_features // settings.length, settings.rank, last)

    def shared_shape(self, role: str, settings: _Settings) -> tuple[int | str, ...] | None:
        """See PeftFamily.shared_shape."""
        return (settings.num_vectors, settings.length)

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        site, length = module.site, settings.length
        if site.in_features % length or site.out_features % length:
            raise MisfitError(
                f"vector_length = {length} does not divide {site.out_features} x {site.in_features}"
            )
        wanted = ("places", "shares") if settings.is_chosen else ("",)
        roles = {f"{factor}_{part}".rstrip("_") for factor in "ab" for part in wanted}
        if roles != self.forms.keys() & module.keys.keys():
            names = " and ".join(self.forms[role].name for role in sorted(roles))
            raise MisfitError(
                f"save_only_topk_weights is {settings.is_chosen}, so it needs {names} and no other"
            )
        return settings.rank, 0

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""

        import torch

        def mixed(factor: str) -> torch.Tensor:
            if settings.is_chosen:
                stored, places = tensors[f"{factor}_shares"], tensors[f"{factor}_places"]
                shares = torch.cat([stored, 1 - stored.sum(-1, keepdim=True)], -1)
            else:
                values, places = tensors[factor].topk(settings.num_mixed, dim=-1)
                shares = values.softmax(-1)
            if int(places.min()) < 0 or int(places.max()) >= settings.num_vectors:
                raise MisfitError(
                    f"vectors {int(places.min())} to {int(places.max())} are mixed at "
                    f"{module.site.path}, there are {settings.num_vectors}"
                )
            # Never as many vectors at once as are mixed: those of one file could fill the memory.
            mix = torch.zeros(*places.shape[:-1], settings.num_vectors)
            return mix.scatter_add_(-1, places, shares) @ shared["bank"]

        a = mixed("a")  # [rank, vectors of A, length]
        b = mixed("b").transpose(1, 2)  # [vectors of B, length, rank]
        site, rank = module.site, settings.rank
        return low_rank(a.reshape(rank, site.in_features), b.reshape(site.out_features, rank))
