"""The registered ops by which the Triton kernels serve one lane: grids, scratch and checks.

torch.ops.polyadapt.gated_matmul_ and gated_embedding_ are one node each for whatever traces or
captures; which programs run depends on nothing but their arguments, and how many rows there are is
read on the device. Triton is imported by the first launch: `unavailable_reason` says whether it can
be. What the kernels compute is specified by the torch form in ops/gated_matmul.py.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch

from polyadapt.ops.device_plan import CHUNK, Work

_BLOCK_RANK = 32  # components of one program of shrink, and of one step of expand's sum
_BLOCK_IN = 128
_BLOCK_OUT = 128
# The sum over `in` is cut into parts of at least so many, at most _MAX_SPLITS of them, as few rows
# alone would leave a device idle. Chosen on paper: no device has run these kernels yet.
_MIN_SPLIT = 512
_MAX_SPLITS = 16
_DTYPES = (torch.float32, torch.bfloat16)

Part = tuple[int, int, int]  # site id, first column of y, columns


def unavailable_reason(device: torch.device) -> str | None:
    """Why the kernels cannot run on tensors of the device; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; it comes with torch's CUDA builds"
    if device.type != "cuda" and not is_interpreted():
        return f"Triton has no {device.type} form; set TRITON_INTERPRET=1 to try it there, slowly"
    return None


def is_interpreted() -> bool:
    """Whether Triton was told to interpret kernels on the host."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def gated_matmul_(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    cells: torch.Tensor,
    work: Work,
    parts: Sequence[Part],
) -> None:
    """Add the adapters' part of one lane to y in place, but for cells with a routing.

    Semantics: those of ops/gated_matmul.py: gated_matmul_. y [rows, out] and x [rows, in], float32
    or bfloat16, last dimension contiguous; arena 1-D, either of the two: operands of products take
    its dtype, sums are float32. cells int64 [slots, sites, 4]; all on one device. A row's bits
    depend on nothing but the row and its own cells. Indices are not checked. Raises ValueError for
    other dtypes, shapes and strides.
    """
    if x.dim() != 2 or y.shape[0] != x.shape[0] or x.stride(1) != 1 or x.dtype not in _DTYPES:
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype} with strides {x.stride()} does not match y "
            f"{tuple(y.shape)}; expected as many rows of float32 or bfloat16, contiguous in the "
            "last dimension"
        )
    _check(y, arena, cells)
    torch.ops.polyadapt.gated_matmul_.default(
        y, x, arena, cells, work.plan, work.gate, [n for part in parts for n in part],
        work.lane, work.first_chunk, work.num_chunks, work.max_rank,
    )  # fmt: skip


def gated_embedding_(
    y: torch.Tensor,
    ids: torch.Tensor,
    num_in: int,
    arena: torch.Tensor,
    cells: torch.Tensor,
    work: Work,
    site_id: int,
) -> None:
    """Add the adapters' part of an embedding in place: as gated_matmul_ with h[i] = A[ids[t], i].

    y [rows, width]; ids int64 [rows] below num_in, the size of the vocabulary; the A block is
    token-major [num_in, rank]. Raises ValueError as gated_matmul_ does.
    """
    if ids.dtype is not torch.int64 or ids.shape != y.shape[:1] or not ids.is_contiguous():
        raise ValueError(
            f"ids {tuple(ids.shape)} {ids.dtype} do not match y {tuple(y.shape)}; "
            "expected one contiguous int64 per row"
        )
    _check(y, arena, cells)
    torch.ops.polyadapt.gated_embedding_.default(
        y, ids, arena, cells, work.plan, work.gate, num_in, site_id, work.lane,
        work.first_chunk, work.num_chunks,
    )  # fmt: skip


def _check(y: torch.Tensor, arena: torch.Tensor, cells: torch.Tensor) -> None:
    if y.dim() != 2 or y.dtype not in _DTYPES or arena.dtype not in _DTYPES or y.stride(1) != 1:
        raise ValueError(
            f"y is {y.dtype} with strides {y.stride()} and arena is {arena.dtype}; expected two "
            "dimensions of float32 or bfloat16 and a contiguous last one"
        )
    if cells.dtype is not torch.int64 or not cells.is_contiguous() or cells.device != arena.device:
        raise ValueError(
            f"cells are {cells.dtype} on {cells.device}; expected contiguous int64 on "
            f"{arena.device}, beside the arena"
        )


# --------------------------------------------------------------------------- what runs them
def num_splits(num_in: int) -> int:
    """Into how many parts the sum over a site's inputs is cut; of nothing but the site's shape."""
    return min(max(num_in // _MIN_SPLIT, 1), _MAX_SPLITS)


@functools.cache
def _kernels() -> ModuleType:
    from polyadapt.ops import triton_gated

    return triton_gated


def _run_matmul(
    y: torch.Tensor,
    x: torch.Tensor,
    arena: torch.Tensor,
    cells: torch.Tensor,
    plan: torch.Tensor,
    gate: torch.Tensor,
    parts: list[int],
    lane: int,
    first_chunk: int,
    num_chunks: int,
    max_rank: int,
) -> None:
    if num_chunks == 0:
        return
    kernels = _kernels()
    (num_rows, num_in), num_sites = x.shape, cells.shape[1]
    splits = num_splits(num_in)
    h_rank = -(-max_rank // 16) * 16  # so that rows of h begin where several are read at once
    for first in range(0, len(parts), 3 * kernels.MAX_PARTS):
        group = parts[first : first + 3 * kernels.MAX_PARTS]
        num_parts = len(group) // 3
        h = y.new_empty(num_parts * splits * num_rows * h_rank, dtype=torch.float32)
        if max_rank:
            num_rank_blocks = -(-max_rank // _BLOCK_RANK)
            kernels.shrink[num_chunks, num_parts * num_rank_blocks, splits](
                h, x, arena, cells, plan, lane, first_chunk, num_in, x.stride(0), num_sites,
                num_rows, h_rank, num_rank_blocks, *_padded(group[::3], kernels.MAX_PARTS),
                NUM_SPLITS=splits, CHUNK=CHUNK, BLOCK_RANK=_BLOCK_RANK, BLOCK_IN=_BLOCK_IN,
                DOT=_dot(arena),
            )  # fmt: skip
        _expand(
            y, h, None, arena, cells, plan, gate, group, lane, first_chunk, num_chunks,
            num_in, h_rank, splits,
        )  # fmt: skip


def _run_embedding(
    y: torch.Tensor,
    ids: torch.Tensor,
    arena: torch.Tensor,
    cells: torch.Tensor,
    plan: torch.Tensor,
    gate: torch.Tensor,
    num_in: int,
    site: int,
    lane: int,
    first_chunk: int,
    num_chunks: int,
) -> None:
    if num_chunks == 0:
        return
    _expand(
        y, None, ids, arena, cells, plan, gate, [site, 0, y.shape[1]], lane, first_chunk,
        num_chunks, num_in, 0, 1,
    )  # fmt: skip


def _expand(
    y: torch.Tensor,
    h: torch.Tensor | None,
    ids: torch.Tensor | None,
    arena: torch.Tensor,
    cells: torch.Tensor,
    plan: torch.Tensor,
    gate: torch.Tensor,
    parts: list[int],
    lane: int,
    first_chunk: int,
    num_chunks: int,
    num_in: int,
    h_rank: int,
    splits: int,
) -> None:
    kernels = _kernels()
    sites, columns, widths = parts[::3], parts[1::3], parts[2::3]
    num_blocks = -(-max(widths) // _BLOCK_OUT)
    # What is not read still has to be a tensor.
    h = gate if h is None or not h.numel() else h
    kernels.expand[num_chunks, num_blocks, len(sites)](
        y, h, plan if ids is None else ids, arena, cells, plan, gate, lane, first_chunk, num_in,
        y.stride(0), cells.shape[1], y.shape[0], h_rank, *_padded(sites, kernels.MAX_PARTS),
        *_padded(columns, kernels.MAX_PARTS), *_padded(widths, kernels.MAX_PARTS),
        NUM_SPLITS=splits, CHUNK=CHUNK, BLOCK_RANK=_BLOCK_RANK, BLOCK_OUT=_BLOCK_OUT,
        DOT=_dot(arena), IS_GATHER=ids is not None,
    )  # fmt: skip


def _padded(values: list[int], length: int) -> list[int]:
    return values + [0] * (length - len(values))


def _dot(arena: torch.Tensor) -> object:
    """What the operands of a product become; the interpreter has none of bfloat16."""
    language = _kernels().tl
    is_half = arena.dtype is torch.bfloat16 and not is_interpreted()
    return language.bfloat16 if is_half else language.float32


def _run_nothing(*_: object) -> None:
    """What a tracer sees: y is written, nothing is returned."""


_PLAN = "Tensor arena, Tensor cells, Tensor plan, Tensor gate"
_LANE = "int lane, int first_chunk, int num_chunks"
_LIBRARY: Any = torch.library.Library("polyadapt", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(
    f"gated_matmul_(Tensor(a!) y, Tensor x, {_PLAN}, int[] parts, {_LANE}, int max_rank) -> ()"
)
_LIBRARY.define(
    f"gated_embedding_(Tensor(a!) y, Tensor ids, {_PLAN}, int num_in, int site, {_LANE}) -> ()"
)
for _key in ("CUDA", "CPU"):
    _LIBRARY.impl("gated_matmul_", _run_matmul, _key)
    _LIBRARY.impl("gated_embedding_", _run_embedding, _key)
for _name in ("gated_matmul_", "gated_embedding_"):
    _LIBRARY.impl(_name, _run_nothing, "Meta")
