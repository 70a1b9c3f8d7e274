"""Many sequences' uniform numbers at once are those that numpy's generator makes one by one."""

from __future__ import annotations

import numpy as np

from polyadapt.engine.uniform import uniforms


def test_they_are_the_first_numbers_of_philox_generators():
    rng = np.random.default_rng(0)
    seeds = [0, 1, 2**63, 2**64 - 1, -1, -(2**63), *rng.integers(0, 2**63, 200).tolist()]
    indices = [0, 1, 127, 5, 0, 3, *rng.integers(0, 128, 200).tolist()]
    counters = [0, 2**20, 7, 2**32 - 1, 2**32, 1, *rng.integers(0, 2**40, 200).tolist()]
    expected = [
        np.random.Generator(
            np.random.Philox(
                key=np.array([seed % 2**64, index], np.uint64),
                counter=np.array([counter, 0, 0, 0], np.uint64),
            )
        ).random()
        for seed, index, counter in zip(seeds, indices, counters, strict=True)
    ]
    assert uniforms(seeds, indices, counters).tolist() == expected
