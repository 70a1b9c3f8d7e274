"""Who takes GEMMs: by rows and rank, never in exact mode."""

from __future__ import annotations

import numpy as np
import torch

from polyadapt.ops.plan import GEMM_MIN_ROWS, RowUse, Runs, build_plan, plan_of
from polyadapt.ops.strategy import choose


def test_adapters_of_small_rank_are_left_to_the_kernel_for_longer():
    limits = choose(torch.float32, is_exact=False).gemm_rows(
        np.array([0, 8, 16, 64, 128, 256, 600])
    )
    assert limits.tolist() == sorted(limits.tolist(), reverse=True)
    by_rank = dict(zip((0, 8, 16, 64, 128, 256, 600), limits.tolist(), strict=True))
    assert min(by_rank[16], by_rank[64]) > 512, "GEMMs are slower there; see ops/strategy.py"
    assert (by_rank[128], by_rank[256], by_rank[600]) == (512, GEMM_MIN_ROWS, GEMM_MIN_ROWS)


def test_exact_mode_takes_gemms_for_nobody():
    limits = choose(torch.float32, is_exact=True).gemm_rows(np.array([0, 8, 600]))
    assert (limits > 1 << 40).all()


def test_a_limit_per_slot_splits_the_segments_of_a_plan_by_it():
    one = np.ones(1)
    runs = [Runs(np.array([0, 40, 80]), np.array([40, 40, 40]), np.array([2, 0, 1]), one.repeat(3))]
    (lane,) = plan_of(runs, 120, gemm_rows=np.array([41, 40, 50])).lanes
    assert (lane.slots.tolist(), lane.num_short) == ([0, 2, 1], 2)
    assert lane.rows.tolist() == [*range(40, 80), *range(40), *range(80, 120)]
    (lane,) = build_plan([RowUse(0, 120, (0,), (1.0,))], 120).lanes
    assert lane.num_short == 1
