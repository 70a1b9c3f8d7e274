"""Rows by position: what was put is what is found, the newest last."""

from __future__ import annotations

import numpy as np
import pytest

from polyadapt.engine.token_table import TokenTable

NEVER = 1 << 62


def rows(*values: float) -> np.ndarray:
    return np.array([[value, -value] for value in values], np.float32)


def values(table: TokenTable, start: int, stop: int, last: int = NEVER) -> list[float]:
    found = table.at(start, stop, last)
    assert found.tolist() == rows(*found[:, 0].tolist()).tolist()
    return found[:, 0].tolist()


def test_rows_are_found_by_position():
    table = TokenTable()
    table.put(3, rows(3, 4))
    table.put(5, rows(5))
    assert table.stop == 6
    assert values(table, 3, 6) == [3, 4, 5]
    assert values(table, 4, 5) == [4]


def test_rows_that_are_put_again_replace_those_from_there_on():
    table = TokenTable()
    table.put(3, rows(3, 4, 5))
    table.put(4, rows(40))
    assert values(table, 3, 5) == [3, 40]
    assert table.stop == 5
    table.put(3, rows(30, 41))
    assert values(table, 3, 5) == [30, 41]


def test_rows_that_do_not_continue_the_others_stand_alone():
    table = TokenTable()
    table.put(3, rows(3, 4))
    table.put(9, rows(9))
    assert values(table, 9, 10) == [9]
    table.put(1, rows(1))
    assert values(table, 1, 2) == [1]
    assert table.stop == 2


def test_the_last_row_stands_for_all_behind_it():
    table = TokenTable()
    table.put(0, rows(0, 1, 2))
    assert values(table, 1, 5, last=2) == [1, 2, 2, 2]
    assert values(table, 7, 9, last=1) == [1, 1]


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (2, 6), (6, 7)])
def test_a_row_that_is_not_there_is_no_row(start, stop):
    table = TokenTable()
    table.put(1, rows(1, 2, 3, 4))
    with pytest.raises(AssertionError, match="missing"):
        table.at(start, stop, NEVER)


def test_old_rows_leave_and_the_last_one_stays():
    table = TokenTable()
    table.put(0, rows(0, 1, 2, 3))
    table.forget_before(2)
    assert values(table, 2, 4) == [2, 3]
    with pytest.raises(AssertionError):
        table.at(1, 3, NEVER)
    table.forget_before(99)
    assert values(table, 3, 4) == [3]
    table.put(4, rows(4))
    assert values(table, 3, 5) == [3, 4]
