"""How many adapters fit on a device, and what they cost in KV memory and time, from a config alone.

The engine's own arithmetic: engine/budget.py shares the memory, ops/cells.py says what an adapter
takes of the arena, pages hold the context. Time is a bound and no measurement: what a decode step
has to read at least, over the bandwidth of the data sheet.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ByteSize

from polyadapt.config import EngineConfig
from polyadapt.engine.budget import DEVICE_PAGE, HOST_PAGE, MAX_SLOTS, Budget, needs_of, share
from polyadapt.errors import StartupError
from polyadapt.models.load import Outline, outline_base
from polyadapt.ops.cells import num_elements
from polyadapt.types import BaseSpec

RANKS = (8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device by its vendor's data sheet: bytes of memory and bytes a second that it reads."""

    nbytes: int
    bandwidth: float


# Decimal gigabytes as sold, a little less than there is; a driver's own part is in the reserve.
GPUS: dict[str, Gpu] = {
    name: Gpu(gigabytes * 10**9, gigabytes_per_s * 1e9)
    for name, gigabytes, gigabytes_per_s in (
        ("l4", 24, 300),
        ("a10g", 24, 600),
        ("l40s", 48, 864),
        ("a100-40gb", 40, 1555),
        ("a100-80gb", 80, 2039),
        ("h100-pcie", 80, 2000),
        ("h100", 80, 3350),
        ("h200", 141, 4800),
    )
}


@dataclass(frozen=True, slots=True)
class RankPlan:
    """Adapters of one rank. The last three are None where no bandwidth is known."""

    rank: int
    adapter_nbytes: int
    num_fitting: int  # in the adapters' memory, at once
    num_kv_tokens: int
    num_sequences: int  # of the planned context, at once
    kv_tokens_per_adapter: float  # what one more adapter takes of the KV memory
    base_step_s: float | None  # a decode step of all those sequences with the base, at least
    step_s: float | None  # and with as many distinct adapters as there can be
    tokens_per_s: float | None  # at most, with the adapters


@dataclass(frozen=True, slots=True)
class Plan:
    """What an engine of these settings has, and the same device with adapters of other ranks."""

    model: str
    architecture: str
    dtype: str
    device_nbytes: int
    weight_nbytes: int
    reserve_nbytes: int
    adapter_bytes: int
    kv_bytes: int
    page_size: int
    context: int
    num_adapters: int | None  # asked for
    targets: tuple[str, ...]
    chosen: RankPlan
    others: tuple[RankPlan, ...]

    @property
    def is_enough(self) -> bool:
        """Whether as many adapters fit as were asked for."""
        return self.num_adapters is None or self.chosen.num_fitting >= self.num_adapters


def make_plan(
    directory: Path,
    config: EngineConfig,
    *,
    device_nbytes: int,
    bandwidth: float | None = None,
    num_adapters: int | None = None,
    rank: int = 16,
    context: int | None = None,
    targets: tuple[str, ...] = (),
    has_own_memory: bool = True,
) -> Plan:
    """Plan one engine; raises StartupError where nothing fits, a target names no module, the model
    cannot be served, or has fewer positions than the context.

    num_adapters: resident at once, which decides their part of the memory unless config does.
    context: tokens of a sequence, None: the model's. targets: last parts of the paths of the linear
    modules that are adapted, () for all but the head. has_own_memory: a device, not the host.
    """
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    outline = outline_base(directory, dtype=dtype, max_model_len=config.max_model_len)
    if context is not None and context > outline.spec.max_model_len:
        raise StartupError(
            f"a context of {context} tokens is more than the model's {outline.spec.max_model_len}; "
            "give a smaller one"
        )
    page_size = config.page_size or (DEVICE_PAGE if has_own_memory else HOST_PAGE)
    needs = needs_of(
        outline.spec,
        config,
        token_nbytes=outline.token_nbytes,
        page_size=page_size,
        itemsize=dtype.itemsize,
        has_own_memory=has_own_memory,
    )
    nbytes = adapter_nbytes(outline.spec, rank, dtype.itemsize, targets)
    max_adapter_bytes = config.max_adapter_bytes
    if num_adapters is not None and max_adapter_bytes is None:
        max_adapter_bytes = ByteSize(max(num_adapters * nbytes, needs.adapter_nbytes))
    budget = share(
        needs,
        memory_bytes=config.memory_bytes,
        kv_cache_bytes=config.kv_cache_bytes,
        max_adapter_bytes=max_adapter_bytes,
        free_bytes=device_nbytes - outline.weight_nbytes,
    )
    context = outline.spec.max_model_len if context is None else context

    def plan_rank(each: int) -> RankPlan:
        size = adapter_nbytes(outline.spec, each, dtype.itemsize, targets)
        return _plan_rank(
            outline, budget, config, each, size, page_size, context, bandwidth, needs.page_nbytes
        )

    return Plan(
        model=directory.name,
        architecture=outline.spec.architecture,
        dtype=str(dtype).removeprefix("torch."),
        device_nbytes=device_nbytes,
        weight_nbytes=outline.weight_nbytes,
        reserve_nbytes=needs.reserve_nbytes or 0,
        adapter_bytes=budget.adapter_bytes,
        kv_bytes=budget.num_pages * needs.page_nbytes,
        page_size=page_size,
        context=context,
        num_adapters=num_adapters,
        targets=targets,
        chosen=plan_rank(rank),
        others=tuple(plan_rank(each) for each in RANKS if each != rank),
    )


def adapter_nbytes(spec: BaseSpec, rank: int, itemsize: int, targets: tuple[str, ...] = ()) -> int:
    """Bytes of the arena that a low-rank adapter of one rank on these modules takes; raises
    StartupError for a target that no linear module is called.
    """
    linears = [site for site in spec.sites if site.kind == "linear"]
    names = {site.path.rpartition(".")[2] for site in linears}
    unknown = sorted(set(targets) - names)
    if unknown:
        raise StartupError(
            f"no linear module is called {unknown[0]!r}; there are {', '.join(sorted(names))}"
        )
    adapted = [
        site
        for site in linears
        if (site.path.rpartition(".")[2] in targets if targets else site.path != spec.head_path)
    ]
    return itemsize * sum(num_elements(s.in_features, s.out_features, rank, 0) for s in adapted)


def _plan_rank(
    outline: Outline,
    budget: Budget,
    config: EngineConfig,
    rank: int,
    nbytes: int,
    page_size: int,
    context: int,
    bandwidth: float | None,
    page_nbytes: int,
) -> RankPlan:
    fitting = min(budget.adapter_bytes // nbytes, MAX_SLOTS)
    pages = -(-context // page_size)
    sequences = min(budget.num_pages // pages, config.max_num_seqs)
    base_s = step_s = rate = None
    if bandwidth is not None and sequences:
        kv_nbytes = sequences * context * outline.token_nbytes
        base_s = (outline.weight_nbytes + kv_nbytes) / bandwidth
        step_s = base_s + min(fitting, sequences) * nbytes / bandwidth
        rate = sequences / step_s
    return RankPlan(
        rank=rank,
        adapter_nbytes=nbytes,
        num_fitting=fitting,
        num_kv_tokens=budget.num_pages * page_size,
        num_sequences=sequences,
        kv_tokens_per_adapter=nbytes / page_nbytes * page_size,
        base_step_s=base_s,
        step_s=step_s,
        tokens_per_s=rate,
    )
