"""From the final hidden states of scouts to the weights of their mains' experts."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch

from polyadapt.adapters.adapter import Probe, Traits
from polyadapt.adapters.probe import choose, weigh
from polyadapt.engine.request import Sequence
from polyadapt.engine.scheduler import ScheduledRows
from polyadapt.engine.token_table import TokenTable


class Probes(Protocol):
    """What is needed of the pool."""

    def traits(self, slot: int) -> Traits:
        """Of the adapter in a leased slot."""

    def probe_weights(self, slot: int) -> torch.Tensor:
        """The tensors of its probe, flat."""


@dataclass(frozen=True, slots=True)
class _Use:
    """Rows [start, stop) of a step, which weigh a lane's experts from position `first` on."""

    main: Sequence
    lane_id: int
    first: int
    start: int
    stop: int


@torch.inference_mode()
def weigh_experts(
    batch: Seq[ScheduledRows], hidden: torch.Tensor, probes: Probes, *, is_exact: bool
) -> None:
    """Fill the mains' expert_weights from the rows of their scouts, as far as a main will use them.

    hidden [rows, width] are the final hidden states of all rows of the step, in its order, before
    the scouts count them as computed. One product serves the rows of all who share an adapter.
    """
    by_slot: dict[int, list[_Use]] = {}
    start = 0
    for rows in batch:
        stop = start + rows.num_tokens
        main = rows.sequence.main
        if main is not None:
            for lane_id, lane in enumerate(main.lanes):
                if lane.probing is None:
                    continue
                position = rows.sequence.num_computed
                first = max(position, _first_needed(main, lane_id))
                last = min(position + rows.num_tokens, lane.probing.frozen_from)
                if first < last:
                    at = start + first - position
                    use = _Use(main, lane_id, first, at, at + last - first)
                    by_slot.setdefault(main.slots[lane_id], []).append(use)
        start = stop
    for slot, uses in by_slot.items():
        probe = probes.traits(slot).probe
        assert probe is not None, "whoever is probed has a probe"
        index = torch.cat([torch.arange(use.start, use.stop) for use in uses])
        weights = weigh(
            hidden[index.to(hidden.device)], probes.probe_weights(slot), probe, is_exact=is_exact
        )
        _hand_out(weights, uses, probe)


def _hand_out(weights: torch.Tensor, uses: list[_Use], probe: Probe) -> None:
    """weights [rows of all uses, width], use after use."""
    counts = [use.stop - use.start for use in uses]
    for use, own in zip(uses, torch.split(weights, counts), strict=True):
        probing = use.main.lanes[use.lane_id].probing
        assert probing is not None
        found = choose(own, probe, probing.top_k, probing.scale)
        table = use.main.expert_weights.setdefault(use.lane_id, TokenTable())
        table.put(use.first, found.cpu().numpy())


def forget_used(main: Sequence) -> None:
    """Let go of the weights of tokens that the main has run."""
    for lane_id, table in main.expert_weights.items():
        table.forget_before(_first_needed(main, lane_id))


def _first_needed(main: Sequence, lane_id: int) -> int:
    """The first position whose weights the main will use."""
    probing = main.lanes[lane_id].probing
    assert probing is not None
    return min(main.num_computed, probing.frozen_from - 1)
