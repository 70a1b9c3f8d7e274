"""What the pool knows of one adapter: which tier it is in, and who waits for it there."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

from polyadapt.adapters.adapter import ORDINARY, Traits
from polyadapt.adapters.arena import Extent
from polyadapt.adapters.eviction import Standing
from polyadapt.adapters.packing import PackedAdapter
from polyadapt.errors import PolyadaptError
from polyadapt.types import Residency, Tier

Done = Callable[["Residency | PolyadaptError"], None]


class State(enum.Enum):
    """reading -> host -> placing -> device; device -> host where the host copy was kept."""

    READING = enum.auto()
    HOST = enum.auto()
    PLACING = enum.auto()
    DEVICE = enum.auto()


@dataclass(slots=True, eq=False)
class Entry:
    """One adapter that is in some tier, or on its way there."""

    digest: str
    state: State
    nbytes: int = 0
    traits: Traits = ORDINARY
    packed: PackedAdapter | None = None  # the host copy
    slot: int = -1
    extent: Extent | None = None
    num_leases: int = 0
    is_pinned: bool = False
    wanted_round: int = -2  # the latest round in which a queued request asked for it
    is_short: bool = False  # it lies on the host because nothing could be evicted for it
    on_device_standing: Standing = field(default_factory=Standing)
    on_host_standing: Standing = field(default_factory=Standing)
    last_used: float = 0.0  # unix seconds, for people
    load_ms: float = 0.0  # of the latest trip to the device, until the first lease reports it
    load_tier: Tier = "device"
    started: float = 0.0
    read_s: float = 0.0  # what its own read took
    copy_started: float = 0.0
    on_host: list[Done] = field(default_factory=list)
    on_device: list[Done] = field(default_factory=list)

    def residency(self) -> Residency:
        """Where it is, for those outside."""
        tier: Tier = "store" if self.state is State.READING else "host"
        return Residency(
            self.digest,
            "device" if self.state is State.DEVICE else tier,
            is_pinned=self.is_pinned,
            num_leases=self.num_leases,
            last_used=self.last_used,
            nbytes=self.nbytes,
        )
