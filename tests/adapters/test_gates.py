"""What each adapter of a request does, and what cannot be asked of it. No torch."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from polyadapt.adapters.adapter import Option, Probe, Traits
from polyadapt.adapters.gates import NEVER, GatedAdapter, Probing, arrange, at_rest
from polyadapt.errors import InvalidRequest, PolicyConflict, UnsupportedField
from polyadapt.types import AdapterId, AppliedAdapter, OptionValue

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


# --------------------------------------------------------------------------- options
PARTS = Option(
    "parts", "words", "which parts", ("p", "q", "r"), ("p", "q", "r"),
    components=((0, 2), (2, 3), (3, 5)),
)  # fmt: skip
CHOOSING = Traits(
    options=(
        PARTS,
        Option("limit", "count", "how many", 4, least=1, most=9),
        Option("weight", "number", "how much", 1.0, least=-2, most=2),
        Option("is_late", "flag", "when", False),
        Option("mode", "word", "how", "slow", ("slow", "fast")),
        Option("after", "count", "from when on", least=0, most=9),
    )
)


def choose(**options: OptionValue) -> AppliedAdapter:
    chosen = tuple(sorted(options.items()))
    return AppliedAdapter(AdapterId("a", 1, "sha256:a"), options=chosen)


@pytest.mark.parametrize(
    ("parts", "weights"),
    [
        ((), (0.0,) * 5),
        (("p",), (1.0, 1.0, 0.0, 0.0, 0.0)),
        (("q",), (0.0, 0.0, 1.0, 0.0, 0.0)),
        (("r", "p"), (1.0, 1.0, 0.0, 1.0, 1.0)),
        (("p", "r"), (1.0, 1.0, 0.0, 1.0, 1.0)),
    ],
)
def test_parts_that_are_not_chosen_weigh_nothing(parts, weights):
    found = gate(CHOOSING, choose(parts=parts))
    assert found.weights == weights
    assert found.is_gated
    assert found.options == (("parts", tuple(sorted(parts))),), "in the adapter's order"


def test_what_an_adapter_does_by_itself_may_be_less_than_all_of_its_parts():
    some = Traits(options=(Option("parts", "words", "", ("q",), PARTS.words,
                                  components=PARTS.components),))  # fmt: skip
    assert gate(some).weights == (0.0, 0.0, 1.0, 0.0, 0.0)
    assert gate(some, choose(parts=("p", "q", "r"))).weights == ()
    assert gate(some, choose(parts=("p", "q"))).weights == (1.0, 1.0, 1.0, 0.0, 0.0)


def test_parts_of_a_nested_adapter_weigh_what_its_rank_makes_of_them():
    both = Traits(nested_rank=4, options=(PARTS,))
    applied = AppliedAdapter(AdapterId("a", 1, "sha256:a"), 1.0, 2, (("parts", ("q", "p")),))
    assert gate(both, applied).weights == (2.0, 2.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({}, ()),
        ({"parts": ("r", "q", "p")}, ()),
        ({"limit": 4, "weight": 1, "is_late": False, "mode": "slow"}, ()),
        ({"limit": 9}, (("limit", 9),)),
        ({"weight": 2, "limit": 1}, (("limit", 1), ("weight", 2.0))),
        ({"weight": -0.0}, (("weight", 0.0),)),
        ({"mode": "fast", "is_late": True}, (("is_late", True), ("mode", "fast"))),
        ({"after": 0}, (("after", 0),)),
    ],
)
def test_options_have_one_form_for_one_meaning(given, meant):
    found = gate(CHOOSING, choose(**given))
    assert found.options == meant
    assert [type(value) for _, value in found.options] == [type(value) for _, value in meant]
    assert str(found.options) == str(meant), "0.0 is not -0.0"
    assert not found.weights


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("parts", ("p", "x"), "a list of some of 'p', 'q', 'r'"),
        ("parts", ("p", "p"), "each once"),
        ("parts", "p", "a list of some of 'p', 'q', 'r'"),
        ("parts", True, "a list of some of"),
        ("limit", 0, "a whole number from 1 to 9"),
        ("limit", 10, "a whole number from 1 to 9"),
        ("limit", 2.0, "a whole number"),
        ("limit", True, "a whole number"),
        ("limit", "2", "a whole number"),
        ("weight", 2.5, "a number from -2 to 2"),
        ("weight", float("nan"), "a number"),
        ("weight", False, "a number"),
        ("is_late", 1, "true or false"),
        ("mode", "Slow", "one of 'slow', 'fast'"),
        ("mode", ("slow",), "one of 'slow', 'fast'"),
    ],
)
def test_a_value_that_an_option_does_not_have_is_refused_by_name(name, value, expected):
    error = refused([use("b"), choose(**{name: value})], [Traits(), CHOOSING])
    assert (error.code, error.param) == ("invalid_request", f"adapters[1].options.{name}")
    assert expected in error.message
    assert "'a'" in error.message


def test_an_option_that_an_adapter_does_not_have_is_refused_with_those_it_has():
    for traits, said in [(CHOOSING, "'parts', 'limit', 'weight'"), (Traits(), "it has none")]:
        error = refused([choose(tempo=3)], [traits])
        assert isinstance(error, UnsupportedField)
        assert error.param == "adapters[0].options.tempo"
        assert said in error.message


def test_many_words_are_not_all_listed():
    words = tuple(f"w{i}" for i in range(40))
    many = Traits(options=(Option("mode", "word", "", words=words),))
    error = refused([choose(mode="x" * 300)], [many])
    assert "and 24 more" in error.message
    assert len(error.message) < 500


# --------------------------------------------------------------------------- squared scales
@pytest.mark.parametrize(("given", "acting"), [(1.0, 1.0), (0.5, 0.25), (-2.0, 4.0), (0.0, 0.0)])
def test_a_scale_that_multiplies_both_matrices_acts_squared(given, acting):
    squared = gate(Traits(is_scale_squared=True), use("a", given))
    assert squared.applied == use("a", acting)
    assert gate(Traits(), use("a", given)).applied == use("a", given)


# --------------------------------------------------------------------------- policies
def test_what_a_policy_demands_is_told_from_what_a_caller_asks():
    traits = [Traits(replaced=("x.weight",)), Traits(replaced=("x.weight",), is_scalable=False)]
    own, mandatory = use("p"), replace(use("q"), is_mandatory=True)
    assert not isinstance(refused([own, use("q")], traits), PolicyConflict)
    for pair in ([own, mandatory], [mandatory, own]):
        error = refused(pair, traits)
        assert isinstance(error, PolicyConflict)
        assert error.param == "adapters"
        assert "'q' is mandatory" in error.message
    error = refused([own, replace(mandatory, scale=0.5)], [Traits(), traits[1]])
    assert isinstance(error, PolicyConflict)
    assert error.param is None, "the caller has no such entry"
    assert "'q'" in error.message
    assert not isinstance(
        refused([use("p", 0.5), mandatory], [traits[1], Traits()]), PolicyConflict
    )


# --------------------------------------------------------------------------- a first pass
PROBE = Probe((4, 6), 2, top_k=1, scale=0.5)
WEIGHED = Traits(options=PROBE.options, probe=PROBE)
AT_REST = Probe((4, 6), 2, resting=0.25, scale=0.5)
RESTING = Traits(options=AT_REST.options, probe=AT_REST)


def test_what_a_request_says_nothing_of_is_as_the_adapter_has_it():
    found = gate(WEIGHED)
    assert found.probing == Probing(6, 1, 0.5, 0.0)
    assert not found.is_approximate
    said = gate(WEIGHED, choose(top_k=1, global_scaling_weight=0.5))
    assert (said.probing, said.options) == (found.probing, ())
    assert gate(Traits()).probing is None


def test_a_request_chooses_of_a_probe_what_it_offers():
    found = gate(WEIGHED, choose(top_k=2, global_scaling_weight=2), prompt=(1, 2, 3))
    assert found.probing == Probing(6, 2, 2.0, 0.0)
    assert found.options == (("global_scaling_weight", 2.0), ("top_k", 2))
    found = gate(WEIGHED, choose(frozen_after=4), prompt=(1, 2, 3))
    assert found.probing == Probing(6, 1, 0.5, 0.0, frozen_from=7)
    assert found.is_approximate
    assert found.options == (), "pages before that position are as without it"


def test_at_scale_zero_nothing_is_weighed():
    assert gate(WEIGHED, use("a", 0.0)).probing is None


def test_only_who_acts_in_the_first_pass_rests_there():
    lanes = arrange([use("a"), use("b")], [WEIGHED, Traits()], (1,))
    assert at_rest(lanes) == ()
    (lane,) = at_rest(arrange([use("a"), use("b")], [RESTING, Traits()], (1,)))
    assert lane.is_resting
    assert lane.probing is not None
    assert lane.probing.resting == 0.125, "as strong as the experts are then"


def test_two_adapters_do_not_share_a_first_pass_in_which_one_acts():
    error = refused([use("a"), use("b")], [WEIGHED, RESTING])
    assert "'b' acts itself" in error.message
    assert error.param == "adapters"
    arrange([use("a"), use("b")], [WEIGHED, WEIGHED], (1,))
    arrange([use("a", 0.0), use("b")], [WEIGHED, RESTING], (1,))


# --------------------------------------------------------------------------- signatures
def marked(num_bits: int = 6, size: int = 2, *, zero: float = -1.0) -> Traits:
    parts = tuple((i * size, (i + 1) * size) for i in range(num_bits))
    bits = Option("signature", "bits", "whose", least=zero, most=1.0, components=parts)
    return Traits(options=(bits,))


def signed(value: OptionValue, *, is_mandatory: bool = True) -> AppliedAdapter:
    options = (("signature", value),)
    return replace(use("a"), options=options, is_mandatory=is_mandatory)


@pytest.mark.parametrize("said", ["011010", "1a", "1A"])
def test_bits_weigh_their_components_and_have_one_form(said):
    found = gate(marked(), signed(said))
    assert found.options == (("signature", "011010"),)
    assert found.weights == (-1.0, -1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0)
    assert found.is_gated
    assert gate(marked(zero=0.0), signed(said)).weights[:4] == (0.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize(
    "said", ["01101", "0110100", "4a", "zz", "", 26, True, ("0", "1"), "01101\n"]
)
def test_what_says_no_such_bits_is_the_policys_fault_and_not_shown(said):
    with pytest.raises(PolicyConflict, match="expected 6 bits") as caught:
        gate(marked(), signed(said))
    assert "is none, expected" in caught.value.message


def test_one_bit_is_one_character():
    assert gate(marked(1), signed("1")).options == (("signature", "1"),)
    with pytest.raises(PolicyConflict):
        gate(marked(1), signed("2"))


def test_bits_that_nobody_gave_are_the_policys_fault():
    with pytest.raises(PolicyConflict, match="has no signature"):
        gate(marked(), replace(use("a"), is_mandatory=True))


@pytest.mark.parametrize("applied", [use("a"), signed("011010", is_mandatory=False)])
def test_a_request_neither_chooses_bits_nor_does_without(applied):
    error = refused([applied], [marked()])
    assert error.param == "adapters[0]"
    assert "011010" not in error.message


@pytest.mark.parametrize(("prompt", "first"), [((5,), 0), ((1, 2, 3), 2)])
def test_what_is_for_the_first_token_acts_on_the_prompts_last_row_alone(prompt, first):
    found = gate(Traits(is_for_first_token=True), prompt=prompt)
    assert (found.first, found.stop) == (first, first + 1)
    assert found.is_gated
    assert found.is_invoked, "its place tells pages apart"
