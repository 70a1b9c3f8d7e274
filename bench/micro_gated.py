"""Time the gated segmented product cold: every layer and site of a small Llama, scattered adapters.

Compares the native kernel with torch forms and with this machine's memory bandwidth in one run.
Every strategy adds the same adapters to the same rows of all sites; with many adapters the weights
of one step are far larger than the caches.

    python -m bench.micro_gated --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from polyadapt.ops import native
from polyadapt.ops.cells import COLUMNS

# SmolLM2-135M: 30 layers of q, k, v, o, gate, up, down as (in, out).
LAYERS = 30
SITES = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)]


class Step:
    """One step of all sites: `rows` rows, as many neighbours for each of the adapters."""

    def __init__(self, rows: int, adapters: int, rank: int, arena_dtype: torch.dtype) -> None:
        self.rank, self.adapters, self.num_rows = rank, adapters, rows
        self.shapes = SITES * LAYERS
        sizes = [rank * (i + o) for i, o in self.shapes]
        self.nbytes = adapters * sum(sizes) * arena_dtype.itemsize
        # Each (adapter, site) cell at a random place, as after many loads and evictions.
        places = [(a, s) for a in range(adapters) for s in range(len(sizes))]
        order = torch.randperm(len(places)).tolist()
        self.cells = torch.zeros(adapters, len(sizes), COLUMNS, dtype=torch.int64)
        offset = 0
        for n in order:
            adapter, site = places[n]
            self.cells[adapter, site, 0], self.cells[adapter, site, 1] = offset, rank
            offset += sizes[site]
        self.arena = torch.randn(1 << 20).to(arena_dtype).repeat(-(-offset // (1 << 20)))[:offset]
        per = rows // adapters
        self.rows = torch.arange(rows, dtype=torch.int32)
        self.bounds = torch.arange(0, rows + 1, per, dtype=torch.int32)
        self.slots = torch.arange(adapters, dtype=torch.int32)
        self.scales = torch.ones(adapters)
        self.x = {i: torch.randn(rows, i) for i, _ in self.shapes}
        self.y = {o: torch.zeros(rows, o) for _, o in self.shapes}
        self.offsets = self.cells[:, :, 0].tolist()
        self.per = per

    def native(self) -> None:
        for site, (i, o) in enumerate(self.shapes):
            native.gated_matmul_(
                self.y[o], self.x[i], self.arena, self.cells, self.rows, self.bounds, self.slots,
                self.scales, self.adapters, None, None, torch.tensor([[site, 0, o]]),
            )  # fmt: skip

    def loop(self) -> None:
        """Two mm per segment on views of the arena."""
        for site, (i, o) in enumerate(self.shapes):
            for a in range(self.adapters):
                offset = self.offsets[a][site]
                rows = slice(a * self.per, (a + 1) * self.per)
                A = self.arena[offset : offset + self.rank * i].view(self.rank, i)
                B = self.arena[offset + self.rank * i :][: self.rank * o].view(self.rank, o)
                h = self.x[i][rows].to(A.dtype) @ A.t()
                self.y[o][rows] += h @ B

    def gather(self) -> None:
        """The adapters' components collected by index_select, then one bmm each for A and B."""
        for site, (i, o) in enumerate(self.shapes):
            # One row of `unit` elements is the largest that divides every offset, A row and B row.
            unit, offsets = 64, self.cells[:, site, 0]
            A, B = (
                self.arena[: self.arena.numel() // unit * unit]
                .view(-1, unit)
                .index_select(
                    0,
                    (
                        (offsets + skip)[:, None] // unit + torch.arange(self.rank * width // unit)
                    ).flatten(),
                )
                .view(self.adapters, self.rank, width)
                for skip, width in ((0, i), (self.rank * i, o))
            )
            x = self.x[i].view(self.adapters, self.per, i).to(A.dtype)
            self.y[o].view(self.adapters, self.per, o).add_(torch.bmm(torch.bmm(x, A.mT), B))


def bandwidth(nbytes: int = 1 << 29) -> float:
    """Return bytes per second of reading one large float32 tensor with torch's threads."""
    data = torch.ones(nbytes // 4)
    return nbytes / timed(lambda: data.sum(), 5)


def timed(run: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of `repeats` runs after one that warms up."""
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def call_overhead() -> float:
    """Return seconds of one call of the native kernel with next to no work."""
    step = Step(1, 1, 1, torch.float32)
    x, y = torch.ones(1, 1), torch.ones(1, 1)

    def run() -> None:
        for _ in range(1000):
            native.gated_matmul_(
                y, x, step.arena, step.cells, step.rows, step.bounds, step.slots, step.scales, 1,
                None, None, torch.tensor([[0, 0, y.shape[1]]]),
            )  # fmt: skip

    return timed(run, 9) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(f"native: {native.unavailable_reason()}; {options.threads} threads, rank {options.rank}")
    print(f"one call without work: {call_overhead() * 1e6:.1f} us")
    print("rows adapters arena      MB  read GB/s | native ms  of bandwidth |  loop x  gather x")
    with torch.inference_mode():
        for rows, adapters in ((1, 1), (8, 8), (32, 32), (32, 1), (32, 8), (256, 2)):
            for dtype in (torch.float32, torch.bfloat16):
                step = Step(rows, adapters, options.rank, dtype)
                speed = bandwidth()
                seconds = timed(step.native, options.repeats)
                others = [timed(run, 2) / seconds for run in (step.loop, step.gather)]
                print(
                    f"{rows:4} {adapters:8} {str(dtype)[6:]:9} {step.nbytes / 1e6:5.0f} "
                    f"{speed / 1e9:9.1f} | {seconds * 1e3:9.1f} "
                    f"{step.nbytes / seconds / speed:12.0%} "
                    f"| {others[0]:7.1f} {others[1]:9.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
