"""A whole model that LoRA was merged into, made into an adapter of the model that it began with.

ExPLoRA trains LoRA on queries and values of most blocks, some blocks whole, and the norms, and what
it publishes is merged. The differences to the base tell which is which: those of low rank become A
and B by a singular value decomposition, cut where singular values are no larger than what rounding
the weights makes, and what is not of low rank is replaced whole. The result is an ordinary LoRA of
PEFT's.

arXiv 2406.10973; samar-khanna/ExPLoRA. Offline only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polyadapt.adapters.families.conversion import (
    PEFT_PREFIX,
    Converted,
    Given,
    Stored,
    is_in_base,
    some,
)
from polyadapt.errors import StartupError

if TYPE_CHECKING:
    import torch

# Last components of the paths of embeddings, as transformers' models name them. Their rows are no
# outputs of a product, and a head may share them.
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "wpe", "embed_in", "word_embeddings"})
_PARAMETERS = frozenset({"weight", "bias"})
# Times the largest singular value that is to be expected of rounding alone.
_MARGIN = 2.0


@dataclass(slots=True)
class _Found:
    """What the differences are."""

    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # A, B
    replaced: list[str] = field(default_factory=list)  # paths of modules
    num_equal: int = 0  # tensors
    num_rounded: int = 0  # modules whose difference is rounding
    largest_residual: float = 0.0  # of an element of W, by what was cut off
    largest_rounding: float = 0.0  # of an element of W


def from_merged(source: Stored, given: Given) -> Converted:
    """Every `<module>.weight` and `.bias` of the base that is another one in the source."""
    base = given.base
    if base is None:
        raise StartupError("what was trained is the difference to the base; give --base")
    extra = [key for key in source.tensors if key not in base]
    strange = [key for key in extra if not is_in_base(key, source.tensors[key], base)]
    if strange:
        raise StartupError(
            f"{len(strange)} tensors of the source are none of the base's: {some(strange)}; give "
            "the base that it was trained from, and the source without its own heads"
        )
    changed, is_rounded = _changed(source.tensors, base)
    _check(changed, base)
    found = _Found(num_equal=len(source.tensors) - sum(map(len, changed.values())))
    for path, names in sorted(changed.items()):
        if not all(source.tensors[f"{path}.{name}"].isfinite().all() for name in names):
            raise StartupError(f"{path} of the source holds NaN or infinity")
        factors = None
        if names == ["weight"] and base[f"{path}.weight"].dim() == 2:
            factors = _factors(
                source.tensors[f"{path}.weight"],
                base[f"{path}.weight"],
                given.rank,
                found,
                is_rounded=is_rounded,
            )
        if factors is None:
            found.replaced.append(path)
        elif len(factors[0]):
            found.factors[path] = factors
        else:
            found.num_rounded += 1
    if not found.factors:
        raise StartupError(
            "no weight differs from the base's by a matrix of low rank: there is no adapter in "
            f"the source, which changes {len(changed)} modules"
        )
    missing = [key for key in base if key not in source.tensors]
    return Converted(_tensors(found, source.tensors, base), _config(found), _notes(found, missing))


# --------------------------------------------------------------------------- differences
def _changed(
    tensors: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]
) -> tuple[dict[str, list[str]], bool]:
    """Path of a module -> those of its parameters that are not the base's; and whether one of both
    models was rounded to a coarser dtype.
    """
    import torch

    changed: dict[str, list[str]] = {}
    is_rounded = False
    for key, tensor in tensors.items():
        if key not in base:
            continue
        if tensor.shape != base[key].shape:
            raise StartupError(
                f"{key} has shape {list(tensor.shape)} and {list(base[key].shape)} in the base; "
                "give the base that it was trained from"
            )
        if not _is_same(tensor, base[key]):
            path, _, name = key.rpartition(".")
            changed.setdefault(path, []).append(name)
        elif not torch.equal(tensor.double(), base[key].double()):
            is_rounded = True
    return changed, is_rounded


def _is_same(new: torch.Tensor, old: torch.Tensor) -> bool:
    """Whether one of them is the other one as its dtype holds it."""
    import torch

    return torch.equal(new.to(old.dtype), old) or torch.equal(old.to(new.dtype), new)


def _check(changed: Mapping[str, list[str]], base: Mapping[str, torch.Tensor]) -> None:
    """Raise StartupError for differences that no adapter says."""
    odd = [
        f"{path}.{name}"
        for path, names in changed.items()
        for name in names
        if name not in _PARAMETERS
        or base[f"{path}.{name}"].dim() > 2
        or not base[f"{path}.{name}"].is_floating_point()
    ]
    if odd:
        raise StartupError(f"{len(odd)} tensors have no place in an adapter: {some(odd)}")
    tables = [path for path in changed if path.rpartition(".")[2] in _EMBEDDINGS]
    if tables:
        raise StartupError(
            f"{some(tables)} differs from the base's: a trained embedding is none of ExPLoRA's, "
            "and a head may share it; give the base that the source was trained from"
        )
    for key, tensor in base.items():
        bias = base.get(f"{key.removesuffix('.weight')}.bias")
        if tensor.dim() == 2 and bias is not None and len(bias) != len(tensor):
            raise StartupError(
                f"{key} of shape {list(tensor.shape)} has {len(bias)} biases: the base keeps its "
                "weights input first, as GPT-2 does, which is not read here"
            )


def _factors(
    new: torch.Tensor,
    old: torch.Tensor,
    max_rank: int | None,
    found: _Found,
    *,
    is_rounded: bool,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A [rank, in] and B [out, rank] of a weight's difference, rank 0 where it is rounding; None
    where a whole difference takes less.

    Rows that are equal, as those of the keys in a fused projection, get zeros in B.
    """
    import torch

    difference = new.double() - old.double()
    rows = difference.any(1)
    u, s, vh = torch.linalg.svd(difference[rows], full_matrices=False)
    # Rounding moves an element by at most half a unit in its last place, evenly, hence with a
    # deviation of at most eps |w| / sqrt(12); a random m x n matrix of deviation d has hardly ever
    # a singular value above d (sqrt(m) + sqrt(n)).
    moved = _rounding(new[rows])
    if is_rounded:
        moved = math.hypot(moved, _rounding(old[rows]))
    floor = _MARGIN * moved / math.sqrt(12) * sum(map(math.sqrt, difference[rows].shape))
    rank, (num_out, num_in) = int((s > floor).sum()), new.shape
    is_low = rank * (num_out + num_in) < num_out * num_in
    if not is_low or rank > (max_rank or rank):
        return None
    root = s[:rank].sqrt()
    b = torch.zeros(num_out, rank, dtype=torch.float64)
    b[rows] = u[:, :rank] * root
    a = root[:, None] * vh[:rank]
    residual = float((difference - b @ a).abs().max())
    found.largest_residual = max(found.largest_residual, residual)
    largest = torch.finfo(new.dtype).eps / 2 * float(new.abs().max())
    found.largest_rounding = max(found.largest_rounding, largest)
    return a.float(), b.float()


def _rounding(weight: torch.Tensor) -> float:
    """The distance between neighbouring numbers of the weight's dtype, at its mean square."""
    import torch

    eps: float = torch.finfo(weight.dtype).eps
    return eps * float(weight.double().square().mean().sqrt())


# --------------------------------------------------------------------------- the adapter
def _tensors(
    found: _Found, tensors: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    for path, (a, b) in found.factors.items():
        made[f"{PEFT_PREFIX}{path}.lora_A.weight"] = a
        made[f"{PEFT_PREFIX}{path}.lora_B.weight"] = b
    for path in found.replaced:
        for name in sorted(_PARAMETERS):
            key = f"{path}.{name}"
            if key in base:
                made[f"{PEFT_PREFIX}{key}"] = tensors.get(key, base[key])
    return made


def _config(found: _Found) -> dict[str, Any]:
    """A and B are the whole difference, so every module's alpha is its rank."""
    ranks = {path: len(a) for path, (a, _) in found.factors.items()}
    largest = max(ranks.values())
    others = {path: rank for path, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "modules_to_save": found.replaced or None,
        "bias": "none",
    }


def _notes(found: _Found, missing: list[str]) -> tuple[str, ...]:
    ranks = sorted({len(a) for a, _ in found.factors.values()})
    notes = [
        f"{len(found.factors)} modules have a difference of rank {' or '.join(map(str, ranks))}; "
        f"what was cut off is at most {found.largest_residual:.1e} in an element, where rounding "
        f"the weights is up to {found.largest_rounding:.1e}",
        f"{found.num_equal} tensors are the base's own and were left out",
    ]
    if found.num_rounded:
        notes.append(f"{found.num_rounded} modules differ by rounding alone and were left out")
    if found.replaced:
        notes.append(f"{len(found.replaced)} modules are replaced whole: {some(found.replaced)}")
    if missing:
        notes.append(
            f"{len(missing)} tensors of the base are not in the source and stay as they are: "
            f"{some(missing)}"
        )
    return tuple(notes)
