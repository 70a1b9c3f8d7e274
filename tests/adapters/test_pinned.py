"""Page-locked memory: slabs, how many there may be, and what happens when there is no more."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from tests.support.fake_streams import FakeDevice

from polyadapt.adapters import pinned as pinned_module
from polyadapt.adapters.pinned import PinnedMemory
from polyadapt.errors import StartupError


@pytest.fixture(autouse=True)
def slabs_of_100_elements(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pinned_module, "_SLAB_NBYTES", 400)


def test_many_blocks_share_a_slab_and_the_next_is_locked_when_it_is_needed():
    device = FakeDevice()
    memory = PinnedMemory(device, torch.float32, 1000)
    assert device.num_pinned == [100], "the first one from the start"
    blocks = [memory.take(30) for _ in range(4)]
    assert all(block is not None and block.weights.shape == (30,) for block in blocks)
    assert device.num_pinned == [100, 100]
    starts = {block.weights.data_ptr() for block in blocks if block is not None}
    assert len(starts) == 4
    memory.check_integrity()
    assert memory.num_used == 120


def test_no_more_is_locked_than_was_allowed_and_what_comes_back_is_used_again():
    device = FakeDevice()
    memory = PinnedMemory(device, torch.float32, 1000)
    first, second, third = (memory.take(size) for size in (90, 90, 50))
    assert memory.take(1) is not None, "beside one of them"
    assert memory.take(20) is None
    assert device.num_pinned == [100, 100, 50]
    assert first is not None
    memory.give_back(first)
    again = memory.take(80)
    assert again is not None
    assert again.weights.data_ptr() == first.weights.data_ptr()
    assert None not in (second, third)
    memory.check_integrity()


def test_what_is_larger_than_a_slab_has_one_of_its_own():
    device = FakeDevice()
    memory = PinnedMemory(device, torch.float32, 2000)
    block = memory.take(333)
    assert block is not None
    assert device.num_pinned == [100, 333]
    assert memory.take(100) is not None, "the first slab"
    assert memory.take(100) is None, "67 elements are left"


def test_nothing_is_locked_where_nothing_is_allowed():
    device = FakeDevice()
    assert PinnedMemory(device, torch.float32, 0).take(1) is None
    assert device.num_pinned == []


class Unlockable(FakeDevice):
    """Locks the first `num_good` pieces."""

    def __init__(self, num_good: int) -> None:
        super().__init__()
        self.num_good = num_good

    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if len(self.num_pinned) == self.num_good:
            raise RuntimeError("out of lockable memory")
        return super().pinned(shape, dtype)


def test_a_first_slab_that_cannot_be_locked_ends_the_start_and_names_the_flag():
    with pytest.raises(StartupError) as caught:
        PinnedMemory(Unlockable(0), torch.float32, 1000)
    for word in ("--host-adapter-bytes 1000", "400 bytes", "out of lockable memory", "ulimit"):
        assert word in caught.value.message


def test_a_later_slab_that_cannot_be_locked_is_told_once_and_not_tried_again(caplog):
    memory = PinnedMemory(Unlockable(1), torch.float32, 1000)
    assert memory.take(60) is not None
    assert memory.take(60) is None
    assert memory.take(60) is None
    assert memory.take(40) is not None
    assert caplog.text.count("cannot be page-locked") == 1


def test_blocks_of_several_threads_never_overlap():
    memory = PinnedMemory(FakeDevice(), torch.float32, 20_000)
    taken: list[tuple[int, int]] = []

    def take() -> None:
        for size in range(1, 60):
            block = memory.take(size)
            if block is not None and size % 3:
                taken.append((block.weights.data_ptr(), 4 * size))
            elif block is not None:
                memory.give_back(block)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken.sort()
    assert all(start + size <= later for (start, size), (later, _) in itertools.pairwise(taken))
    memory.check_integrity()
    assert memory.num_used == sum(size for _, size in taken) // 4
