"""Copies of adapters into the arena: at once, or beside the steps and told of when they are over.

Knows no slots and no leases. Until a transfer is over its target is written to and its source read,
so that both stay as they are; whoever starts one sees to that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from polyadapt.adapters.entry import Entry
from polyadapt.ops.device import Device, Mark

# Bytes under way to an asynchronous device: a step's own inputs queue behind at most so many, which
# take 0.7 ms at the 25 GB/s of PCIe 4 x16, and an adapter of a GiB comes in 64 steps.
_UNDER_WAY_NBYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Ended:
    """A transfer that is over: whole, cut short, or failed with `error`."""

    entry: Entry
    is_whole: bool
    error: BaseException | None = None


class Transfers(Protocol):
    """What the pool copies with."""

    @property
    def entries(self) -> list[Entry]:
        """Whose transfers are under way, the oldest first."""

    @property
    def futures(self) -> list[Future[None]]:
        """What a thread works at: something that can be waited for instead of asking."""

    def make(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy at once: steps from now on find it done."""

    def start(self, entry: Entry, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy beside the steps, both of one dtype and size; see advance."""

    def advance(self, patience_s: float) -> list[Ended]:
        """Between two steps: go on with what was started, and return what has ended since the last
        call; steps from now on find that done. Waits for no more than about patience_s.
        """

    def cut_short(self, entry: Entry) -> None:
        """Copy nothing more for the entry than what cannot be held back; it ends all the same."""

    def close(self) -> None:
        """Return when nothing is written or read any more; nothing is usable afterwards."""


class ThreadTransfers:
    """On a thread of its own: for a device whose memory is the host's."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """wake is called, on that thread, whenever a transfer is over."""
        self._wake = wake
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="adapter-copier")
        self._jobs: dict[Future[None], Entry] = {}

    @property
    def entries(self) -> list[Entry]:
        """See Transfers.entries."""
        return list(self._jobs.values())

    @property
    def futures(self) -> list[Future[None]]:
        """See Transfers.futures."""
        return list(self._jobs)

    def make(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy with all cores."""
        target.copy_(source)

    def start(self, entry: Entry, target: torch.Tensor, source: torch.Tensor) -> None:
        """See Transfers.start."""
        future = self._copier.submit(_copy_beside, target, source)
        self._jobs[future] = entry
        future.add_done_callback(lambda _: self._wake())

    def advance(self, patience_s: float) -> list[Ended]:
        """See Transfers.advance; never waits."""
        ended = []
        for future in [job for job in self._jobs if job.done()]:
            error = future.exception()
            ended.append(Ended(self._jobs.pop(future), error is None, error))
        return ended

    def cut_short(self, entry: Entry) -> None:
        """Nothing can be held back."""

    def close(self) -> None:
        """See Transfers.close."""
        self._copier.shutdown(wait=True, cancel_futures=True)


@dataclass(slots=True, eq=False)
class _Transfer:
    """Elements [0, num_sent) were enqueued, the last of them before `mark`."""

    entry: Entry
    target: torch.Tensor
    source: torch.Tensor
    num_sent: int = 0
    is_cut: bool = False
    mark: Mark | None = None

    @property
    def is_sent(self) -> bool:
        return self.is_cut or self.num_sent == self.target.numel()

    @property
    def is_over(self) -> bool:
        return self.is_sent and (self.mark is None or self.mark.is_reached)


class StreamTransfers:
    """On a copy stream of an asynchronous device, a bounded part between two steps.

    Nothing is waited for while steps are computed: marks are asked whether they are reached.
    """

    def __init__(self, device: Device, clock: Callable[[], float]) -> None:
        """clock in seconds, for what waits at most so long."""
        self._device = device
        self._clock = clock
        self._stream = device.copy_stream()
        self._transfers: list[_Transfer] = []  # served in this order
        self._sent: deque[tuple[Mark, int]] = deque()  # bytes before each mark, behind the last
        self._nbytes = 0  # of all those

    @property
    def entries(self) -> list[Entry]:
        """See Transfers.entries."""
        return [transfer.entry for transfer in self._transfers]

    @property
    def futures(self) -> list[Future[None]]:
        """None: no thread is at work."""
        return []

    def make(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy, and wait for it and for all before it: while nobody is served."""
        self._stream.follow(self._device.mark())
        self._stream.copy(target, source)
        mark = self._stream.mark()
        mark.wait()
        mark.precede()

    def start(self, entry: Entry, target: torch.Tensor, source: torch.Tensor) -> None:
        """See Transfers.start."""
        # Steps that are enqueued may still read what lay there before.
        self._stream.follow(self._device.mark())
        self._transfers.append(_Transfer(entry, target, source))
        self._send()

    def advance(self, patience_s: float) -> list[Ended]:
        """See Transfers.advance."""
        ended = self._take_ended()
        if patience_s > 0.0 and self._sent:
            deadline = self._clock() + patience_s
            while self._sent and self._clock() < deadline:
                self._sent[0][0].wait()
                ended += self._take_ended()
        return ended

    def cut_short(self, entry: Entry) -> None:
        """See Transfers.cut_short."""
        for transfer in self._transfers:
            transfer.is_cut = transfer.is_cut or transfer.entry is entry

    def close(self) -> None:
        """See Transfers.close."""
        for mark, _ in self._sent:
            mark.wait()
        self._transfers.clear()
        self._sent.clear()

    def _take_ended(self) -> list[Ended]:
        """Those whose mark is reached; others go on in their place."""
        while self._sent and self._sent[0][0].is_reached:
            self._nbytes -= self._sent.popleft()[1]
        over = [transfer for transfer in self._transfers if transfer.is_over]
        for transfer in over:
            self._transfers.remove(transfer)
            if transfer.mark is not None:
                transfer.mark.precede()
        self._send()
        return [Ended(each.entry, each.num_sent == each.target.numel()) for each in over]

    def _send(self) -> None:
        """Enqueue as much as may be under way, with one mark behind it."""
        before, carried = self._nbytes, []
        for transfer in self._transfers:
            element_size = transfer.target.element_size()
            room = (_UNDER_WAY_NBYTES - self._nbytes) // element_size
            if transfer.is_sent or room <= 0:
                continue
            start = transfer.num_sent
            stop = min(start + room, transfer.target.numel())
            self._stream.copy(transfer.target[start:stop], transfer.source[start:stop])
            transfer.num_sent = stop
            self._nbytes += (stop - start) * element_size
            carried.append(transfer)
        if not carried:
            return
        mark = self._stream.mark()
        self._sent.append((mark, self._nbytes - before))
        for transfer in carried:
            transfer.mark = mark


def _copy_beside(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy while the engine steps: on one core, not all, and without the interpreter."""
    np.copyto(target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())
