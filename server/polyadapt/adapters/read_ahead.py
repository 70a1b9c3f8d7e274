"""Reads adapters on threads of its own: what is commanded at once, what the queue will need in the
queue's order and not further ahead than there will be room.

Knows no slots and no extents: the pool says what room there is. Called on the engine's thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from polyadapt.adapters.entry import Entry, State
from polyadapt.adapters.load_estimate import LoadEstimate
from polyadapt.adapters.pace import Pace, Turn
from polyadapt.adapters.packing import PackedAdapter

Read = Callable[[str], PackedAdapter]  # digest -> weights; raises PolyadaptError

_NUM_AHEAD = 2  # adapters read for the queue beyond what the device has room for now
# One of them works at a time: reading is Python for the most part, and two would share one
# interpreter. The others wait for their turn, so many long reads for shorter ones to go first.
_NUM_THREADS = 8
# Rounds: a full batch asks for nobody in the queue for a while, and asks again.
_ABANDONED_AFTER = 100


@dataclass(frozen=True, slots=True)
class Room:
    """What of the device is free or idle."""

    num_slots: int
    nbytes: int


class ReadAhead:
    """See the module."""

    def __init__(
        self,
        read: Read,
        host_bytes: int,
        counters: Counter[str],
        wake: Callable[[], None],
        clock: Callable[[], float],
        pace: Pace,
    ) -> None:
        """wake is called, on the reading thread, whenever a read has ended; `read` breathes by the
        pace.
        """
        self.jobs: dict[Future[PackedAdapter], Entry] = {}
        self._turns: dict[Future[PackedAdapter], Turn] = {}  # of the same jobs
        self._pace = pace
        self._read = read
        self._host_bytes = host_bytes
        self._counters = counters
        self._wake = wake
        self._clock = clock
        self._readers = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="adapter-reader")
        self._estimate = LoadEstimate(5e-3, 1e-8)  # a guess, until something was read
        self._mean_nbytes = 0.0  # of the adapters that were read lately
        self._num_cold = self._cold_nbytes = 0  # wanted in this round and not on the device
        self._has_deferred = False  # whoever comes later in the round is read later

    def begin_round(self) -> None:
        """Forget whom the queue asked for."""
        self._num_cold = self._cold_nbytes = 0
        self._has_deferred = False

    def count_cold(self, entry: Entry) -> None:
        """Note that a queued request waits for this adapter, which is not on the device."""
        self._num_cold += 1
        self._cold_nbytes += entry.nbytes or int(self._mean_nbytes)

    def may_read(self, room: Callable[[], Room]) -> bool:
        """Whether the queue's next cold adapter is read already now; if not, none behind it is.

        The first of a round always is. The others, in the queue's order, as long as what is cold
        before them and they fit into the host's memory and into the device's that is free or
        idle, and _NUM_AHEAD more: beyond that they would only push each other out.
        """
        self._has_deferred = self._has_deferred or not self._has_room(room)
        return not self._has_deferred

    def start(self, entry: Entry) -> None:
        """Read the entry's adapter; see take_done."""

        turn = self._pace.queue()

        def read() -> PackedAdapter:
            with self._pace.reading(turn):
                started = self._clock()
                packed = self._read(entry.digest)
                entry.read_s = self._clock() - started
                return packed

        future = self._readers.submit(read)
        self.jobs[future], self._turns[future] = entry, turn
        future.add_done_callback(lambda _: self._wake())
        self._counters["adapter_reads"] += 1

    def take_done(self) -> list[tuple[Entry, PackedAdapter | BaseException]]:
        """The reads that have ended since the last call, with what came of them."""
        taken: list[tuple[Entry, PackedAdapter | BaseException]] = []
        for future in [job for job in self.jobs if job.done()]:
            entry, error = self.jobs.pop(future), future.exception()
            del self._turns[future]
            taken.append((entry, future.result() if error is None else error))
        return taken

    def observe(self, entry: Entry) -> None:
        """Learn from a read how long reads take and how large adapters are."""
        self._estimate.observe(entry.nbytes, entry.read_s)
        share = 0.1 if self._mean_nbytes else 1.0
        self._mean_nbytes += (entry.nbytes - self._mean_nbytes) * share

    def seconds(self, nbytes: int) -> float:
        """What a read of so many bytes is expected to take."""
        return self._estimate.seconds(nbytes)

    def give_up(self, is_awaited: Callable[[Entry], bool], round_number: int) -> list[Entry]:
        """Call off reads that have not begun and that nobody waits for any more; return them."""
        left = []
        for future, entry in list(self.jobs.items()):
            is_recent = entry.wanted_round >= round_number - _ABANDONED_AFTER
            if is_recent or is_awaited(entry) or not self._pace.call_off(self._turns[future]):
                continue
            del self.jobs[future], self._turns[future]
            left.append(entry)
        return left

    def close(self) -> None:
        """Stop the threads; nothing is usable afterwards."""
        for turn in self._turns.values():
            self._pace.call_off(turn)
        self._readers.shutdown(wait=True, cancel_futures=True)

    def check_integrity(self, entries: list[Entry]) -> None:
        """Assert that exactly the entries that are being read have a job."""
        reading = {id(entry) for entry in entries if entry.state is State.READING}
        assert reading == {id(entry) for entry in self.jobs.values()}, "a read without its entry"
        assert self.jobs.keys() == self._turns.keys()

    def _has_room(self, room: Callable[[], Room]) -> bool:
        if self._num_cold == 0:
            return True
        if self._mean_nbytes == 0.0:  # nothing was read yet: no size is known
            return self._num_cold <= _NUM_AHEAD
        nbytes = self._cold_nbytes + self._mean_nbytes
        if nbytes > self._host_bytes:
            return False
        there = room()
        if self._num_cold >= there.num_slots + _NUM_AHEAD:
            return False
        return nbytes <= there.nbytes + _NUM_AHEAD * self._mean_nbytes
