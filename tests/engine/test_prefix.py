"""The keys of cached pages: every part of them counts, and nothing else does. No torch."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from hashlib import sha256

import pytest

from polyadapt.adapters.gates import NEVER, GatedAdapter, Probing
from polyadapt.engine.prefix import PageKeys, encode
from polyadapt.types import AdapterId, AppliedAdapter, Options, Request, SamplingParams

ENGINE = {"base_digest": "sha256:base", "kv_dtype": "float32", "page_size": 4, "is_exact": False}
A = AppliedAdapter(AdapterId("a", 1, "sha256:a"))
B = AppliedAdapter(AdapterId("b", 1, "sha256:b"))
REQUEST = Request("r", (1, 2, 3, 4, 5), SamplingParams(4), (A,), cache_salt=("tenant",))


def lanes(request: Request, neutral: tuple[AppliedAdapter, ...] = ()) -> list[GatedAdapter]:
    return [
        GatedAdapter(applied, place, is_kv_neutral=applied in neutral)
        for place, applied in enumerate(request.adapters)
    ]


def root(request: Request = REQUEST, neutral: tuple[AppliedAdapter, ...] = (), **engine) -> bytes:
    keys = PageKeys(**{**ENGINE, **engine})
    return keys.root(request.cache_salt, lanes(request, neutral))


def invoked(first: int, applied: AppliedAdapter = A, **options) -> GatedAdapter:
    return GatedAdapter(applied, 0, first, is_invoked=True, **options)


@pytest.mark.parametrize(
    "other",
    [
        root(base_digest="sha256:other"),
        root(kv_dtype="bfloat16"),
        root(is_exact=True),
        root(replace(REQUEST, cache_salt=("tenant", "salt"))),
        root(replace(REQUEST, cache_salt=("other",))),
        root(replace(REQUEST, cache_salt=())),
        root(replace(REQUEST, adapters=())),
        root(replace(REQUEST, adapters=(B,))),
        root(replace(REQUEST, adapters=(A, B))),
        root(replace(REQUEST, adapters=(replace(A, scale=math.nextafter(1.0, 2)),))),
    ],
)
def test_every_part_of_the_root_changes_it(other):
    assert other != root()


def test_the_order_of_adapters_counts_because_sums_are_rounded():
    both = replace(REQUEST, adapters=(A, B))
    assert root(both) != root(replace(both, adapters=(B, A)))


def test_names_versions_and_sampling_do_not_count():
    renamed = AppliedAdapter(AdapterId("renamed", 7, A.adapter.digest))
    same = replace(REQUEST, id="x", adapters=(renamed,), sampling=SamplingParams(9, seed=3), n=2)
    assert root(same) == root()
    assert root(replace(REQUEST, adapters=(replace(A, scale=1),))) == root(), "1 is 1.0"


@pytest.mark.parametrize("scale", [0.0, -0.0, 0])
def test_an_adapter_at_scale_zero_is_the_base(scale):
    zero = replace(REQUEST, adapters=(replace(A, scale=scale),))
    assert root(zero) == root(replace(REQUEST, adapters=()))


def test_an_adapter_that_keeps_keys_and_values_is_the_base_at_any_scale():
    base = root(replace(REQUEST, adapters=()))
    assert root(neutral=(A,)) == base
    half = replace(A, scale=0.5)
    assert root(replace(REQUEST, adapters=(half,)), neutral=(half,)) == base
    both = replace(REQUEST, adapters=(A, B))
    assert root(both, neutral=(A,)) == root(replace(REQUEST, adapters=(B,)))


def test_the_rank_counts_where_it_takes_components_away():
    keys, ranked = PageKeys(**ENGINE), replace(A, rank=4)
    roots = {
        keys.root((), [GatedAdapter(applied, 0, weights=weights)])
        for applied, weights in [
            (A, ()),
            (replace(A, rank=8), ()),  # the full rank, said aloud
            (ranked, (2.0,) * 4 + (0.0,) * 4),
            (replace(A, rank=2), (4.0,) * 2 + (0.0,) * 6),
        ]
    }
    assert len(roots) == 3


def test_options_count_as_the_gates_read_them():
    keys = PageKeys(**ENGINE)
    asked = replace(A, options=(("x", 1),))
    base = keys.root((), [GatedAdapter(A, 0)])
    assert keys.root((), [GatedAdapter(asked, 0)]) == base, "it says what the adapter does anyway"
    chosen: list[Options] = [
        (("x", 1),), (("x", 1.0),), (("x", True),), (("x", "1"),), (("x", ("1",)),), (("x", ()),),
        (("y", 1),), (("x", 1), ("y", 1)),
    ]  # fmt: skip
    roots = {keys.root((), [GatedAdapter(A, 0, options=options)]) for options in chosen}
    assert len(roots | {base}) == len(chosen) + 1
    turns = [keys.turns([invoked(4, options=options)])[1] for options in ((), *chosen)]
    assert len(set(turns)) == len(turns)


def weighed(frozen_from: int = NEVER, **options) -> GatedAdapter:
    return GatedAdapter(A, 0, probing=Probing(6, 0, 1.0, 0.5, frozen_from), **options)


def test_weights_that_stay_join_at_the_page_from_which_they_do():
    keys = PageKeys(**ENGINE)  # pages of 4
    assert keys.root((), [weighed(9)]) == keys.root((), [weighed()])
    assert keys.turns([weighed()]) == {}
    found = [keys.turns([weighed(at)]) for at in (8, 9, 11, 12)]
    assert [list(turns) for turns in found] == [[2], [2], [2], [3]]
    assert len({*(turns[2] for turns in found[:3]), found[3][3]}) == 4, "the position counts"
    chosen = weighed(9, options=(("top_k", 1),))
    assert keys.turns([chosen])[2] != keys.turns([weighed(9)])[2]
    assert keys.turns([weighed(9, is_kv_neutral=True)]) == {}


def test_a_first_pass_in_which_an_adapter_acts_is_neither_the_bases_nor_the_adapters():
    keys = PageKeys(**ENGINE)
    resting = weighed(9, is_resting=True)
    assert keys.turns([resting]) == {}, "it ends where the weights begin to stay"
    assert len({keys.root((), [resting]), keys.root((), [weighed()]), keys.root((), [])}) == 3


def test_an_invoked_adapter_joins_at_the_page_of_its_first_position():
    keys = PageKeys(**ENGINE)  # pages of 4
    base = keys.root((), [])
    assert keys.root((), [invoked(9)]) == base
    for first, page in [(0, 0), (3, 0), (4, 1), (9, 2)]:
        assert list(keys.turns([invoked(first)])) == [page]
    assert keys.turns([invoked(NEVER)]) == {}
    assert keys.turns([invoked(9, replace(A, scale=0.0))]) == {}
    assert keys.turns([invoked(9, is_kv_neutral=True)]) == {}
    parent = keys.page(base, (1, 2, 3, 4))
    turned = {
        keys.turn(parent, joined)
        for lane in (invoked(4), invoked(5), invoked(4, B), invoked(4, replace(A, scale=0.5)))
        for joined in keys.turns([lane]).values()
    }
    assert len(turned) == 4, "position, digest and scale count"
    assert parent not in turned
    both = keys.turns([invoked(4), invoked(6, B)])
    assert list(both) == [1]
    assert keys.turn(parent, both[1]) not in turned


def test_a_page_hangs_on_its_parent_and_its_tokens():
    keys = PageKeys(**ENGINE)
    first = keys.page(root(), (1, 2, 3, 4))
    assert keys.page(root(), (1, 2, 3, 4)) == first
    others = [
        keys.page(root(replace(REQUEST, adapters=())), (1, 2, 3, 4)),
        keys.page(first, (1, 2, 3, 4)),
        keys.page(root(), (1, 2, 4, 3)),
        keys.page(root(), (0, 2, 3, 4)),
    ]
    assert len({first, *others}) == 5


def test_a_pages_key_is_the_hash_of_the_encoded_pair():
    parent, tokens = root(), (1, 70_000, 3, 2**31 - 1)
    expected = sha256(encode((parent, struct.pack("<4i", *tokens)))).digest()
    assert PageKeys(**ENGINE).page(parent, tokens) == expected


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c"), ("a", "bc")),
        (("a",), ("a", "")),
        ((("a",), "b"), (("a", "b"),)),
        ("a", b"a"),
        (1, True),
        (0, False),
        (1, 1.0),
        (None, ()),
        (0.5, 0.25),
    ],
)
def test_no_two_values_have_one_encoding(one, other):
    assert encode(one) != encode(other)


def test_what_has_no_encoding_is_refused():
    with pytest.raises(TypeError, match="list"):
        encode(([1],))
