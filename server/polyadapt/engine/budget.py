"""How the memory of one device is shared between KV pages and adapters. Torch-free.

Given --memory-bytes M for both: whichever of --kv-cache-bytes and --max-adapter-bytes is given is
taken and the other gets the rest; with neither, KV pages get five eighths of M, never more than
every sequence at full length fills, and adapters all the rest. Without M each is chosen on its own,
as a part of the memory that is free.
"""

from __future__ import annotations

from dataclasses import dataclass

from polyadapt.errors import StartupError

_KV_PART = 5 / 8  # of the memory for both
_KV_SHARE, _KV_CAP = 0.25, 4 << 30  # of the free memory, without a budget for both
_ADAPTER_SHARE, _ADAPTER_CAP = 0.15, 2 << 30
_MIN_PAGES = 2


@dataclass(frozen=True, slots=True)
class Needs:
    """Sizes that a budget is judged by."""

    page_nbytes: int
    most_pages: int  # every sequence at full length: more is never used
    adapter_nbytes: int  # the smallest adapter of every linear module, rank 1


@dataclass(frozen=True, slots=True)
class Budget:
    """The outcome."""

    num_pages: int
    adapter_bytes: int


def share(
    needs: Needs,
    *,
    memory_bytes: int | None,
    kv_cache_bytes: int | None,
    max_adapter_bytes: int | None,
    free_bytes: int,
) -> Budget:
    """Share the memory; raises StartupError when it holds no two pages, or no adapter."""
    kv_bytes, adapter_bytes = kv_cache_bytes, max_adapter_bytes
    if memory_bytes is not None:
        kv_bytes, adapter_bytes = _split(memory_bytes, kv_bytes, adapter_bytes, needs)
    if kv_bytes is None:
        kv_bytes = min(_KV_CAP, int(free_bytes * _KV_SHARE), needs.most_pages * needs.page_nbytes)
    if adapter_bytes is None:
        adapter_bytes = min(_ADAPTER_CAP, int(free_bytes * _ADAPTER_SHARE))
    if kv_bytes < _MIN_PAGES * needs.page_nbytes:
        raise StartupError(
            f"--kv-cache-bytes {kv_bytes} holds fewer than two pages of {needs.page_nbytes} bytes; "
            "raise it"
        )
    # A ByteSize of the config is no plain int, and does not cross the process border.
    return Budget(int(kv_bytes // needs.page_nbytes), int(adapter_bytes))


def _split(
    total: int, kv_bytes: int | None, adapter_bytes: int | None, needs: Needs
) -> tuple[int, int]:
    least_kv = _MIN_PAGES * needs.page_nbytes
    if kv_bytes is not None and adapter_bytes is not None:
        if kv_bytes + adapter_bytes > total:
            raise StartupError(
                f"--kv-cache-bytes {kv_bytes} and --max-adapter-bytes {adapter_bytes} exceed "
                f"--memory-bytes {total}; leave one of the three out"
            )
        return kv_bytes, adapter_bytes
    if adapter_bytes is not None:
        kv_bytes = total - adapter_bytes
    elif kv_bytes is None:
        kv_bytes = max(int(total * _KV_PART), least_kv)
        kv_bytes = min(kv_bytes, needs.most_pages * needs.page_nbytes)
    rest = total - kv_bytes
    if kv_bytes < least_kv or rest < needs.adapter_nbytes:
        raise StartupError(
            f"--memory-bytes {total} leaves {max(kv_bytes, 0)} bytes for KV pages and "
            f"{max(rest, 0)} for adapters; two pages need {least_kv} and the smallest adapter "
            f"{needs.adapter_nbytes}: raise it"
        )
    return kv_bytes, rest
