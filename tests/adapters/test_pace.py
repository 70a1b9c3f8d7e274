"""A read beside steps pauses in proportion to its work."""

from __future__ import annotations

from polyadapt.adapters.pace import Pace


class Clock:
    def __init__(self) -> None:
        self.worked = 0.0
        self.slept = 0.0

    def work(self, pace: Pace) -> None:
        for _ in range(1000):
            self.worked += 0.0003
            pace.breathe()

    def sleep(self, seconds: float) -> None:
        self.slept += seconds


def test_beside_steps_it_takes_a_quarter_of_a_core():
    clock = Clock()
    pace = Pace(lambda: clock.worked, clock.sleep)
    pace.is_shared = True
    pace.begin()
    clock.work(pace)
    share = clock.worked / (clock.worked + clock.slept)
    assert 0.2 < share < 0.3


def test_alone_it_never_pauses():
    clock = Clock()
    pace = Pace(lambda: clock.worked, clock.sleep)
    pace.begin()
    clock.work(pace)
    assert clock.slept == 0.0


def test_many_short_reads_pause_like_a_long_one():
    clock = Clock()
    pace = Pace(lambda: clock.worked, clock.sleep)
    pace.is_shared = True
    for _ in range(1000):
        pace.begin()
        clock.worked += 0.0005
        pace.breathe()
    share = clock.worked / (clock.worked + clock.slept)
    assert 0.2 < share < 0.3
