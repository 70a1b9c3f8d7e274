"""Page ids of the KV memory: who owns which. Counts only; the tensors are kv_cache's."""

from __future__ import annotations


class PageAllocator:
    """Hands out page ids 0..num_pages-1; every page has at most one owner."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that a sequence owns."""
        return self.num_pages - len(self._free)

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
        if missing > len(self._free):
            return False
        for _ in range(missing):
            pages.append(self._free.pop())
        return True

    def release(self, pages: list[int]) -> None:
        """Take all pages back; empties the list in place."""
        self._free.extend(reversed(pages))
        pages.clear()

    def check_integrity(self, owned: list[list[int]]) -> None:
        """Assert that free pages and the given owners' pages are a partition of all pages."""
        pages = sorted([page for owner in owned for page in owner] + self._free)
        assert pages == list(range(self.num_pages)), "a KV page is lost or has two owners"
