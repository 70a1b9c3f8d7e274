"""HRA as PEFT writes it: W times r Householder reflections, W (I - 2 u1 u1^T) ... (I - 2 ur ur^T).

Served as what the product adds to W, which has rank r. The product of reflections is I - U T U^T
with T^-1 = I / 2 + the strictly upper part of U^T U (compact WY form; Joffrain et al., ACM TOMS 32,
2006). Format and rules: huggingface/peft:src/peft/tuners/hra/{config,layer}.py, version 0.21.2.
Paper: arXiv 2405.17484.
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
    is_orthonormalised: bool


class Hra(PeftFamily[_Settings]):
    """The family `hra`."""

    name = "hra"
    peft_types = frozenset({"HRA"})
    summary = "low rank: what the product of reflections adds to the base, computed at load"
    scaling = "no"
    forms: ClassVar = {"u": TensorForm("hra_u", ("in", "rank"))}
    read_keys = frozenset({"r", "apply_GS"})
    training_keys = frozenset({"init_weights"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. PEFT's defaults stand for keys that are left out."""
        return _Settings(rank=reader.rank("r"), is_orthonormalised=reader.flag("apply_GS"))

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        return ("in", settings.rank)

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        site = module.site
        if settings.is_orthonormalised and settings.rank > site.in_features:
            raise MisfitError(
                f"apply_GS makes {settings.rank} orthonormal columns of {site.in_features} inputs"
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
        """See PeftFamily.delta: A = U^T, B = -W U T; with apply_GS T is 2 I, as U^T U is I."""
        import torch

        u = tensors["u"]
        norms = u.norm(dim=0)
        if settings.is_orthonormalised:
            u, norms = _orthonormal(u)
        else:
            u = u / norms
        if not bool((norms > 0).all()):
            raise MisfitError(f"a column of hra_u is zero at {module.site.path}: no reflection")
        inverse = torch.triu(u.t() @ u, 1) + 0.5 * torch.eye(settings.rank)
        # B = -W U T solves B T^-1 = -W U.
        b = torch.linalg.solve_triangular(inverse, -base.weight() @ u, upper=True, left=False)
        return low_rank(u.t(), b)

    def multiplies(self, settings: _Settings) -> bool:
        """See PeftFamily.multiplies."""
        return True


def _orthonormal(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns made orthonormal one after the other, in PEFT's order of operations, and what was
    left of each before it was normalised: columns that depend on each other are rounding.
    """
    import torch

    basis, norms = u[:, :0], []
    for column in u.t():
        for unit in basis.t():
            column = column - (unit @ column) * unit
        norms.append(column.norm())
        basis = torch.cat([basis, (column / norms[-1])[:, None]], 1)
    return basis, torch.stack(norms)
