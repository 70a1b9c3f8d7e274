"""The gated segmented product as two Triton kernels, shrink and expand; see ops/triton_op.py.

One program serves one chunk of at most CHUNK rows of one segment (ops/device_plan.py), of one
site and one block of components or columns. A row's sums are made in one order, whatever else is
in the batch: nothing but shapes of the site says how they are cut. What is not there is kept out by
masks, never by a product, as 0 * NaN is NaN.

The casts are explicit so that Triton's interpreter runs the kernels, which has no bfloat16
products: DOT is what the operands of a product become, the arena's dtype on a device and float32
there. A cell lies anywhere in the arena; where it and the site's sizes are multiples of _WORDS
elements, as they nearly always are, IS_ALIGNED says so to the compiler by an arithmetic that it
understands, and several elements are read at once.
"""

import triton
import triton.language as tl

MAX_PARTS = 4  # sites of one launch
_WORDS = tl.constexpr(8)  # elements

# Whatever these are, the code is the same: a step of another size is no reason to compile again.
_SHARED = ["lane", "first_chunk", "num_sites", "num_rows"]
_SITES, _COLUMNS, _WIDTHS = (
    [f"{name}{i}" for i in range(MAX_PARTS)] for name in ("site", "column", "width")
)


@triton.jit
def _pick(i, value0, value1, value2, value3):
    """The i-th of four."""
    return tl.where(i < 2, tl.where(i < 1, value0, value1), tl.where(i < 3, value2, value3))


@triton.jit
def _aligned(value, IS_ALIGNED: tl.constexpr):
    """The value, which is a multiple of _WORDS where IS_ALIGNED."""
    return value // _WORDS * _WORDS if IS_ALIGNED else value


@triton.jit
def _shrink_block(
    h_ptr, x_ptr, a_ptr, offset, plan_ptr, chunk_ptr, num_in, x_stride, num_rows, h_rank, rank,
    rank_start, split, part_split,
    NUM_SPLITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr, DOT: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    offset = _aligned(offset, IS_ALIGNED)
    num_in = _aligned(num_in, IS_ALIGNED)
    i = tl.arange(0, CHUNK)
    is_row = i < tl.load(chunk_ptr + 1)
    rows = tl.load(plan_ptr + tl.load(chunk_ptr) + i, mask=is_row, other=0).to(tl.int64)
    r = rank_start + tl.arange(0, BLOCK_RANK)
    is_rank = r < rank
    # Whole blocks to every split but the last ones.
    length = tl.cdiv(tl.cdiv(num_in, BLOCK_IN), NUM_SPLITS) * BLOCK_IN
    start = split * length
    acc = tl.zeros((CHUNK, BLOCK_RANK), tl.float32)
    for block in range(start, tl.minimum(start + length, num_in), BLOCK_IN):
        k = block + tl.arange(0, BLOCK_IN)
        is_in = k < num_in
        x = tl.load(
            x_ptr + rows[:, None] * x_stride + k[None, :],
            mask=is_row[:, None] & is_in[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + offset + r[None, :].to(tl.int64) * num_in + k[:, None],
            mask=is_in[:, None] & is_rank[None, :],
            other=0.0,
        )
        x = x.to(tl.float32).to(a_ptr.dtype.element_ty).to(DOT)
        acc = tl.dot(x, a.to(DOT), acc, input_precision="ieee")
    h_ptrs = h_ptr + (part_split * num_rows + rows[:, None]) * h_rank + r[None, :]
    tl.store(h_ptrs, acc, mask=is_row[:, None] & is_rank[None, :])


@triton.jit(do_not_specialize=[*_SHARED, *_SITES, "num_rank_blocks"])
def shrink(
    h_ptr,  # float32 [parts, NUM_SPLITS, num_rows, h_rank]
    x_ptr,  # [num_rows, num_in], rows x_stride apart
    arena_ptr,
    cells_ptr,  # int64 [slots, num_sites, 4]
    plan_ptr,  # int32, see ops/device_plan.py
    lane,
    first_chunk,
    num_in,
    x_stride,
    num_sites,
    num_rows,
    h_rank,
    num_rank_blocks,
    site0,
    site1,
    site2,
    site3,
    NUM_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    DOT: tl.constexpr,
):
    """h[part, split, t, i] = sum over the split's k of A[i, k] * x[t, k], for every row t of the
    chunk whose cell at the part's site has no routing, and every component i of its block.

    Grid: chunks, parts * num_rank_blocks, NUM_SPLITS. Entries of h with no component stay unset.
    """
    chunk = tl.program_id(0)
    part = tl.program_id(1) // num_rank_blocks
    rank_start = tl.program_id(1) % num_rank_blocks * BLOCK_RANK
    split = tl.program_id(2)
    if chunk >= tl.load(plan_ptr + 2 * lane):
        return
    chunk_ptr = plan_ptr + first_chunk + 4 * chunk
    slot = tl.load(chunk_ptr + 2).to(tl.int64)
    cell_ptr = cells_ptr + (slot * num_sites + _pick(part, site0, site1, site2, site3)) * 4
    offset = tl.load(cell_ptr)
    rank = tl.load(cell_ptr + 1).to(tl.int32)
    if (offset < 0) | (tl.load(cell_ptr + 3) != 0) | (rank_start >= rank):
        return
    part_split = (part * NUM_SPLITS + split).to(tl.int64)
    if (offset % _WORDS == 0) & (num_in % _WORDS == 0):
        _shrink_block(
            h_ptr, x_ptr, arena_ptr, offset, plan_ptr, chunk_ptr, num_in, x_stride, num_rows,
            h_rank, rank, rank_start, split, part_split,
            NUM_SPLITS, CHUNK, BLOCK_RANK, BLOCK_IN, DOT, IS_ALIGNED=True,
        )  # fmt: skip
    else:
        _shrink_block(
            h_ptr, x_ptr, arena_ptr, offset, plan_ptr, chunk_ptr, num_in, x_stride, num_rows,
            h_rank, rank, rank_start, split, part_split,
            NUM_SPLITS, CHUNK, BLOCK_RANK, BLOCK_IN, DOT, IS_ALIGNED=False,
        )  # fmt: skip


@triton.jit
def _expand_block(
    y_ptr, h_ptr, ids_ptr, arena_ptr, offset, bits, plan_ptr, chunk_ptr, gate_ptr, gate_width,
    num_in, y_stride, num_rows, h_rank, rank, part, column, column_start, width,
    NUM_SPLITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr, DOT: tl.constexpr, IS_GATHER: tl.constexpr, IS_ALIGNED: tl.constexpr,
):  # fmt: skip
    width = _aligned(width, IS_ALIGNED)
    column = _aligned(column, IS_ALIGNED)
    i = tl.arange(0, CHUNK)
    is_row = i < tl.load(chunk_ptr + 1)
    rows = tl.load(plan_ptr + tl.load(chunk_ptr) + i, mask=is_row, other=0).to(tl.int64)
    scale = tl.load(chunk_ptr + 3).to(tl.float32, bitcast=True)
    n = column_start + tl.arange(0, BLOCK_OUT)
    is_out = n < width
    b_offset = _aligned(offset + rank.to(tl.int64) * num_in, IS_ALIGNED)
    if IS_GATHER:
        ids = tl.load(ids_ptr + rows, mask=is_row, other=0)
    acc = tl.zeros((CHUNK, BLOCK_OUT), tl.float32)
    for rank_start in range(0, rank, BLOCK_RANK):
        r = rank_start + tl.arange(0, BLOCK_RANK)
        is_rank = r < rank
        mask = is_row[:, None] & is_rank[None, :]
        if IS_GATHER:
            a = tl.load(arena_ptr + offset + ids[:, None] * rank + r[None, :], mask=mask, other=0.0)
            h = a.to(tl.float32)
        else:
            h = tl.zeros((CHUNK, BLOCK_RANK), tl.float32)
            for split in tl.static_range(NUM_SPLITS):
                row_ptr = (part * NUM_SPLITS + split).to(tl.int64) * num_rows + rows[:, None]
                h += tl.load(h_ptr + row_ptr * h_rank + r[None, :], mask=mask, other=0.0)
        gate = tl.load(
            gate_ptr + rows[:, None] * gate_width + r[None, :],
            mask=mask & (r < gate_width)[None, :],
            other=1.0,
        )
        h = tl.where(gate != 0.0, gate * (scale * h), 0.0)
        b = tl.load(
            arena_ptr + b_offset + r[:, None].to(tl.int64) * width + n[None, :],
            mask=is_rank[:, None] & is_out[None, :],
            other=0.0,
        )
        h = h.to(arena_ptr.dtype.element_ty).to(DOT)
        acc = tl.dot(h, b.to(DOT), acc, input_precision="ieee")
    has_bias = (bits & 1) != 0
    has_scale = (bits & 2) != 0
    tail_ptr = arena_ptr + b_offset + rank.to(tl.int64) * width
    bias = tl.load(tail_ptr + n, mask=is_out & has_bias, other=0.0).to(tl.float32)
    tail_ptr += tl.where(has_bias, width, 0)
    out_scale = tl.load(tail_ptr + n, mask=is_out & has_scale, other=0.0).to(tl.float32)
    y_ptrs = y_ptr + rows[:, None] * y_stride + (column + n)[None, :]
    is_in_y = is_row[:, None] & is_out[None, :]
    y = tl.load(y_ptrs, mask=is_in_y, other=0.0).to(tl.float32)
    acc += tl.where(has_bias, scale * bias, 0.0)[None, :]
    acc += tl.where(has_scale, out_scale[None, :] * y, 0.0)
    tl.store(y_ptrs, (y + acc).to(y_ptr.dtype.element_ty), mask=is_in_y)


@triton.jit(do_not_specialize=[*_SHARED, *_SITES, *_COLUMNS, *_WIDTHS])
def expand(
    y_ptr,  # [num_rows, columns], rows y_stride apart
    h_ptr,  # as shrink left it; not read where IS_GATHER
    ids_ptr,  # int64 [num_rows] where IS_GATHER, else not read
    arena_ptr,
    cells_ptr,
    plan_ptr,
    gate_ptr,  # float32, see ops/device_plan.py: Work
    lane,
    first_chunk,
    num_in,
    y_stride,
    num_sites,
    num_rows,
    h_rank,
    site0,
    site1,
    site2,
    site3,
    column0,
    column1,
    column2,
    column3,
    width0,
    width1,
    width2,
    width3,
    NUM_SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    DOT: tl.constexpr,
    IS_GATHER: tl.constexpr,
):
    """y[t] += out_scale * y[t] + sum_i h[i] * B[i] + scale * bias in the part's columns, where h[i]
    is where(gate[t, i] != 0, gate[t, i] * scale * sum over the splits, 0), and of an embedding
    scale * A[ids[t], i] takes the place of the sum.

    Grid: chunks, blocks of the widest part's columns, parts.
    """
    chunk = tl.program_id(0)
    part = tl.program_id(2)
    if chunk >= tl.load(plan_ptr + 2 * lane):
        return
    width = _pick(part, width0, width1, width2, width3)
    column_start = tl.program_id(1) * BLOCK_OUT
    if column_start >= width:
        return
    chunk_ptr = plan_ptr + first_chunk + 4 * chunk
    slot = tl.load(chunk_ptr + 2).to(tl.int64)
    cell_ptr = cells_ptr + (slot * num_sites + _pick(part, site0, site1, site2, site3)) * 4
    offset = tl.load(cell_ptr)
    rank = tl.load(cell_ptr + 1).to(tl.int32)
    bits = tl.load(cell_ptr + 2)
    is_empty = (rank == 0) & ((bits & 3) == 0)
    if (offset < 0) | (tl.load(cell_ptr + 3) != 0) | is_empty:
        return
    column = _pick(part, column0, column1, column2, column3)
    gate_width = tl.load(plan_ptr + 2 * lane + 1)
    b_offset = offset + rank.to(tl.int64) * num_in
    if (b_offset % _WORDS == 0) & (width % _WORDS == 0) & (column % _WORDS == 0):
        _expand_block(
            y_ptr, h_ptr, ids_ptr, arena_ptr, offset, bits, plan_ptr, chunk_ptr, gate_ptr,
            gate_width, num_in, y_stride, num_rows, h_rank, rank, part, column, column_start, width,
            NUM_SPLITS, CHUNK, BLOCK_RANK, BLOCK_OUT, DOT, IS_GATHER, IS_ALIGNED=True,
        )  # fmt: skip
    else:
        _expand_block(
            y_ptr, h_ptr, ids_ptr, arena_ptr, offset, bits, plan_ptr, chunk_ptr, gate_ptr,
            gate_width, num_in, y_stride, num_rows, h_rank, rank, part, column, column_start, width,
            NUM_SPLITS, CHUNK, BLOCK_RANK, BLOCK_OUT, DOT, IS_GATHER, IS_ALIGNED=False,
        )  # fmt: skip
