"""GraLoRA as PEFT writes it: W cut into k x k blocks with a LoRA of rank r / k each, whose inputs
share A's columns and whose outputs share B's rows; and, with hybrid_r, one LoRA of all of W.

Format and rules: huggingface/peft:src/peft/tuners/gralora/{config,layer}.py, version 0.21.2. Paper:
arXiv 2505.20355.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import MisfitError, Module, PeftFamily, TensorForm
from polyadapt.errors import Problem
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    rank: int
    general_rank: int  # of the LoRA of all of W; 0: there is none
    alpha: float
    num_blocks: int  # along each side of W


class Gralora(PeftFamily[_Settings]):
    """The family `gralora`."""

    name = "gralora"
    peft_types = frozenset({"GRALORA"})
    summary = "low rank k r + hybrid_r: every block's components, with zeros beside the block"
    forms: ClassVar = {
        "a": TensorForm("gralora_A", ("blocks", "block in", "rank")),
        "b": TensorForm("gralora_B", ("blocks", "rank", "block out")),
        "general_a": TensorForm("gralora_A_general.weight", ("rank", "in"), is_optional=True),
        "general_b": TensorForm("gralora_B_general.weight", ("out", "rank"), is_optional=True),
    }
    read_keys = frozenset({"r", "hybrid_r", "alpha", "gralora_k", "fan_in_fan_out"})
    training_keys = frozenset({"gralora_dropout", "init_weights"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. PEFT's defaults stand for keys that are left out."""
        settings = _Settings(
            rank=reader.rank("r", 32),
            general_rank=reader.whole("hybrid_r", 0),
            alpha=reader.number("alpha", 64),
            num_blocks=reader.whole("gralora_k", 2, least=1),
        )
        if settings.rank % settings.num_blocks:
            reader.invalid("gralora_k", settings.num_blocks, f"a divisor of r = {settings.rank}")
        return settings

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        num = settings.num_blocks
        return {
            "a": (num, site.in_features // num, settings.rank),
            "b": (num, settings.rank, site.out_features // num),
            "general_a": (settings.general_rank, "in"),
            "general_b": ("out", settings.general_rank),
        }[role]

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        site, num = module.site, settings.num_blocks
        if site.in_features % num or site.out_features % num:
            raise MisfitError(
                f"gralora_k = {num} does not divide {site.out_features} x {site.in_features}"
            )
        return num * settings.rank + settings.general_rank, 0

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta.

        With s = r / k, block (o, n) of what is added is B[o, n s : n s + s]^T A[n, :, o s : o s +
        s]^T: the components of o and n lie in n's columns of A and in o's rows of B.
        """
        import torch

        num, site = settings.num_blocks, module.site
        # Components in the order n, o, s: those of one n are the columns of A[n] as they lie.
        a = torch.block_diag(*tensors["a"].transpose(1, 2))  # type: ignore[no-untyped-call]
        stored = tensors["b"].reshape(num, num, settings.rank // num, -1)  # o, n, s, column
        b = torch.zeros(num, num, settings.rank // num, num, site.out_features // num)  # n, o, s, o
        for block in range(num):
            b[:, block, :, block] = stored[block]
        b = b.reshape(num * settings.rank, site.out_features).t()
        if settings.general_rank:
            a = torch.cat([a, tensors["general_a"]])
            b = torch.cat([b, tensors["general_b"]], 1)
        return low_rank(a, b * (settings.alpha / (settings.rank + settings.general_rank)))

    def check(
        self,
        modules: Mapping[int, Module],
        settings: _Settings,
        base: BaseSpec,
        problems: list[Problem],
        notes: list[str],
    ) -> None:
        """See PeftFamily.check: with hybrid_r every module has the LoRA of all of W."""
        wanted = 2 if settings.general_rank else 0
        for _, module in sorted(modules.items()):
            found = sum(role.startswith("general") for role in module.keys)
            if module.has_own and found != wanted:
                problems.append(
                    Problem(
                        "config_mismatch",
                        f"hybrid_r is {settings.general_rank} and the checkpoint holds {found} of "
                        f"gralora_A_general and gralora_B_general of {module.site.path}",
                        "hybrid_r",
                    )
                )
