"""Page ids: owners, sharing, what stays cached, and in which order it goes. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polyadapt.engine.pages import PageAllocator


def key(*tokens: int) -> bytes:
    return bytes(tokens)


def filled(pages: PageAllocator, *keys: bytes) -> list[int]:
    """A sequence whose full pages lie under the keys."""
    owned: list[int] = []
    assert pages.extend(owned, len(keys) * pages.page_size)
    owned[:] = [pages.publish(page, key) for page, key in zip(owned, keys, strict=True)]
    return owned


def test_pages_refuse_to_overdraw_and_notice_a_double_owner():
    pages = PageAllocator(4, 16)
    owned: list[int] = []
    assert pages.extend(owned, 33)
    assert len(owned) == 3
    assert not pages.extend([], 17)
    assert pages.num_free == 1
    pages.check_integrity([owned])
    with pytest.raises(AssertionError, match="other owners"):
        pages.check_integrity([owned, owned[:1]])
    with pytest.raises(AssertionError, match="lost"):
        pages.check_integrity([owned[:2]])


def test_a_full_page_outlives_its_owner_and_is_shared_by_the_next():
    pages = PageAllocator(4, 2)
    first = filled(pages, key(1), key(2))
    kept = list(first)
    pages.release(first)
    assert (pages.num_used, pages.num_cached, pages.num_free) == (0, 2, 4)
    found = [pages.find(key(1)), pages.find(key(2))]
    assert found == kept
    pages.share(kept)
    pages.share(kept[:1])
    assert (pages.num_used, pages.num_cached) == (2, 0)
    pages.check_integrity([kept, kept[:1]])
    assert not pages.is_private(kept[1])


def test_pages_without_a_key_are_not_kept():
    pages = PageAllocator(4, 2)
    owned = filled(pages, key(1))
    assert pages.extend(owned, 4)
    assert pages.is_private(owned[1])
    pages.release(owned)
    assert (pages.num_cached, pages.num_free) == (1, 4)


def test_the_end_of_a_chain_goes_before_what_it_hangs_on_and_old_chains_before_new():
    pages = PageAllocator(4, 1)
    old, new = filled(pages, key(1), key(2)), filled(pages, key(3), key(4))
    pages.release(old)
    pages.release(new)
    lost = []
    for _ in range(4):
        before = {k for k in (key(1), key(2), key(3), key(4)) if pages.find(k) is not None}
        assert pages.extend([], 1)
        after = {k for k in before if pages.find(k) is not None}
        lost += sorted(before - after)
    assert lost == [key(2), key(1), key(4), key(3)]


def test_a_chain_that_was_used_again_is_the_newest():
    pages = PageAllocator(2, 1)
    first, second = filled(pages, key(1)), filled(pages, key(2))
    again = list(first)
    pages.release(first)
    pages.release(second)
    pages.share(again)
    pages.release(again)
    assert pages.extend([], 1)
    assert pages.find(key(2)) is None
    assert pages.find(key(1)) is not None


def test_free_pages_are_taken_before_cached_ones():
    pages = PageAllocator(3, 1)
    pages.release(filled(pages, key(1)))
    owned: list[int] = []
    assert pages.extend(owned, 2)
    assert pages.find(key(1)) is not None


def test_two_sequences_that_computed_the_same_go_on_with_one_page():
    pages = PageAllocator(4, 2)
    first, second = filled(pages, key(1)), filled(pages, key(1))
    assert first == second
    assert pages.num_used == 1
    pages.check_integrity([first, second])
    pages.release(first)
    pages.check_integrity([second])
    assert pages.num_cached == 0


def test_a_forgotten_page_is_found_no_more_and_kept_by_nobody():
    pages = PageAllocator(4, 2)
    owned = filled(pages, key(1))
    other = list(owned)
    pages.share(other)
    pages.forget(owned)
    assert pages.find(key(1)) is None
    pages.check_integrity([owned, other])
    fresh = filled(pages, key(1))
    assert fresh != other
    pages.release(other)
    assert pages.find(key(1)) == fresh[0], "the key belongs to the page computed since"
    pages.release(owned)
    pages.check_integrity([fresh])
    assert (pages.num_cached, pages.num_free) == (0, 3)


def test_misuse_is_noticed():
    pages = PageAllocator(4, 2)
    owned = filled(pages, key(1))
    assert pages.extend(owned, 4)
    with pytest.raises(AssertionError, match="without a key"):
        pages.share(owned[1:])
    with pytest.raises(AssertionError, match="once"):
        pages.publish(owned[0], key(9))
    copy = list(owned)
    pages.release(owned)
    with pytest.raises(AssertionError, match="twice"):
        pages.release(copy)


@dataclass(eq=False)
class Owner:
    pages: list[int]
    path: bytes
    num_published: int


class Owners(RuleBasedStateMachine):
    """Sequences over few tokens, so that they meet; a page's content is the path to it."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageAllocator(12, 1)
        self.owners: list[Owner] = []
        self.content: dict[int, bytes] = {}  # what was written last, by page

    @rule(path=st.binary(min_size=1, max_size=6).map(lambda b: bytes(x % 2 for x in b)))
    def admit(self, path: bytes) -> None:
        found: list[int] = []
        for end in range(1, len(path)):
            page = self.pages.find(path[:end])
            if page is None:
                break
            assert self.content[page] == path[:end], "a key led to another content"
            found.append(page)
        self.pages.share(found)
        num_shared = len(found)
        if not self.pages.extend(found, len(path)):
            self.pages.release(found)
            return
        self.owners.append(Owner(found, path, num_shared))
        for at in range(num_shared, len(path)):
            assert self.pages.is_private(found[at]), "a shared page was handed out to be written"
            self.content[found[at]] = path[: at + 1]

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        for at in range(owner.num_published, len(owner.pages)):
            owner.pages[at] = self.pages.publish(owner.pages[at], owner.path[: at + 1])
        owner.num_published = len(owner.pages)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        self.owners.remove(owner)
        self.pages.release(owner.pages)

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def distrust(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.owners))
        self.pages.forget(owner.pages)

    @invariant()
    def books_are_right(self) -> None:
        self.pages.check_integrity([owner.pages for owner in self.owners])
        for owner in self.owners:
            for at, page in enumerate(owner.pages):
                assert self.content[page] == owner.path[: at + 1], "a page was overwritten"


Owners.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestOwners = Owners.TestCase
