"""How the memory of one device is shared between KV pages and adapters. Torch-free.

Given --memory-bytes M for both: whichever of --kv-cache-bytes and --max-adapter-bytes is given is
taken and the other gets the rest; with neither, KV pages get five eighths of M, never more than
every sequence at full length fills, and adapters all the rest. Without M, on the host, each is
chosen on its own, as a part of the memory that is free; on a device with memory of its own M is
what is free beside the weights, less a reserve.
"""

from __future__ import annotations

from dataclasses import dataclass

from polyadapt.config import EngineConfig
from polyadapt.errors import StartupError
from polyadapt.types import BaseSpec

# Tokens of a page: fine-grained for prefixes on the host; on a device what flash attention takes.
HOST_PAGE, DEVICE_PAGE = 16, 256
MAX_SLOTS = 1024  # resident adapters; the cell table costs 24 bytes per slot and site
_KV_PART = 5 / 8  # of the memory for both
_KV_SHARE, _KV_CAP = 0.25, 4 << 30  # of the free memory, without a budget for both
_ADAPTER_SHARE, _ADAPTER_CAP = 0.15, 2 << 30
_MIN_PAGES = 2
# Of a device's memory, for library workspaces and captured graphs: an estimate, not measured yet.
_RESERVE_NBYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Needs:
    """Sizes that a budget is judged by."""

    page_nbytes: int
    most_pages: int  # every sequence at full length: more is never used
    adapter_nbytes: int  # the smallest adapter of every linear module, rank 1
    # Of a device whose memory is the engine's alone, what has to stay free; None: of the host's.
    reserve_nbytes: int | None = None


def needs_of(
    spec: BaseSpec,
    config: EngineConfig,
    *,
    token_nbytes: int,
    page_size: int,
    itemsize: int,
    has_own_memory: bool,
) -> Needs:
    """What an engine of these settings needs of its memory.

    token_nbytes: keys and values of a token over all layers; itemsize: bytes of an element of the
    weights, keys and adapters; has_own_memory: the device's memory is the engine's alone.
    """
    linears = [site for site in spec.sites if site.kind == "linear"]
    reserve = None
    if has_own_memory:
        inside = [site for site in linears if site.path != spec.head_path]
        reserve = reserve_nbytes(
            num_rows=max(config.max_num_batched_tokens, config.max_num_seqs),
            num_outputs=config.max_num_seqs,
            hidden=next(s.out_features for s in spec.sites if s.path == spec.embedding_path),
            inner=max(max(site.in_features, site.out_features) for site in inside),
            vocab_size=spec.vocab_size,
            itemsize=itemsize,
        )
    return Needs(
        page_nbytes=token_nbytes * page_size,
        most_pages=-(-spec.max_model_len // page_size) * config.max_num_seqs,
        adapter_nbytes=sum(s.in_features + s.out_features for s in linears) * itemsize,
        reserve_nbytes=reserve,
    )


def reserve_nbytes(
    *, num_rows: int, num_outputs: int, hidden: int, inner: int, vocab_size: int, itemsize: int
) -> int:
    """Bytes that steps need beside weights, KV pages and adapters.

    Of each of num_rows rows four times the hidden state and three times the widest layer inside, as
    in a gated MLP; of num_outputs rows the logits, and those twice in float32 where they are
    sampled from; and 1 GiB for what libraries and captured graphs keep.
    """
    activations = num_rows * (4 * hidden + 3 * inner) * itemsize
    logits = num_outputs * vocab_size * (itemsize + 2 * 4)
    return activations + logits + _RESERVE_NBYTES


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
    """Share the memory; raises StartupError when it holds no two pages, or no adapter, or when more
    is asked for than a device has. free_bytes: with the weights loaded.
    """
    kv_bytes, adapter_bytes = kv_cache_bytes, max_adapter_bytes
    total = None
    if memory_bytes is not None:
        total = _Total(memory_bytes, f"--memory-bytes {memory_bytes}", "raise it")
    if needs.reserve_nbytes is not None:
        there = _there(free_bytes, needs.reserve_nbytes)
        _check_fits(memory_bytes, kv_bytes, adapter_bytes, there)
        total = total or there
    if total is not None:
        kv_bytes, adapter_bytes = _split(total, kv_bytes, adapter_bytes, needs)
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


@dataclass(frozen=True, slots=True)
class _Total:
    """What there is for both, what it is called, and what to do where it is too little."""

    nbytes: int
    name: str
    remedy: str


def _there(free_bytes: int, reserve: int) -> _Total:
    name = (
        f"the device's free memory of {free_bytes} bytes beside the weights, less a reserve of "
        f"{reserve} for activations, workspaces and graphs,"
    )
    remedy = "lower --max-num-batched-tokens and --max-num-seqs for a smaller reserve"
    return _Total(free_bytes - reserve, name, remedy)


def _check_fits(
    memory_bytes: int | None, kv_bytes: int | None, adapter_bytes: int | None, there: _Total
) -> None:
    given = {"--memory-bytes": memory_bytes}
    if memory_bytes is None:
        given = {"--kv-cache-bytes": kv_bytes, "--max-adapter-bytes": adapter_bytes}
    asked = [value for value in given.values() if value is not None]
    if asked and sum(asked) > there.nbytes:
        flags = " and ".join(f"{flag} {n}" for flag, n in given.items() if n is not None)
        raise StartupError(
            f"{there.name} leaves {max(there.nbytes, 0)} bytes, fewer than {flags}; ask for less, "
            f"or {there.remedy}"
        )


def _split(
    total: _Total, kv_bytes: int | None, adapter_bytes: int | None, needs: Needs
) -> tuple[int, int]:
    least_kv = _MIN_PAGES * needs.page_nbytes
    if kv_bytes is not None and adapter_bytes is not None:
        if kv_bytes + adapter_bytes > total.nbytes:
            raise StartupError(
                f"--kv-cache-bytes {kv_bytes} and --max-adapter-bytes {adapter_bytes} exceed "
                f"{total.name}; leave one of the three out"
            )
        return kv_bytes, adapter_bytes
    if adapter_bytes is not None:
        kv_bytes = total.nbytes - adapter_bytes
    elif kv_bytes is None:
        kv_bytes = max(int(total.nbytes * _KV_PART), least_kv)
        kv_bytes = min(kv_bytes, needs.most_pages * needs.page_nbytes)
    rest = total.nbytes - kv_bytes
    if kv_bytes < least_kv or rest < needs.adapter_nbytes:
        raise StartupError(
            f"{total.name} leaves {max(kv_bytes, 0)} bytes for KV pages and {max(rest, 0)} for "
            f"adapters; two pages need {least_kv} and the smallest adapter {needs.adapter_nbytes}: "
            f"{total.remedy}"
        )
    return kv_bytes, rest
