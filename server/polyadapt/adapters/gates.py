"""The request moment: from where on, and how strongly, each adapter of a request acts. Torch-free.

Knows adapters by their traits and a prompt by its ids; no family, no slot and no plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from polyadapt.adapters.adapter import Traits
from polyadapt.errors import InvalidRequest
from polyadapt.types import AppliedAdapter

NEVER = 1 << 62  # behind every position


@dataclass(frozen=True, slots=True)
class GatedAdapter:
    """One adapter as one request uses it."""

    applied: AppliedAdapter
    place: int  # in the caller's list
    first: int = 0  # the position of the first token that it acts on; NEVER: the base answers
    # Of its first components; empty, and of those behind: one.
    weights: tuple[float, ...] = ()
    # Whether it acts from an invocation on, so that its tokens alone do not tell a page's content.
    is_invoked: bool = False
    is_kv_neutral: bool = False  # see Traits

    @property
    def is_gated(self) -> bool:
        """Whether it does less than to act on every row with every component."""
        return self.first > 0 or bool(self.weights)


def arrange(
    adapters: Sequence[AppliedAdapter], traits: Sequence[Traits], prompt_ids: Sequence[int]
) -> tuple[GatedAdapter, ...]:
    """Return the adapters of one request, which `traits` stand beside, in the order of the lanes.

    Those that scale outputs of the base come first and those that replace parameters of it next,
    since the others add to what is then computed; the rest is in the order of the digests, so that
    sums, and with them bits and cached pages, do not depend on the order in which a caller names
    adapters.
    Raises InvalidRequest for a scale or rank that an adapter does not have, and for two that
    replace the same parameter.
    """
    gated = [
        _gate(place, applied, own, prompt_ids)
        for place, (applied, own) in enumerate(zip(adapters, traits, strict=True))
    ]
    _check_replaced(adapters, traits)
    order = sorted(
        range(len(gated)),
        key=lambda i: (
            not traits[i].is_scaling,
            not traits[i].replaced,
            adapters[i].adapter.digest,
            i,
        ),
    )
    return tuple(gated[i] for i in order)


def _gate(
    place: int, applied: AppliedAdapter, traits: Traits, prompt_ids: Sequence[int]
) -> GatedAdapter:
    name = applied.adapter.name
    if applied.scale not in (0.0, 1.0) and not traits.is_scalable:
        raise InvalidRequest(
            f"adapter '{name}' replaces weights of the base and cannot be scaled by "
            f"{applied.scale:g}; use a scale of 1 or 0",
            param=f"adapters[{place}].scale",
        )
    return GatedAdapter(
        applied,
        place,
        first=_first(traits.invocation, prompt_ids),
        weights=_weights(place, applied, traits),
        is_invoked=bool(traits.invocation),
        is_kv_neutral=traits.is_kv_neutral,
    )


def _first(invocation: tuple[int, ...], prompt_ids: Sequence[int]) -> int:
    """Where the last occurrence of the invocation tokens in the prompt begins; NEVER if there is
    none, 0 for an adapter without.

    As huggingface/peft:src/peft/tuners/lora/variants.py, calculate_alora_offsets: the prompt alone
    is searched, never what is generated.
    """
    if not invocation:
        return 0
    head, size = invocation[0], len(invocation)
    for start in range(len(prompt_ids) - size, -1, -1):
        if prompt_ids[start] == head and tuple(prompt_ids[start : start + size]) == invocation:
            return start
    return NEVER


def _weights(place: int, applied: AppliedAdapter, traits: Traits) -> tuple[float, ...]:
    """R / b for the first b of a nested adapter's R components and 0 for the others: the stored
    scale is alpha / R, the truncated adapter's alpha / b.

    DyLoRA, arXiv 2210.07558; huawei-noah/Efficient-NLP:DyLoRA/loralib/layers.py multiplies both
    truncated factors by sqrt(R / b).
    """
    rank, full = applied.rank, traits.nested_rank
    if rank is None:
        return ()
    param = f"adapters[{place}].rank"
    if not full:
        raise InvalidRequest(
            f"rank is {rank}, but the components of adapter '{applied.adapter.name}' are not "
            "nested: it has no ranks to choose from; leave `rank` out",
            param=param,
        )
    if not traits.min_nested_rank <= rank <= full:
        raise InvalidRequest(
            f"rank is {rank}, adapter '{applied.adapter.name}' serves the ranks "
            f"{traits.min_nested_rank} to {full}",
            param=param,
        )
    if rank == full:
        return ()
    return (full / rank,) * rank + (0.0,) * (full - rank)


def _check_replaced(adapters: Sequence[AppliedAdapter], traits: Sequence[Traits]) -> None:
    """Raise InvalidRequest for two adapters that replace one parameter; scale 0 replaces none."""
    used = [pair for pair in zip(adapters, traits, strict=True) if pair[0].scale != 0.0]
    for (one, own), (other, others) in combinations(used, 2):
        both = sorted(set(own.replaced) & set(others.replaced))
        if both:
            raise InvalidRequest(
                f"adapters '{one.adapter.name}' and '{other.adapter.name}' both replace "
                f"{both[0]} of the base and cannot be served together; leave one of them out",
                param="adapters",
            )
