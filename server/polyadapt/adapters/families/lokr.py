"""LoKr: the update is a Kronecker product, W + s kron(W1, W2).

Formats and rules: huggingface/peft:src/peft/tuners/lokr/{config,model,layer}.py, version 0.21.2.
LyCORIS: arXiv 2309.14859.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, low_rank, without_low_rank
from polyadapt.adapters.families.lycoris import Lycoris, LycorisSettings
from polyadapt.adapters.peft_family import MisfitError, Module, TensorForm
from polyadapt.ops import cells

if TYPE_CHECKING:
    import torch


class Lokr(Lycoris):
    """The family `lokr`."""

    name = "lokr"
    peft_types = frozenset({"LOKR"})
    summary = "A and B of the product's rank where that is smaller, else a dense matrix per module"
    overrides = cells.DENSE
    forms: ClassVar = {
        "w1": TensorForm("lokr_w1", ("out1", "in1"), is_optional=True),
        "w1_a": TensorForm("lokr_w1_a", ("out1", "rank"), is_optional=True),
        "w1_b": TensorForm("lokr_w1_b", ("rank", "in1"), is_optional=True),
        "w2": TensorForm("lokr_w2", ("out2", "in2"), is_optional=True),
        "w2_a": TensorForm("lokr_w2_a", ("out2", "rank"), is_optional=True),
        "w2_b": TensorForm("lokr_w2_b", ("rank", "in2"), is_optional=True),
    }
    # What decides how W is split; the tensors' shapes tell the result.
    training_keys = frozenset(
        {
            *("decompose_both", "decompose_factor", "use_effective_conv2d", "init_weights"),
            *("rank_dropout", "rank_dropout_scale", "module_dropout"),
        }
    )
    foreign: ClassVar = {"lokr_t2": "it belongs to a convolution"}

    def cell(self, module: Module, settings: LycorisSettings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        rank = _rank(module, settings.site_rank(module.site))
        return (0, cells.DENSE) if rank is None else (rank, 0)

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: LycorisSettings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""
        import torch

        site, rank = module.site, settings.site_rank(module.site)
        scale = settings.scale(site)
        if _rank(module, rank) is None:
            whole = [
                tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]
                for name in ("w1", "w2")
            ]
            return without_low_rank(site, dense=torch.kron(*whole) * scale)
        # kron(L1 R1, L2 R2) = kron(L1, L2) kron(R1, R2)
        left1, right1 = _factors("w1", tensors, _inner("w1", module, rank))
        left2, right2 = _factors("w2", tensors, _inner("w2", module, rank))
        return low_rank(torch.kron(right1, right2), torch.kron(left1, left2) * scale)


def _rank(module: Module, given: int) -> int | None:
    """The product's rank; None where a dense matrix is smaller than A and B."""
    sizes = module.sizes
    for name in ("w1", "w2"):
        has = [part in module.keys for part in (name, f"{name}_a", f"{name}_b")]
        if has not in ([True, False, False], [False, True, True]):
            raise MisfitError(f"either lokr_{name} or both lokr_{name}_a and lokr_{name}_b is due")
    for size in ("out", "in"):
        one, two = sizes[f"{size}1"], sizes[f"{size}2"]
        if one * two != sizes[size]:
            raise MisfitError(f"the product has {one} * {two} {size}puts and W {sizes[size]}")
    rank = _inner("w1", module, given) * _inner("w2", module, given)
    is_smaller = rank * (sizes["in"] + sizes["out"]) < sizes["in"] * sizes["out"]
    return rank if is_smaller else None


def _inner(name: str, module: Module, given: int) -> int:
    """The size k by which the matrix, stored whole or as factors of rank `given`, is a product of
    [out, k] and [k, in].
    """
    number, sizes = name[-1], module.sizes
    smaller = min(sizes[f"out{number}"], sizes[f"in{number}"])
    return min(given, smaller) if f"{name}_a" in module.keys else smaller


def _factors(
    name: str, tensors: Mapping[str, torch.Tensor], inner: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices [out, inner] and [inner, in] whose product is the matrix."""
    import torch

    if f"{name}_a" in tensors:
        left, right = tensors[f"{name}_a"], tensors[f"{name}_b"]
        if left.shape[1] == inner:
            return left, right
        whole = left @ right
    else:
        whole = tensors[name]
    if whole.shape[0] == inner:
        return torch.eye(inner), whole
    return whole, torch.eye(inner)
