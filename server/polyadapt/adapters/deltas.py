"""From a checkpoint's tensors to Deltas: exact conversions, Deltas with and without A and B, and
what stands for parameters of the base that an adapter replaces.

Knows no family, no config and no names of tensors but those that it is given to complain of.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from polyadapt.adapters.adapter import BaseWeights, Delta
from polyadapt.errors import AdapterRejected, Problem
from polyadapt.types import SiteSpec
from polyadapt_store.checkpoint import INTEGER_SIZES, RawTensor
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class SiteBase:
    """The base's parameters at one site; read only when asked for."""

    site_id: int
    weights: BaseWeights

    def weight(self) -> torch.Tensor:
        """The base weight [out, in] in float32; an embedding's is [vocabulary, width]."""
        return self.weights.weight(self.site_id).float().cpu()

    def bias(self) -> torch.Tensor | None:
        """The base bias [out] in float32, or None."""
        bias = self.weights.bias(self.site_id)
        return None if bias is None else bias.float().cpu()


def to_float32(raw: RawTensor) -> torch.Tensor:
    """Return a copy of the tensor in float32; exact, as every accepted dtype is a subset of it."""
    import torch

    if raw.dtype in INTEGER_SIZES:
        raise AdapterRejected(
            [Problem("unsupported_dtype", f"a tensor of weights has dtype {raw.dtype}")]
        )
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[raw.dtype]
    if 0 in raw.shape:
        return torch.zeros(raw.shape)
    # Copied out of the mapping: a tensor in a file may lie at an address that its dtype cannot
    # have.
    return torch.frombuffer(bytearray(raw.data), dtype=dtype).reshape(raw.shape).float()


def to_int64(raw: RawTensor) -> torch.Tensor:
    """Return a copy of a tensor of whole numbers in int64."""
    import torch

    dtypes = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
    dtype = dtypes[raw.dtype]
    return torch.frombuffer(bytearray(raw.data), dtype=dtype).reshape(raw.shape).long()


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite.

    Either would show in the sum, which is a tenth of the work; a sum may also overflow by itself.
    """
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def random_positions(num_elements: int, count: int, seed: int) -> torch.Tensor:
    """The first `count` of a permutation of all elements, as PEFT draws them on the CPU; see
    huggingface/peft:src/peft/tuners/{fourierft,waveft}/layer.py.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_elements, generator=generator)[:count].clone()


def low_rank(a: torch.Tensor, b: torch.Tensor, **parts: Any) -> Delta:
    """A Delta of A [rank, in] and B [out, rank], made contiguous."""
    return Delta(a.contiguous(), b.contiguous(), **parts)


def is_dense_smaller(site: SiteSpec, rank: int) -> bool:
    """Whether a whole difference takes less than A and B of this rank."""
    return rank * (site.in_features + site.out_features) > site.in_features * site.out_features


def without_low_rank(site: SiteSpec, **parts: Any) -> Delta:
    """A Delta without A and B."""
    import torch

    return Delta(torch.zeros(0, site.in_features), torch.zeros(site.out_features, 0), **parts)


def joined(delta: Delta | None, other: Delta) -> Delta:
    """Both at one site: components end to end, what is added added."""
    import torch

    if delta is None:
        return other

    def total(one: torch.Tensor | None, two: torch.Tensor | None) -> torch.Tensor | None:
        return two if one is None else one if two is None else one + two

    # A router weighs all components of a cell: families that have one refuse what would add others.
    assert delta.routing is None or not len(other.a)
    return replace(
        delta,
        a=torch.cat([delta.a, other.a]).contiguous(),
        b=torch.cat([delta.b, other.b], 1).contiguous(),
        bias=total(delta.bias, other.bias),
        dense=total(delta.dense, other.dense),
        weight=other.weight if delta.weight is None else delta.weight,
    )


def replaced_weight(site: SiteSpec, weight: torch.Tensor, base: SiteBase) -> Delta:
    """A whole new weight: of a norm itself, else the difference to the base's."""
    if site.kind == "norm":
        return without_low_rank(site, weight=weight.contiguous())
    # PEFT loads the new weight into a copy of the base's parameter, hence its dtype.
    stored = weight.to(base.weights.dtype).float()
    return without_low_rank(site, dense=(stored - base.weight()).contiguous())


def replaced_bias(site: SiteSpec, bias: torch.Tensor, base: SiteBase) -> Delta:
    """The difference of a new bias to the base's, which there has to be."""
    current = base.weights.bias(base.site_id)
    assert current is not None  # the plan saw has_bias
    # PEFT loads the new bias into the base's parameter, hence its dtype.
    replaced = bias.to(current.device, current.dtype).float() - current.float()
    return without_low_rank(site, bias=replaced.cpu())


def replaced_rows(
    site: SiteSpec, token_ids: tuple[int, ...], rows: torch.Tensor, base: SiteBase
) -> Delta:
    """Rows of a table that are replaced, as one component each.

    rows [tokens, width] are absolute in spite of the tensor's name; see
    huggingface/peft:src/peft/tuners/trainable_tokens/layer.py. Of a head they are W's rows: A is
    the difference, B picks the output; of an embedding A picks the token, B is the difference.
    """
    import torch

    table, at = base.weight(), torch.tensor(token_ids, dtype=torch.long)
    difference = rows - table[at]
    num_tokens = len(token_ids)
    picks = torch.zeros(num_tokens, table.shape[0])
    picks[torch.arange(num_tokens), at] = 1.0
    if site.kind == "embedding":
        return low_rank(picks, difference.t())
    return low_rank(difference, picks.t())


def compare_weight(key: str, copy: torch.Tensor, base: SiteBase) -> list[Problem]:
    """What is wrong with a stored copy of the base's weight that nobody says is replaced."""
    import torch

    current = base.weights.weight(base.site_id)
    # In the precision that is served, whatever narrower form the base is stored in.
    served = base.weights.dtype
    if torch.equal(copy.to(current.device, served), current.to(served)):
        return []
    return [
        Problem(
            "base_weight_differs",
            f"{shown(key)} is a copy of a base weight that differs from this base's, and "
            "modules_to_save does not name it: the embedding was trained or resized, or the base "
            "is another one; save with save_embedding_layers=False if neither is so",
            shown(key),
        )
    ]
