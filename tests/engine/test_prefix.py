"""The keys of cached pages: every part of them counts, and nothing else does. No torch."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from hashlib import sha256

import pytest

from polyadapt.engine.prefix import PageKeys, encode
from polyadapt.types import AdapterId, AppliedAdapter, Request, SamplingParams

ENGINE = {"base_digest": "sha256:base", "kv_dtype": "float32", "page_size": 4, "is_exact": False}
A = AppliedAdapter(AdapterId("a", 1, "sha256:a"))
B = AppliedAdapter(AdapterId("b", 1, "sha256:b"))
REQUEST = Request("r", (1, 2, 3, 4, 5), SamplingParams(4), (A,), cache_salt=("tenant",))


def root(request: Request = REQUEST, identities: tuple[str, ...] | None = None, **engine) -> bytes:
    if identities is None:
        identities = tuple(applied.adapter.digest for applied in request.adapters)
    return PageKeys(**{**ENGINE, **engine}).root(request, identities)


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
    assert root(identities=("",)) == base
    assert root(replace(REQUEST, adapters=(replace(A, scale=0.5),)), identities=("",)) == base
    both = replace(REQUEST, adapters=(A, B))
    assert root(both, identities=("", B.adapter.digest)) == root(replace(REQUEST, adapters=(B,)))


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
