"""What adapters with routers chose since they came to the device, and a warning where one expert of
several got nearly all.
"""

from __future__ import annotations

import logging

import torch

from polyadapt.ops import cells as layout

logger = logging.getLogger(__name__)

MAX_ADAPTERS = 16  # in one snapshot: those with the most rows
# One expert with so large a part of all weight is a collapse, once so many rows were routed.
COLLAPSE_SHARE = 0.9
_ENOUGH_ROWS = 5_000  # a row counts once at every routed module


class RoutingUsage:
    """Owns float32 [num_slots, cells.USAGE_COLUMNS], which the products of every step add to."""

    def __init__(self, cells: torch.Tensor, device: torch.device | None = None) -> None:
        """cells: int64 [num_slots, num_sites, 4], the pool's; device: where the products run."""
        self.table = torch.zeros(cells.shape[0], layout.USAGE_COLUMNS, device=device)
        # Taken over from there at every snapshot: a float32 stops counting at 2^24.
        self._totals = torch.zeros(self.table.shape, dtype=torch.float64)  # on the host
        self._cells = cells
        self._warned: set[str] = set()  # digests

    def forget(self, slot: int) -> None:
        """Begin anew for whoever is in the slot from now on."""
        self.table[slot] = self._totals[slot] = 0.0

    def snapshot(self, digest_of: dict[int, str]) -> dict[str, tuple[float, ...]]:
        """Return by digest the rows, and then each expert's part of their weight, in percent of 1.

        digest_of: the adapters on the device by slot. More experts than cells.USAGE_BUCKETS share
        their parts with their neighbours.
        """
        counted = self.table.cpu()
        if bool(counted[:, 0].any()):
            self._totals += counted
            self.table.zero_()
        rows = self._totals[:, 0]
        if not bool(rows.any()):  # nearly every server
            return {}
        routing = [slot for slot in rows.nonzero().flatten().tolist() if slot in digest_of]
        found = {}
        for slot in sorted(routing, key=lambda slot: -float(rows[slot]))[:MAX_ADAPTERS]:
            codes = self._cells[slot, self._cells[slot, :, layout.OFFSET] >= 0, layout.ROUTING]
            routings = [layout.Routing.of(code) for code in set(codes.tolist()) if code]
            num = max(routing.num_scores for routing in routings)
            weights = self._totals[slot, 1 : 1 + min(num, layout.USAGE_BUCKETS)]
            shares = (weights / weights.abs().sum().clamp(min=1e-30)).tolist()
            found[digest_of[slot]] = (float(rows[slot]), *shares)
        self._warn(found)
        return found

    def _warn(self, found: dict[str, tuple[float, ...]]) -> None:
        self._warned &= found.keys()
        for digest, (rows, *shares) in found.items():
            is_collapsed = len(shares) > 1 and max(shares) > COLLAPSE_SHARE
            if is_collapsed and rows >= _ENOUGH_ROWS and digest not in self._warned:
                self._warned.add(digest)
                logger.warning(
                    "the routing of adapter %s has collapsed: expert %d has %.0f %% of the weight "
                    "of %d rows; `polyadapt inspect --routing` shows it module by module",
                    digest, shares.index(max(shares)), 100 * max(shares), rows,
                )  # fmt: skip
