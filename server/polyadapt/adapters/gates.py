"""The request moment: from where on, and how strongly, each adapter of a request acts. Torch-free.

Knows adapters by their traits and a prompt by its ids; no family, no slot and no plan.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, zip_longest
from operator import itemgetter

from polyadapt.adapters.adapter import FROZEN_AFTER, PROBE_SCALE, TOP_K, Option, Traits
from polyadapt.errors import InvalidRequest, PolicyConflict, UnsupportedField
from polyadapt.types import AppliedAdapter, Options, OptionValue

NEVER = 1 << 62  # behind every position
_MAX_SHOWN = 200  # characters of a value in a message


@dataclass(frozen=True, slots=True)
class Probing:
    """How one request has an adapter's experts weighed; see adapter.Probe.

    Positions from frozen_from on have the weights of the position before it: an approximation.
    """

    width: int
    top_k: int  # 0: all
    scale: float
    resting: float  # every weight in the first pass
    frozen_from: int = NEVER


@dataclass(frozen=True, slots=True)
class GatedAdapter:
    """One adapter as one request uses it."""

    applied: AppliedAdapter  # its scale is the one that acts
    place: int  # in the caller's list
    first: int = 0  # the position of the first token that it acts on; NEVER: the base answers
    stop: int = NEVER  # the position behind the last one
    # Of its first components; empty, and of those behind: one.
    weights: tuple[float, ...] = ()
    # What the request chose, in one form for one meaning: sorted by name, numbers as floats, words
    # in the adapter's order, and nothing that is as the adapter does by itself. Choices of
    # components are in `weights` as well.
    options: Options = ()
    # Whether the prompt says where it acts, so that a page's tokens alone do not tell its content.
    is_invoked: bool = False
    is_kv_neutral: bool = False  # see Traits
    token_cost: int = 1  # see Traits
    probing: Probing | None = None  # where a first pass weighs its experts
    is_resting: bool = False  # this is what acts in that pass

    @property
    def is_gated(self) -> bool:
        """Whether it does less than to act on every row with every component."""
        return self.first > 0 or self.stop != NEVER or bool(self.weights)

    @property
    def is_approximate(self) -> bool:
        """Whether the request chose less than what the adapter itself computes."""
        return self.probing is not None and self.probing.frozen_from != NEVER


def at_rest(lanes: Sequence[GatedAdapter]) -> tuple[GatedAdapter, ...]:
    """What acts in the first pass of those that are weighed by it."""
    return tuple(
        replace(lane, is_resting=True) for lane in lanes if lane.probing and lane.probing.resting
    )


def arrange(
    adapters: Sequence[AppliedAdapter], traits: Sequence[Traits], prompt_ids: Sequence[int]
) -> tuple[GatedAdapter, ...]:
    """Return the adapters of one request, which `traits` stand beside, in the order of the lanes.

    Those that scale outputs of the base come first and those that replace parameters of it next,
    since the others add to what is then computed; the rest is in the order of the digests, so that
    sums, and with them bits and cached pages, do not depend on the order in which a caller names
    adapters.
    Raises InvalidRequest for a scale, rank or option that an adapter does not have, and for two
    that replace the same parameter; where one of them is mandatory, PolicyConflict.
    """
    gated = [
        _gate_or_blame(place, applied, own, prompt_ids)
        for place, (applied, own) in enumerate(zip(adapters, traits, strict=True))
    ]
    _check_replaced(adapters, traits)
    _check_probed(gated)
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


def _gate_or_blame(
    place: int, applied: AppliedAdapter, traits: Traits, prompt_ids: Sequence[int]
) -> GatedAdapter:
    """The same as _gate; a caller is not blamed for what its policy says."""
    try:
        return _gate(place, applied, traits, prompt_ids)
    except InvalidRequest as error:
        if not applied.is_mandatory:
            raise
        raise PolicyConflict(
            f"the policy's adapter '{applied.adapter.name}' cannot be served so: {error.message}"
        ) from None


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
    options = _options(place, applied, traits)
    first, stop = _first(traits.invocation, prompt_ids), NEVER
    if traits.is_for_first_token:
        first, stop = len(prompt_ids) - 1, len(prompt_ids)
    acting = applied.scale**2 if traits.is_scale_squared else applied.scale
    return GatedAdapter(
        replace(applied, scale=acting),
        place,
        first=first,
        stop=stop,
        weights=_product(_of_rank(place, applied, traits), _of_components(traits, options)),
        options=tuple(option for option in options if option[0] != FROZEN_AFTER),
        is_invoked=bool(traits.invocation) or traits.is_for_first_token,
        is_kv_neutral=traits.is_kv_neutral,
        token_cost=traits.token_cost if applied.scale != 0.0 else 1,
        probing=_probing(applied, traits, dict(options), len(prompt_ids)),
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


def _of_rank(place: int, applied: AppliedAdapter, traits: Traits) -> tuple[float, ...]:
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


def _of_components(traits: Traits, options: Options) -> tuple[float, ...]:
    """0 for the components of words that are not chosen, what bits say for theirs; empty where no
    option weighs any.
    """
    weights: list[float] = []
    given = dict(options)
    for option in traits.options:
        chosen = given.get(option.name, option.default)
        if chosen is None or (option.kind == "words" and chosen == option.words):
            continue
        for i, (start, stop) in enumerate(option.components):
            assert isinstance(chosen, tuple | str), "components stand beside words or bits"
            if option.kind == "bits":
                weight = option.most if chosen[i] == "1" else option.least
            else:
                weight = 1.0 if option.words[i] in chosen else 0.0
            weights += [1.0] * (stop - len(weights))
            weights[start:stop] = [weight] * (stop - start)
    return tuple(weights)


def _product(one: tuple[float, ...], other: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(a * b for a, b in zip_longest(one, other, fillvalue=1.0))


def _options(place: int, applied: AppliedAdapter, traits: Traits) -> Options:
    """The request's options, checked and in the form that GatedAdapter promises."""
    known = {option.name: option for option in traits.options}
    found: list[tuple[str, OptionValue]] = []
    for name, value in applied.options:
        param = f"adapters[{place}].options.{name}"
        if name not in known:
            names = ", ".join(map(repr, known))
            raise UnsupportedField(
                f"adapter '{applied.adapter.name}' has no option {name!r}, it has "
                f"{f'only {names}' if names else 'none'}; leave {name!r} out",
                param=param,
            )
        option = known[name]
        is_secret = option.kind == "bits"
        if is_secret and not applied.is_mandatory:
            raise _not_by_request(place, applied)
        meant = _read(option, value)
        if meant is None:
            given = "none" if is_secret else _shown(value)
            raise InvalidRequest(
                f"option {name!r} of adapter '{applied.adapter.name}' is {given}, expected "
                f"{option.expected}",
                param=param,
            )
        if meant != option.default:
            found.append((name, meant))
    given_names = {name for name, _ in found}
    for name, option in known.items():
        if option.kind == "bits" and name not in given_names:
            if not applied.is_mandatory:
                raise _not_by_request(place, applied)
            raise InvalidRequest(
                f"it has no {name}, without which it says of nobody who asked; give the policy "
                f"{option.expected}",
                param=f"adapters[{place}].options.{name}",
            )
    return tuple(sorted(found, key=itemgetter(0)))


def _not_by_request(place: int, applied: AppliedAdapter) -> InvalidRequest:
    return InvalidRequest(
        f"adapter '{applied.adapter.name}' tells who asks, so it is applied as the server's policy "
        "says and never as a request does; leave it out",
        param=f"adapters[{place}]",
    )


def _read(option: Option, value: OptionValue) -> OptionValue | None:
    """The value in its one form; None if it is none of the option's."""
    if option.kind == "words":
        if not isinstance(value, tuple) or len(set(value)) < len(value):
            return None
        if not set(value).issubset(option.words):
            return None
        return tuple(word for word in option.words if word in value)
    if option.kind == "word":
        return value if value in option.words else None
    if option.kind == "flag":
        return value if isinstance(value, bool) else None
    if option.kind == "bits":
        return read_bits(value, len(option.components))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and option.kind == "count":
        return None
    if not option.least <= value <= option.most:
        return None
    return value if option.kind == "count" else float(value) + 0.0  # -0.0 is 0.0


def read_bits(value: OptionValue, num_bits: int) -> str | None:
    """The bits as characters 0 and 1; None if the value says no `num_bits` bits.

    Of hexadecimal digits the first holds the first bits; where they have room for more than
    num_bits the first of them are 0 and stand for nothing.
    """
    if not isinstance(value, str):
        return None
    if len(value) == num_bits and set(value) <= {"0", "1"}:
        return value
    is_hex = len(value) == -(-num_bits // 4) and all(c in string.hexdigits for c in value)
    bits = f"{int(value, 16):0{num_bits}b}" if is_hex else ""
    return bits if len(bits) == num_bits else None


def _shown(value: OptionValue) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _probing(
    applied: AppliedAdapter, traits: Traits, options: dict[str, OptionValue], num_prompt: int
) -> Probing | None:
    """None where nothing is weighed: no experts, or all of them at scale 0."""
    probe = traits.probe
    if probe is None or applied.scale == 0.0:
        return None
    top_k, scale = options.get(TOP_K, probe.top_k), options.get(PROBE_SCALE, probe.scale)
    frozen_after = options.get(FROZEN_AFTER)
    assert isinstance(top_k, int)
    assert isinstance(scale, float)
    assert frozen_after is None or isinstance(frozen_after, int)
    return Probing(
        probe.width,
        top_k,
        scale,
        resting=scale * probe.resting,
        frozen_from=NEVER if frozen_after is None else num_prompt + frozen_after,
    )


def _check_probed(gated: Sequence[GatedAdapter]) -> None:
    """Raise InvalidRequest for a first pass that two adapters would have different."""
    probed = [lane for lane in gated if lane.probing is not None]
    if len(probed) > 1 and (resting := at_rest(probed)):
        names = " and ".join(f"'{lane.applied.adapter.name}'" for lane in probed)
        raise InvalidRequest(
            f"adapters {names} are weighed by a first pass, in which "
            f"'{resting[0].applied.adapter.name}' acts itself; use them in requests of their own",
            param="adapters",
        )


def _check_replaced(adapters: Sequence[AppliedAdapter], traits: Sequence[Traits]) -> None:
    """Raise InvalidRequest for two adapters that replace one parameter; scale 0 replaces none."""
    used = [pair for pair in zip(adapters, traits, strict=True) if pair[0].scale != 0.0]
    for (one, own), (other, others) in combinations(used, 2):
        both = sorted(set(own.replaced) & set(others.replaced))
        if not both:
            continue
        message = (
            f"adapters '{one.adapter.name}' and '{other.adapter.name}' both replace "
            f"{both[0]} of the base and cannot be served together"
        )
        mandatory = [a.adapter.name for a in (one, other) if a.is_mandatory]
        if mandatory:
            raise PolicyConflict(
                f"{message}; '{mandatory[0]}' is mandatory by policy", param="adapters"
            )
        raise InvalidRequest(f"{message}; leave one of them out", param="adapters")
