"""Page ids of the KV memory: who owns which, and which full ones are kept for whoever has the same
prefix. Counts only; the tensors are kv_cache's.

    free     nobody owns it, nothing is in it
    owned    one sequence owns it, or several share it under its key
    cached   nobody owns it, it is kept under its key until its room is needed
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence


class PageAllocator:
    """Hands out page ids 0..num_pages-1 and counts their owners.

    A page with a key is full and never written again, so it may have several owners; a page without
    one has at most one. At most one page is found under a key.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._num_owners = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # the next to be taken first

    @property
    def num_free(self) -> int:
        """Pages that can be handed out: nobody owns them."""
        return len(self._free) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Pages that a sequence owns."""
        return self.num_pages - self.num_free

    @property
    def num_cached(self) -> int:
        """Pages that nobody owns and that are kept under their keys."""
        return len(self._cached)

    def num_needed(self, num_tokens: int) -> int:
        """Pages that hold num_tokens tokens."""
        return -(-num_tokens // self.page_size)

    def extend(self, pages: list[int], num_tokens: int) -> bool:
        """Grow `pages` in place until it holds num_tokens; False, changing nothing, when it
        cannot.
        """
        if num_tokens <= len(pages) * self.page_size:  # for 15 of 16 tokens
            return True
        missing = self.num_needed(num_tokens) - len(pages)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            page = self._free.pop() if self._free else self._evict()
            self._num_owners[page] = 1
            pages.append(page)
        return True

    def release(self, pages: list[int]) -> None:
        """Give one owner's share of the pages back; empties the list in place.

        The last ones go first: of a chain that is kept, the end is taken before what it hangs on.
        """
        for page in reversed(pages):
            assert self._num_owners[page] > 0, "a KV page was released twice"
            self._num_owners[page] -= 1
            if self._num_owners[page] == 0:
                if page in self._key_of and self._page_of.get(self._key_of[page]) == page:
                    self._cached[page] = None
                else:
                    self._key_of.pop(page, None)
                    self._free.append(page)
        pages.clear()

    # ------------------------------------------------------------------ sharing
    def find(self, key: bytes) -> int | None:
        """The page that is kept or shared under the key, or None. Its owners stay as they are."""
        return self._page_of.get(key)

    def share(self, pages: Sequence[int]) -> None:
        """Count one more owner of each page; they were found by their keys."""
        for page in pages:
            assert page in self._key_of, "a KV page without a key cannot be shared"
            self._num_owners[page] += 1
            self._cached.pop(page, None)

    def publish(self, page: int, key: bytes) -> int:
        """Put a full page, written and the caller's own, under its key; return the page to go on
        with.

        That is another one when the key has a page already, which two sequences that computed the
        same at the same time bring about: the caller owns that one then, and `page` is free.
        """
        assert self._num_owners[page] == 1, "a page that is published has one owner"
        assert page not in self._key_of, "a page is published once"
        known = self._page_of.get(key)
        if known is None:
            self._page_of[key], self._key_of[page] = page, key
            return page
        self.share([known])
        self.release([page])
        return known

    def forget(self, pages: Iterable[int]) -> None:
        """Find these pages no more, without taking them from their owners."""
        for page in pages:
            key = self._key_of.get(page)
            if key is not None and self._page_of.get(key) == page:
                del self._page_of[key]
                assert page not in self._cached, "a page that its owner forgets has an owner"

    def is_private(self, page: int) -> bool:
        """Whether the page has one owner and no key, so that it may be written."""
        return self._num_owners[page] == 1 and page not in self._key_of

    def check_integrity(self, owned: Sequence[Sequence[int]]) -> None:
        """Assert that free, cached and owned pages are a partition of all pages, that owners are
        counted rightly, and that keys and pages tell of each other.
        """
        counted = Counter(page for owner in owned for page in owner)
        pages = sorted([*counted, *self._free, *self._cached])
        assert pages == list(range(self.num_pages)), "a KV page is lost or has two states"
        assert all(len(set(owner)) == len(owner) for owner in owned), "an owner holds a page twice"
        assert self._num_owners == [counted[page] for page in range(self.num_pages)], (
            "a KV page has other owners than were counted"
        )
        found = {page: key for key, page in self._page_of.items()}
        assert found.items() <= self._key_of.items(), "a KV page is found under another key"
        assert found.keys() >= self._cached.keys(), "a cached KV page cannot be found"
        assert not any(page in self._key_of for page in self._free), "a free KV page has a key"
        assert all(page in self._key_of for page, count in counted.items() if count > 1), (
            "a KV page without a key has two owners"
        )

    def _evict(self) -> int:
        """Take the cached page that was used longest ago."""
        page, _ = self._cached.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page
