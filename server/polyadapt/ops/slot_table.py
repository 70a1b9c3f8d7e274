"""What plans and kernels know of every slot beside the host's cell table: a copy of it where the
arena lies, and what of it a plan asks for in every step.

Written between two steps by whoever fills the slots. Knows slots and sites, never names.
"""

from __future__ import annotations

import numpy as np
import torch

from polyadapt.ops import cells as layout
from polyadapt.ops.device import Device
from polyadapt.ops.pinned_buffers import PinnedBuffers

_NUM_BUFFERS = 8  # of one slot's cells each: so many slots may change behind one step


class SlotTable:
    """cells int64 [num_slots, num_sites, 4] on the device; by slot, max_ranks int32 [num_slots],
    the largest rank of its cells without a routing, and is_routed bool [num_slots], whether it has
    cells whose components are weighed row by row.
    """

    def __init__(
        self, cells: torch.Tensor, device: Device, is_linear: torch.Tensor | None = None
    ) -> None:
        """cells: int64 [num_slots, num_sites, 4] on the host, owned by whoever fills the slots; no
        slot is filled yet. is_linear: bool [num_sites], the sites whose ranks count; None: all.
        """
        self.cells = torch.full(cells.shape, -1, dtype=torch.int64, device=device.torch_device)
        self.max_ranks = np.zeros(cells.shape[0], np.int32)
        self.is_routed = np.zeros(cells.shape[0], np.bool_)
        self._host = cells
        self._is_linear = torch.tensor(True) if is_linear is None else is_linear
        self._pinned = PinnedBuffers(device, _NUM_BUFFERS)

    def update(self, slot: int) -> None:
        """Take over what the host's table says of the slot; steps that are enqueued from now on
        read it.
        """
        row = self._host[slot]
        ranks, routings = row[:, layout.RANK], row[:, layout.ROUTING]
        is_here = row[:, layout.OFFSET] >= 0
        is_weighed = (routings != 0) & (routings & layout.ROUTER_MASK != layout.Router.EXPERTS)
        plain = ranks[is_here & (routings == 0) & self._is_linear]
        self.max_ranks[slot] = int(plain.max()) if len(plain) else 0
        self.is_routed[slot] = bool((is_here & is_weighed).any())
        nbytes = row.numel() * row.element_size()
        with self._pinned.turn(nbytes) as buffer:
            staged = buffer[:nbytes].view(torch.int64).view(row.shape)
            staged.copy_(row)
            self.cells[slot].copy_(staged, non_blocking=True)
