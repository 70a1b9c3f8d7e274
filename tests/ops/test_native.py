"""The native kernels against ten-line torch references; what they promise about bits and builds."""

from __future__ import annotations

import logging
import multiprocessing
import os
from pathlib import Path

import pytest
import torch

from polyadapt.ops import native
from polyadapt.ops.native import build

needs_native = pytest.mark.skipif(
    build.find_compiler(os.environ) is None, reason="this machine has no C compiler"
)

# Largest difference as a part of the largest value of the reference.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
DTYPES = (torch.float32, torch.bfloat16)


# --------------------------------------------------------------------------- gated product
class Lane:
    """One arena, one batch: segments of `lengths` rows with the adapters `slots` of `ranks`."""

    def __init__(
        self,
        lengths: list[int],
        slots: list[int],
        ranks: list[int],
        num_in: int,
        num_out: int,
        *,
        dtype: torch.dtype = torch.float32,
        arena_dtype: torch.dtype = torch.float32,
        has_bias: bool = False,
        num_base_rows: int = 2,
    ) -> None:
        self.num_in, self.num_out, self.num_segments = num_in, num_out, len(lengths)
        sizes = [r * (num_in + num_out) + has_bias * num_out for r in ranks]
        offsets = [1 + sum(sizes[:s]) for s in range(len(sizes))]  # an odd start on purpose
        self.arena = (torch.randn(1 + sum(sizes) + 3) / num_in**0.5).to(arena_dtype)
        cells = [
            [[-1, 0, 0, 0], [offset, r, int(has_bias), 0]]
            for offset, r in zip(offsets, ranks, strict=True)
        ]
        self.cells = torch.tensor(cells, dtype=torch.int64)
        num_rows = sum(lengths) + num_base_rows
        self.rows = torch.randperm(num_rows)[: sum(lengths)].int()
        self.bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        self.slots = torch.tensor(slots, dtype=torch.int32)
        self.scales = torch.rand(len(lengths)) + 0.5
        self.x = torch.randn(num_rows, num_in).to(dtype)
        self.y = torch.randn(num_rows, num_out).to(dtype)
        self.gate: torch.Tensor | None = None

    def run(self, site: int = 1) -> torch.Tensor:
        y = self.y.clone()
        native.gated_matmul_(
            y, self.x, self.arena, self.cells, self.rows, self.bounds, self.slots, self.scales,
            self.num_segments, self.gate, None, torch.tensor([[site, 0, y.shape[1]]]),
        )  # fmt: skip
        return y

    def expected(self, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """The formula in float64; `hidden(table, row)` replaces A x for an embedding."""
        out = self.y.double().clone()
        for s in range(self.num_segments):
            offset, rank, has_bias, _ = self.cells[int(self.slots[s]), 1].tolist()
            A, B, bias = self.arena[offset:].double().split_with_sizes(
                [rank * self.num_in, rank * self.num_out,
                 self.arena.numel() - offset - rank * (self.num_in + self.num_out)]
            )  # fmt: skip
            for t in self.rows[self.bounds[s] : self.bounds[s + 1]].tolist():
                if hidden is None:
                    h = A.view(rank, self.num_in) @ self.x[t].double()
                else:
                    h = A.view(self.num_in, rank)[hidden[t]]
                h = h * self.scales[s]
                if self.gate is not None:
                    g = torch.ones(rank).double()
                    g[: self.gate.shape[1]] = self.gate[t, :rank]
                    h = torch.where(g != 0, g * h, 0.0)
                out[t] += h @ B.view(rank, self.num_out)
                out[t] += self.scales[s] * bias[: self.num_out] if has_bias else 0
        return out


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE[found.dtype], f"off by {error:.1e} of the largest value"


# Popularity: 24 rows over the adapters; lengths of segments, the slot of each.
POPULARITY = {
    "identical": ([24], [0]),
    "distinct": ([1] * 24, list(range(24))),
    "uniform": ([4, 4, 4, 4, 4, 4], [5, 0, 3, 1, 4, 2]),
    "zipf": ([12, 6, 3, 2, 1], [3, 0, 7, 1, 2]),
    "with empty segments": ([0, 5, 0, 1, 0], [1, 0, 2, 1, 3]),
    "more rows than a tile": ([70, 33, 2], [1, 0, 2]),
    "nothing at all": ([0], [0]),
    "more segments than fit the stack": ([1] * 100, [s % 24 for s in range(100)]),
}


@needs_native
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arena_dtype", DTYPES)
def test_matches_the_formula_for_any_popularity(
    popularity: str, dtype: torch.dtype, arena_dtype: torch.dtype
) -> None:
    lengths, slots = POPULARITY[popularity]
    ranks = [1, 8, 16, 3, 64, 5, 2, 33] * 3
    lane = Lane(lengths, slots, ranks, 67, 130, dtype=dtype, arena_dtype=arena_dtype, has_bias=True)
    assert_close(lane.run(), lane.expected())


@needs_native
@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4, 5, 31, 64, 600])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 9), (8, 8), (17, 31), (576, 192), (64, 5000)])
def test_matches_the_formula_for_any_shape(rank: int, sizes: tuple[int, int]) -> None:
    for has_bias in (False, True):
        lane = Lane([1, 2, 3], [0, 1, 2], [rank] * 3, *sizes, has_bias=has_bias)
        assert_close(lane.run(), lane.expected())


@needs_native
def test_rows_in_no_segment_and_sites_left_alone_keep_their_bits() -> None:
    lane = Lane([3, 1], [0, 1], [8, 8], 32, 32, num_base_rows=5)
    found = lane.run()
    in_segment = torch.zeros(len(lane.y), dtype=torch.bool)
    in_segment[lane.rows.long()] = True
    assert torch.equal(found[~in_segment], lane.y[~in_segment])
    assert not torch.equal(found[in_segment], lane.y[in_segment])
    assert torch.equal(lane.run(site=0), lane.y)


@needs_native
@pytest.mark.parametrize("lengths", [[1, 2, 5], [40, 1, 1]])
def test_a_shut_gate_hides_nan_and_an_open_one_weighs(lengths: list[int]) -> None:
    lane = Lane(lengths, [0, 1, 2], [12, 16, 5], 24, 40)
    gate = torch.randn(len(lane.y), 20)
    gate[torch.rand_like(gate) < 0.4] = 0
    lane.gate = gate[:, :10]  # narrower than the ranks and with strided rows
    assert_close(lane.run(), lane.expected())
    lane.gate = torch.zeros(len(lane.y), 16)
    lane.x[:] = torch.nan
    assert torch.equal(lane.run(), lane.y)
    lane.gate[int(lane.rows[0]), 0] = 1
    poisoned = lane.run().isnan().any(1).nonzero().flatten().tolist()
    assert poisoned == [int(lane.rows[0])]


@needs_native
def test_x_and_y_may_be_slices_of_wider_tensors() -> None:
    lane = Lane([2, 3], [0, 1], [4, 9], 20, 30)
    expected = lane.expected()
    wide_x, wide_y = torch.randn(len(lane.x), 50), torch.randn(len(lane.y), 70)
    wide_x[:, 10:30], wide_y[:, 40:70] = lane.x, lane.y
    before = wide_y.clone()
    native.gated_matmul_(
        wide_y[:, 40:70], wide_x[:, 10:30], lane.arena, lane.cells, lane.rows, lane.bounds,
        lane.slots, lane.scales, 2, None, None, torch.tensor([[1, 0, 30]]),
    )  # fmt: skip
    assert_close(wide_y[:, 40:70], expected)
    assert torch.equal(wide_y[:, :40], before[:, :40])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_change_a_bit(dtype: torch.dtype) -> None:
    lanes = [
        Lane([1] * 32, list(range(32)), [16] * 32, 576, 1536, dtype=dtype),
        Lane([1], [0], [600], 576, 1536, dtype=dtype, has_bias=True),
        Lane([100, 1, 3], [0, 1, 2], [64, 64, 7], 577, 1537, dtype=dtype, has_bias=True),
    ]
    threads = torch.get_num_threads()
    try:
        for lane in lanes:
            torch.set_num_threads(1)
            alone = lane.run()
            torch.set_num_threads(2)
            for _ in range(5):
                assert torch.equal(lane.run(), alone)
    finally:
        torch.set_num_threads(threads)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(dtype: torch.dtype) -> None:
    lane = Lane([1, 37, 2, 5], [1, 0, 2, 3], [16, 9, 64, 600], 131, 259, dtype=dtype, has_bias=True)
    lane.gate = torch.randn(len(lane.y), 64)
    lane.gate[torch.rand_like(lane.gate) < 0.5] = 0
    together = lane.run()
    for s in range(4):
        for p in range(int(lane.bounds[s]), int(lane.bounds[s + 1])):
            t = int(lane.rows[p])
            y = lane.y[t : t + 1].clone()
            native.gated_matmul_(
                y, lane.x[t : t + 1], lane.arena, lane.cells, torch.zeros(1, dtype=torch.int32),
                torch.tensor([0, 1], dtype=torch.int32), lane.slots[s:], lane.scales[s:], 1,
                lane.gate[t : t + 1], None, torch.tensor([[1, 0, y.shape[1]]]),
            )  # fmt: skip
            assert torch.equal(y[0], together[t])


@needs_native
@pytest.mark.parametrize("arena_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embedding_reads_the_token_s_row_of_a(
    dtype: torch.dtype, arena_dtype: torch.dtype
) -> None:
    lane = Lane([1, 40, 3], [0, 1, 2], [8, 3, 16], 99, 65, dtype=dtype, arena_dtype=arena_dtype)
    lane.gate = torch.randn(len(lane.y), 16)
    ids = torch.randint(0, 99, (len(lane.y),))
    y = lane.y.clone()
    native.gated_embedding_(
        y, ids, 99, lane.arena, lane.cells, lane.rows, lane.bounds, lane.slots, lane.scales, 3,
        lane.gate, None, 1,
    )  # fmt: skip
    assert_close(y, lane.expected(ids))


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lane: lane.rows.__setitem__(2, 99), r"rows\[2\] is not a row of y"),
        (lambda lane: lane.rows.__setitem__(2, -1), r"rows\[2\] is not a row of y"),
        (lambda lane: lane.slots.__setitem__(1, 7), r"slots\[1\] is not a row of cells"),
        (lambda lane: lane.bounds.__setitem__(2, 50), r"bounds\[1\]"),
        (lambda lane: lane.bounds.__setitem__(1, 4), r"bounds\[0\]"),
        (lambda lane: lane.cells[1, 1].__setitem__(1, 9), "the cell of segment 1"),
        (lambda lane: setattr(lane, "num_segments", 3), "3 segments"),
        (lambda lane: setattr(lane, "slots", lane.slots.long()), "expected int32"),
        (lambda lane: setattr(lane, "x", lane.x.bfloat16()), "one dtype"),
        (lambda lane: setattr(lane, "x", lane.x[1:]), "as many rows"),
        (lambda lane: setattr(lane, "y", lane.y.double()), "float64"),
        (lambda lane: setattr(lane, "gate", torch.ones(1, 4)), "gate"),
    ],
)
def test_an_index_outside_its_tensor_is_refused(change: object, message: str) -> None:
    lane = Lane([1, 2], [0, 1], [4, 4], 8, 8)
    assert callable(change)
    change(lane)
    if lane.y.dtype == torch.float64:
        lane.x = lane.x.double()
    with pytest.raises(ValueError, match=message):
        lane.run()


@needs_native
def test_a_token_outside_the_vocabulary_is_refused_and_y_is_untouched() -> None:
    lane = Lane([1, 2], [0, 1], [4, 4], 8, 8)
    ids = torch.zeros(len(lane.y), dtype=torch.int64)
    ids[int(lane.rows[2])] = 8
    y = lane.y.clone()
    with pytest.raises(ValueError, match="is not below num_in"):
        native.gated_embedding_(
            y, ids, 8, lane.arena, lane.cells, lane.rows, lane.bounds, lane.slots, lane.scales, 2,
            None, None, 1,
        )  # fmt: skip
    assert torch.equal(y, lane.y)


# --------------------------------------------------------------------------- paged attention
class Paged:
    """Sequences of `lens` keys in shuffled pages of a cache."""

    def __init__(
        self,
        lens: list[int],
        heads: int = 6,
        kv_heads: int = 2,
        dim: int = 64,
        value_dim: int = 64,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        num_pages = [-(-n // page_size) for n in lens]
        self.page_size = page_size
        ids = torch.randperm(sum(num_pages) + 3)
        table = torch.full((len(lens), max(num_pages) + 2), -1, dtype=torch.int32)
        for b, num in enumerate(num_pages):
            table[b, :num] = ids[sum(num_pages[:b]) :][:num]
        self.table = table[:, : max(num_pages)]  # strided rows
        self.lens = torch.tensor(lens, dtype=torch.int32)
        slots = (sum(num_pages) + 3) * page_size
        self.q = (2 * torch.randn(len(lens), heads, dim)).to(dtype)
        self.k = torch.randn(slots, kv_heads, dim).to(dtype)
        self.v = torch.randn(slots, kv_heads, value_dim).to(dtype)

    def run(self, scale: float = 0.125, **options: object) -> torch.Tensor:
        return native.paged_attention(
            self.q, self.k, self.v, self.table, self.lens, self.page_size, scale, **options
        )  # type: ignore[arg-type]

    def expected(
        self,
        scale: float = 0.125,
        softcap: float = 0.0,
        window: int = 0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        group = self.q.shape[1] // self.k.shape[1]
        out = torch.zeros(*self.q.shape[:2], self.v.shape[2], dtype=torch.float64)
        for b, num in enumerate(self.lens.tolist()):
            j = torch.arange(max(0, num - window) if window else 0, num)
            slots = self.table[b, j // self.page_size] * self.page_size + j % self.page_size
            k, v = (c[slots].double().repeat_interleave(group, 1) for c in (self.k, self.v))
            s = scale * torch.einsum("hd,jhd->hj", self.q[b].double(), k)
            s = softcap * torch.tanh(s / softcap) if softcap else s
            extra = torch.empty(len(s), 0) if sinks is None else sinks[:, None]
            p = torch.cat([s, extra.double()], 1).softmax(1)[:, : len(j)]
            out[b] = torch.einsum("hj,jhd->hd", p, v)
        return out


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        {"heads": 9, "kv_heads": 3},
        {"heads": 4, "kv_heads": 4, "dim": 17, "value_dim": 5},
        {"heads": 8, "kv_heads": 1, "dim": 96, "value_dim": 128},
        {"heads": 2, "kv_heads": 2, "dim": 1, "value_dim": 1, "page_size": 1},
        {"heads": 4, "kv_heads": 2, "dim": 256, "value_dim": 256, "page_size": 7},
    ],
)
def test_attention_matches_the_formula(shape: dict[str, int], dtype: torch.dtype) -> None:
    paged = Paged([1, 2, 3, 4, 5, 16, 17, 255, 256, 257, 700], dtype=dtype, **shape)
    assert_close(paged.run(), paged.expected())


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 30, 300])
@pytest.mark.parametrize("softcap", [0.0, 3.0, 50.0])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_attention_honours_window_softcap_and_sinks(
    window: int, softcap: float, has_sinks: bool, dtype: torch.dtype
) -> None:
    paged = Paged([1, 30, 31, 290, 530, 2000], dtype=dtype)
    options = {
        "window": window,
        "softcap": softcap,
        "sinks": 2 * torch.randn(6) if has_sinks else None,
    }
    assert_close(paged.run(0.3, **options), paged.expected(0.3, **options))  # type: ignore[arg-type]


@needs_native
def test_attention_of_large_scores_is_stable() -> None:
    paged = Paged([500, 3])
    paged.q *= 1000
    assert_close(paged.run(1.0), paged.expected(1.0))
    assert_close(paged.run(1.0, softcap=2.0), paged.expected(1.0, softcap=2.0))


@needs_native
def test_exponentials_are_exact_to_two_units_in_the_last_place() -> None:
    # Two keys with one-hot values: the outputs are p and 1 - p, whose ratio is one exponential.
    scores = torch.linspace(0, 80, 4001)
    num = len(scores)
    q = -scores[:, None, None].contiguous()
    k = torch.tensor([[[1.0]], [[0.0]]])
    v = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    table = torch.tensor([[0, 1]], dtype=torch.int32).repeat(num, 1)
    out = native.paged_attention(q, k, v, table, torch.full((num,), 2, dtype=torch.int32), 1, 1.0)
    ratio = out[:, 0, 0].double() / out[:, 0, 1].double()
    error = (ratio / torch.exp(-scores.double()) - 1).abs().max()
    assert error <= 4 * 2**-23  # the exponential's two units, and the division of each output


@needs_native
def test_an_empty_sequence_gives_zeros() -> None:
    paged = Paged([4, 7, 2])
    paged.lens[1] = 0
    found = paged.run()
    assert torch.equal(found[1], torch.zeros_like(found[1]))
    assert_close(found[[0, 2]], paged.expected()[[0, 2]])


@needs_native
def test_a_poisoned_sequence_stays_alone() -> None:
    paged = Paged([40, 300, 20])
    clean = paged.run()
    paged.k[paged.table[1, 3] * 16 + 2, 0, 5] = torch.nan
    found = paged.run()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])
    assert found[1, :3].isnan().all()  # the first group of heads reads that key
    assert torch.equal(found[1, 3:], clean[1, 3:])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_has_the_same_bits_alone_and_on_any_number_of_threads(
    dtype: torch.dtype,
) -> None:
    paged = Paged([900, 3, 64, 257, 1, 511], heads=9, kv_heads=3, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = paged.run()
        torch.set_num_threads(2)
        assert torch.equal(paged.run(), together)
        for b in range(6):
            alone = native.paged_attention(
                paged.q[b : b + 1], paged.k, paged.v, paged.table[b : b + 1],
                paged.lens[b : b + 1], 16, 0.125,
            )  # fmt: skip
            assert torch.equal(alone[0], together[b])
    finally:
        torch.set_num_threads(threads)


@needs_native
def test_attention_takes_strided_queries_and_caches() -> None:
    paged = Paged([40, 9])
    expected = paged.expected()
    paged.q = paged.q.transpose(0, 1).contiguous().transpose(0, 1)
    both = torch.cat([paged.k, paged.v], 2)
    paged.k, paged.v = both[:, :, :64], both[:, :, 64:]
    assert not paged.q.is_contiguous()
    assert_close(paged.run(), expected)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.table.__setitem__((1, 0), 99), r"page_table\[1\]"),
        (lambda p: p.table.__setitem__((1, 0), -1), r"page_table\[1\]"),
        (lambda p: p.lens.__setitem__(0, -1), r"kv_lens\[0\]"),
        (lambda p: p.lens.__setitem__(0, 1000), r"kv_lens\[0\]"),
        (lambda p: setattr(p, "page_size", 0), "page_size 0"),
        (lambda p: setattr(p, "k", p.k[:, :, 1:]), "do not fit together"),
        (lambda p: setattr(p, "v", p.v.bfloat16()), "for all three"),
        (lambda p: setattr(p, "lens", p.lens.long()), "int32"),
        (lambda p: setattr(p, "lens", p.lens[:1]), "kv_lens"),
    ],
)
def test_attention_outside_the_cache_is_refused(change: object, message: str) -> None:
    paged = Paged([20, 5])
    assert callable(change)
    change(paged)
    with pytest.raises(ValueError, match=message):
        paged.run()


# --------------------------------------------------------------------------- the build
def test_without_a_compiler_there_is_no_library_and_a_reason(tmp_path: Path) -> None:
    found = build.load_from(tmp_path / "native", {"PATH": str(tmp_path)})
    assert found.library is None
    assert "no C compiler" in found.reason
    assert not (tmp_path / "native").exists()


def test_the_environment_turns_the_kernels_off(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("POLYADAPT_NATIVE", "0")
    build.load.cache_clear()
    build.outcome.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert build.load() is None
            assert not native.is_available()
        assert native.unavailable_reason() == "POLYADAPT_NATIVE=0"
        assert [r.getMessage() for r in caplog.records] == [
            "native kernels are off: POLYADAPT_NATIVE=0"
        ]
    finally:
        build.load.cache_clear()
        build.outcome.cache_clear()


def test_a_compiler_that_fails_is_reported_with_its_first_words(tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'the disc is full' >&2\nexit 3\n")
    broken.chmod(0o755)
    found = build.load_from(tmp_path / "native", {"PATH": f"{tmp_path}:/bin:/usr/bin", "CC": ""})
    assert found.library is None
    assert "ended with status 3: the disc is full" in found.reason


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder with one small source, which compiles in no time."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "answer.h").write_text("#define ANSWER 42\n")
    (folder / "answer.c").write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    return folder


def _answer(cache: Path, sources: Path) -> int | None:
    library = build.load_from(cache, os.environ, sources).library
    return None if library is None else library.answer()


@needs_native
def test_a_second_start_loads_what_the_first_compiled(tmp_path: Path, sources: Path) -> None:
    cache = tmp_path / "native"
    assert _answer(cache, sources) == 42
    (path,) = cache.glob("*/kernels.so")
    stamp = path.stat().st_mtime_ns
    assert _answer(cache, sources) == 42
    assert path.stat().st_mtime_ns == stamp
    assert [p.name for p in path.parent.iterdir()] == ["kernels.so"]


@needs_native
def test_a_changed_header_is_compiled_anew(tmp_path: Path, sources: Path) -> None:
    assert _answer(tmp_path / "native", sources) == 42
    (sources / "answer.h").write_text("#define ANSWER 43\n")
    assert _answer(tmp_path / "native", sources) == 43


@needs_native
def test_a_library_that_does_not_load_is_compiled_again(
    tmp_path: Path, sources: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = _answer_in_a_process(tmp_path / "native", sources)
    (path,) = (tmp_path / "native").glob("*/kernels.so")
    path.write_bytes(b"not a library")
    assert _answer(tmp_path / "native", sources) == first == 42
    assert "compiling it again" in caplog.text


@needs_native
def test_a_cache_that_another_user_may_write_is_not_loaded(
    tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_variants", lambda: [("-fPIC",)])
    assert _answer(tmp_path / "native", sources) == 42
    (folder,) = (tmp_path / "native").iterdir()
    folder.chmod(0o777)
    found = build.load_from(tmp_path / "native", os.environ, sources)
    assert found.library is None
    assert "open to another user" in found.reason


@needs_native
def test_a_source_that_does_not_compile_is_reported(tmp_path: Path, sources: Path) -> None:
    (sources / "answer.c").write_text("int answer(void) { return }\n")
    found = build.load_from(tmp_path / "native", os.environ, sources)
    assert found.library is None
    assert "answer.c" in found.reason
    assert not list((tmp_path / "native").glob("*/*"))


def _answer_later(cache: Path, sources: Path, start: object, results: object) -> None:
    start.wait()  # type: ignore[attr-defined]
    results.put(_answer(cache, sources))  # type: ignore[attr-defined]


def _answers(cache: Path, sources: Path, num_processes: int) -> list[int | None]:
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    arguments = (cache, sources, start, results)
    processes = [
        context.Process(target=_answer_later, args=arguments) for _ in range(num_processes)
    ]
    for process in processes:
        process.start()
    start.set()
    answers = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join()
    return answers


def _answer_in_a_process(cache: Path, sources: Path) -> int | None:
    """The answer of another process, so that this one has not loaded the library yet."""
    return _answers(cache, sources, 1)[0]


@needs_native
def test_two_processes_may_build_at_once(tmp_path: Path, sources: Path) -> None:
    assert _answers(tmp_path / "native", sources, 2) == [42, 42]
    assert [path.name for path in (tmp_path / "native").glob("*/*")] == ["kernels.so"]


@needs_native
def test_the_library_names_no_openmp_runtime_of_its_own() -> None:
    # A second runtime would bring its own threads; the one that torch loaded must be the only one.
    assert native.is_available()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    runtimes = {
        line.split()[-1]
        for line in maps.read_text().splitlines()
        if "libgomp" in line or "libomp" in line or "libiomp" in line
    }
    assert len(runtimes) == 1


@needs_native
def test_the_kernels_run_on_torch_s_threads_and_start_none() -> None:
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        pytest.skip("needs /proc")
    torch.randn(1 << 20).add_(1).sum()  # torch's own pool is up
    threads = torch.get_num_threads()
    before = len(list(tasks.iterdir()))
    Lane([1] * 32, list(range(32)), [64] * 32, 576, 1536).run()
    Paged([3000] * 8).run()
    assert len(list(tasks.iterdir())) == before
    assert torch.get_num_threads() == threads
