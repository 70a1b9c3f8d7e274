"""What each adapter of a request does, and what cannot be asked of it. No torch."""

from __future__ import annotations

import random

import pytest

from polyadapt.adapters.adapter import Traits
from polyadapt.adapters.gates import NEVER, GatedAdapter, arrange
from polyadapt.errors import InvalidRequest
from polyadapt.types import AdapterId, AppliedAdapter

NESTED = Traits(nested_rank=8, min_nested_rank=2)


def use(name: str, scale: float = 1.0, rank: int | None = None) -> AppliedAdapter:
    return AppliedAdapter(AdapterId(name, 1, f"sha256:{name}"), scale, rank)


def gate(traits: Traits, applied: AppliedAdapter | None = None, prompt=(1, 2)) -> GatedAdapter:
    (found,) = arrange([applied or use("a")], [traits], prompt)
    return found


def refused(adapters: list[AppliedAdapter], traits: list[Traits]) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        arrange(adapters, traits, (1, 2))
    return caught.value


def test_an_ordinary_adapter_is_not_gated():
    found = gate(Traits())
    assert (found.first, found.weights, found.is_gated) == (0, (), False)


@pytest.mark.parametrize(
    ("prompt", "first"),
    [
        ([7, 8], 0),
        ([1, 7, 8, 2], 1),
        ([7, 8, 1, 7, 8, 2], 3),
        ([7, 7, 8], 1),
        ([7, 8, 7], 0),
        ([1, 7], NEVER),
        ([8, 7], NEVER),
        ([], NEVER),
        ([7], NEVER),
    ],
)
def test_an_invoked_adapter_acts_from_the_last_invocation_on(prompt, first):
    found = gate(Traits(invocation=(7, 8)), prompt=prompt)
    assert found.first == first
    assert found.is_invoked
    assert found.is_gated == (first > 0)


def test_overlapping_invocations_count_from_the_last():
    assert gate(Traits(invocation=(7, 7)), prompt=[7, 7, 7, 1]).first == 1


@pytest.mark.parametrize("seed", range(5))
def test_the_search_equals_a_naive_one(seed):
    rng = random.Random(seed)
    for _ in range(100):
        prompt = [rng.randrange(3) for _ in range(rng.randrange(20))]
        wanted = tuple(rng.randrange(3) for _ in range(rng.randint(1, 3)))
        starts = [i for i in range(len(prompt)) if tuple(prompt[i : i + len(wanted)]) == wanted]
        found = gate(Traits(invocation=wanted), prompt=prompt)
        assert found.first == max(starts, default=NEVER)


@pytest.mark.parametrize(
    ("rank", "weights"),
    [(None, ()), (8, ()), (2, (4.0,) * 2 + (0.0,) * 6), (5, (1.6,) * 5 + (0.0,) * 3)],
)
def test_a_nested_adapter_keeps_its_first_components_times_full_over_rank(rank, weights):
    assert gate(NESTED, use("a", rank=rank)).weights == weights


@pytest.mark.parametrize("rank", [1, 9, 0, -1, 1 << 40])
def test_a_rank_that_is_not_served_names_those_that_are(rank):
    error = refused([use("a"), use("b", rank=rank)], [Traits(), NESTED])
    assert error.param == "adapters[1].rank"
    assert "2 to 8" in error.message
    assert "'b'" in error.message


@pytest.mark.parametrize("rank", [1, 8])
def test_a_rank_of_an_adapter_that_is_not_nested_is_refused(rank):
    error = refused([use("a", rank=rank)], [Traits()])
    assert error.param == "adapters[0].rank"
    assert "not nested" in error.message


def test_a_scale_that_is_not_served_is_refused():
    fixed = Traits(is_scalable=False)
    for scale in (0.0, 1.0):
        arrange([use("a", scale)], [fixed], ())
    error = refused([use("b"), use("a", 0.5)], [Traits(), fixed])
    assert error.param == "adapters[1].scale"
    assert "'a'" in error.message


def test_adapters_that_replace_come_first_and_the_rest_by_digest():
    adapters = [use("z"), use("m"), use("b"), use("y")]
    traits = [Traits(), Traits(replaced=("head",)), Traits(), Traits(replaced=("norm",))]
    lanes = arrange(adapters, traits, ())
    assert [lane.applied.adapter.name for lane in lanes] == ["m", "y", "b", "z"]
    assert [lane.place for lane in lanes] == [1, 3, 2, 0]
    swapped = arrange(adapters[::-1], traits[::-1], ())
    assert [lane.applied for lane in swapped] == [lane.applied for lane in lanes]


def test_two_that_replace_one_parameter_are_refused_by_name():
    traits = [Traits(replaced=("a.weight", "x.weight")), Traits(replaced=("x.weight", "b.bias"))]
    error = refused([use("p"), use("q")], traits)
    assert error.param == "adapters"
    assert all(word in error.message for word in ("'p'", "'q'", "x.weight"))
    arrange([use("p"), use("q", 0.0)], traits, ())
    arrange([use("p"), use("q")], [traits[0], Traits(replaced=("b.bias",))], ())


@pytest.mark.parametrize(("scaling", "replacing"), [("a", "b"), ("b", "a")])
def test_what_scales_the_base_comes_before_what_replaces_other_parameters(
    scaling: str, replacing: str
) -> None:
    traits = [
        Traits(replaced=("lm_head.weight",), is_scalable=False),
        Traits(replaced=("q_proj.weight",), is_scaling=True, is_scalable=False),
    ]
    lanes = arrange([use(replacing), use(scaling)], traits, [1, 2])
    assert [lane.applied.adapter.name for lane in lanes] == [scaling, replacing]
