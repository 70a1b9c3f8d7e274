"""A read beside steps pauses in proportion to its work, and lets shorter ones go first."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from polyadapt.adapters.pace import LONG_S, CalledOffError, Pace


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
    with pace.reading(pace.queue()):
        clock.work(pace)
    share = clock.worked / (clock.worked + clock.slept)
    assert 0.2 < share < 0.3


def test_alone_it_never_pauses():
    clock = Clock()
    pace = Pace(lambda: clock.worked, clock.sleep)
    with pace.reading(pace.queue()):
        clock.work(pace)
    assert clock.slept == 0.0


def test_many_short_reads_pause_like_a_long_one():
    clock = Clock()
    pace = Pace(lambda: clock.worked, clock.sleep)
    pace.is_shared = True
    for _ in range(1000):
        with pace.reading(pace.queue()):
            clock.worked += 0.0005
            pace.breathe()
    share = clock.worked / (clock.worked + clock.slept)
    assert 0.2 < share < 0.3


def test_outside_of_a_read_nobody_pauses():
    Pace(lambda: 1e9, lambda _: pytest.fail("it slept")).breathe()


class Readers:
    """Threads that read in parts of `part_s` seconds of work each, told apart by name."""

    def __init__(self) -> None:
        self._own = threading.local()
        self.pace = Pace(lambda: getattr(self._own, "worked", 0.0), lambda _: None)
        self.log: list[str] = []
        self.called_off: list[str] = []
        self._threads: list[threading.Thread] = []

    def start(
        self, name: str, num_parts: int, part_s: float, then: Callable[[int], None] | None = None
    ):
        turn = self.pace.queue()

        def read() -> None:
            self._own.worked = 0.0
            try:
                with self.pace.reading(turn):
                    for number in range(num_parts):
                        self._own.worked += part_s
                        self.log.append(name)
                        if then is not None:
                            then(number)
                        self.pace.breathe()
            except CalledOffError:
                self.called_off.append(name)

        self._threads.append(threading.Thread(target=read))
        self._threads[-1].start()
        return turn

    def join(self) -> None:
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


@pytest.fixture
def readers() -> Readers:
    return Readers()


def test_short_reads_follow_each_other_whole(readers: Readers):
    gate = threading.Event()
    readers.start("a", 3, LONG_S / 4, lambda _: gate.wait(10))
    for name in "bc":
        readers.start(name, 3, LONG_S / 4)
    gate.set()
    readers.join()
    assert "".join(readers.log) == "aaabbbccc"


def test_a_long_read_lets_shorter_ones_go_first_between_two_parts(readers: Readers):
    def begin_others(number: int) -> None:
        if number == 4:
            readers.start("b", 2, LONG_S / 4)
            readers.start("c", 2, LONG_S / 4)

    readers.start("a", 10, LONG_S / 4, begin_others)
    while len(readers._threads) < 3:
        pass
    readers.join()
    assert "".join(readers.log) == "aaaaa" + "bbcc" + "aaaaa"


def test_long_reads_end_one_after_the_other(readers: Readers):
    def begin_another(number: int) -> None:
        if number == 0:
            readers.start("b", 10, LONG_S / 2)

    readers.start("a", 10, LONG_S / 2, begin_another)
    while len(readers._threads) < 2:
        pass
    readers.join()
    # b is short until it has worked as long as a had when a let it go first.
    assert "".join(readers.log) == "aa" + "bb" + "a" * 8 + "b" * 8


def test_a_read_that_has_not_begun_can_be_called_off_and_no_other(readers: Readers):
    gate = threading.Event()
    begun = readers.start("a", 2, 0.001, lambda _: gate.wait(10))
    while not begun.has_begun:
        pass
    turn = readers.start("b", 2, 0.001)
    readers.start("c", 2, 0.001)
    assert readers.pace.call_off(turn)
    assert not readers.pace.call_off(turn), "once is enough"
    assert not readers.pace.call_off(begun)
    gate.set()
    readers.join()
    assert "".join(readers.log) == "aacc"
    assert readers.called_off == ["b"]


def test_a_read_that_fails_gives_its_turn_back(readers: Readers):
    with pytest.raises(KeyError), readers.pace.reading(readers.pace.queue()):
        raise KeyError
    readers.start("a", 2, 0.001)
    readers.join()
    assert "".join(readers.log) == "aa"
