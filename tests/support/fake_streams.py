"""The streams of an asynchronous device, of CPU tensors: what is enqueued is done when a test lets
time pass.

Every piece of work begins and, later, ends. A copy's target is poisoned when it begins and filled
when it ends; work that begins on what another is writing, or writes what another reads, is an
error, and so is a source or something read that changes before its end. Work of one stream is done
in its order; that of several in any that the test chooses and the marks allow.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from polyadapt.ops.device import CopyStream, Mark

Span = tuple[int, int]  # addresses [start, stop)


def span_of(tensor: torch.Tensor) -> Span:
    start = tensor.data_ptr()
    return start, start + tensor.numel() * tensor.element_size()


def overlap(a: Span, b: Span) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])


@dataclass(eq=False)
class Copy:
    target: torch.Tensor
    source: torch.Tensor
    expected: torch.Tensor | None  # the source when it was enqueued; None: others still write it

    def begin(self) -> None:
        if self.expected is None:
            self.expected = self.source.clone()
        self.check()
        self.target.fill_(float("nan"))

    def end(self) -> None:
        self.check()
        self.target.copy_(self.source)

    def check(self) -> None:
        assert torch.equal(self.source, self.expected), "a source has changed before its copy"

    @property
    def written(self) -> list[Span]:
        return [span_of(self.target)]

    @property
    def read(self) -> list[Span]:
        return [span_of(self.source)]


@dataclass(eq=False)
class Step:
    """Reads tensors and finds in each what it is to hold."""

    tensors: list[torch.Tensor]
    expected: list[torch.Tensor]

    def begin(self) -> None:
        for tensor, expected in zip(self.tensors, self.expected, strict=True):
            assert torch.equal(tensor, expected), "a step reads what is not there"

    end = begin

    @property
    def written(self) -> list[Span]:
        return []

    @property
    def read(self) -> list[Span]:
        return [span_of(tensor) for tensor in self.tensors]


@dataclass(eq=False)
class Stream:
    work: deque[Copy | Step | FakeMark] = field(default_factory=deque)
    num_enqueued: int = 0
    num_done: int = 0
    is_busy: bool = False  # the first has begun

    def put(self, work: Copy | Step | FakeMark) -> None:
        self.work.append(work)
        self.num_enqueued += 1


class FakeMark:
    def __init__(self, device: FakeDevice, stream: Stream) -> None:
        self._device = device
        self._stream = stream
        self._position = stream.num_enqueued

    @property
    def is_reached(self) -> bool:
        return self._stream.num_done >= self._position

    def wait(self) -> None:
        self._device.num_waits += 1
        while not self.is_reached:
            assert self._device.run_one(), "a mark that is never reached"

    def precede(self) -> None:
        self._device.steps.put(self)


class FakeCopies:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self.stream = Stream()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.shape == source.shape
        assert target.dtype == source.dtype
        for stream in self._device.streams:
            for work in stream.work if stream is not self.stream else ():
                is_same = isinstance(work, Copy) and overlap(span_of(work.target), span_of(target))
                assert not is_same, "two streams write the same"
        is_final = not any(
            isinstance(work, Copy) and overlap(span_of(work.target), span_of(source))
            for work in self.stream.work
        )
        self.stream.put(Copy(target, source, source.clone() if is_final else None))

    def follow(self, mark: Mark) -> None:
        assert isinstance(mark, FakeMark)
        self.stream.put(mark)

    def mark(self) -> FakeMark:
        return FakeMark(self._device, self.stream)

    @property
    def pending(self) -> list[Copy]:
        """Enqueued and not done."""
        return [work for work in self.stream.work if isinstance(work, Copy)]


class FakeDevice:
    """See the module. Time passes in `run_one`, `run_all` and a mark's `wait`."""

    is_asynchronous = True

    def __init__(self, free_bytes: int = 1 << 30) -> None:
        self.steps = Stream()
        self.copies: list[FakeCopies] = []
        self.num_waits = 0
        self.num_pinned: list[int] = []  # elements of each piece of pinned memory
        self._free_bytes = free_bytes

    @property
    def streams(self) -> list[Stream]:
        return [self.steps, *(copies.stream for copies in self.copies)]

    def free_bytes(self) -> int:
        return self._free_bytes

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        memory = torch.full(shape, float("nan"), dtype=dtype)
        self.num_pinned.append(memory.numel())
        return memory

    def copy_stream(self) -> CopyStream:
        self.copies.append(FakeCopies(self))
        return self.copies[-1]

    def mark(self) -> FakeMark:
        return FakeMark(self, self.steps)

    def step(self, reads: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Enqueue a step that reads tensors, each with what it is to find."""
        self.steps.put(Step([tensor for tensor, _ in reads], [found for _, found in reads]))

    def run_one(self, choice: int = 0) -> bool:
        """Begin or end one piece of work, that of the `choice`-th stream that can go on; whether
        there was any.
        """
        able = [stream for stream in self.streams if self._is_able(stream)]
        if not able:
            assert not any(stream.work for stream in self.streams), "streams wait for each other"
            return False
        stream = able[choice % len(able)]
        work = stream.work[0]
        if not isinstance(work, FakeMark) and not stream.is_busy:
            self._check_clear(work)
            work.begin()
            stream.is_busy = True
            return True
        if not isinstance(work, FakeMark):
            work.end()
        stream.work.popleft()
        stream.num_done += 1
        stream.is_busy = False
        return True

    def run_all(self) -> None:
        """Let everything be done."""
        while self.run_one():
            pass

    def _is_able(self, stream: Stream) -> bool:
        first = stream.work[0] if stream.work else None
        return first is not None and (not isinstance(first, FakeMark) or first.is_reached)

    def _check_clear(self, work: Copy | Step) -> None:
        for stream in self.streams:
            if not stream.is_busy:
                continue
            other = stream.work[0]
            assert not isinstance(other, FakeMark)
            for written, touched in (
                (work.written, [*other.written, *other.read]),
                (other.written, work.read),
            ):
                clash = any(overlap(a, b) for a in written for b in touched)
                assert not clash, "two streams touch the same, and one of them writes it"
