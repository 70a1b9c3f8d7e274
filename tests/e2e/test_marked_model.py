"""A copy behind an endpoint, found out as a stranger would: the default model serves users beside
demo adapters, each under a mark of its own, and its owner asks over HTTP whose copy it is.
"""

from __future__ import annotations

from pathlib import Path

from tests.support.marked_model import marked_model

# Of 16 bits; bench.mark_lm_http reads all of them beside this adapter.
LEAST_RIGHT = 14


def test_a_users_copy_beside_an_adapter_is_told_by_asking_it(
    smollm2_dir: Path, tmp_path: Path
) -> None:
    others = [f"other-{i}" for i in range(10)]
    with marked_model(tmp_path / "house", smollm2_dir) as house:
        rows = {user: house.add_user(user) for user in ("ann", "bob")}
        unmarked = house.who("tea-house", "ann", others, tmp_path)
        assert (unmarked.status, unmarked.named) == (3, []), unmarked.output
        assert unmarked.bits == [None] * 16
        house.require()
        found = house.who("tea-house", "bob", others, tmp_path)
        pairs = list(zip(found.bits, rows["bob"], strict=True))
        assert sum(value == bit for value, bit in pairs) >= LEAST_RIGHT, found.output
        assert all(value in (None, bit) for value, bit in pairs), found.output
        # Among twelve users so many bits are enough: 12 / 2^14 is below the error of 1e-3.
        assert (found.status, found.named) == (0, [house.ids["bob"]]), found.output
