"""The tokens of one step, on their way from the device to the host. Knows no sequences."""

from __future__ import annotations

import numpy as np
import torch

from polyadapt.engine.sampler import Sampled
from polyadapt.ops.device import Mark
from polyadapt.types import TokenLogprob


class DeviceTokens:
    """On the device at once, as the next step's input; on the host once they are read.

    ids int64 [rows] on the device, one for each sequence that was sampled, in their order; always
    of the vocabulary, also where the logits were not finite.
    """

    def __init__(
        self,
        ids: torch.Tensor,
        host: torch.Tensor,
        mark: Mark,
        num_logprobs: dict[int, int],
        kept: tuple[torch.Tensor, ...],
    ) -> None:
        """`host` int32 holds, from `mark` on, ids [rows], flags [rows] for finite logits and, of
        the n rows that num_logprobs says how many of the likeliest they want of, the chosen
        tokens' logprobs [n] and the likeliest tokens' [n, most] as the bits of float32, and the ids
        of those [n, most]. `kept` is what copies under way read.
        """
        self.ids = ids
        self._host = host
        self._mark = mark
        self._num_logprobs = num_logprobs
        self._kept = kept

    def fill(self, ids: torch.Tensor) -> torch.Tensor:
        """Return `ids`, int64 on the device, with every ~row in it replaced by that row's token."""
        return torch.where(ids < 0, self.ids[(~ids).clamp(min=0)], ids)

    def read(self) -> list[Sampled | None]:
        """Wait for the copy; None where the logits were not finite, see sampler.sample."""
        self._mark.wait()
        self._kept = ()
        num, flat = len(self.ids), self._host.numpy()
        ids, is_finite = flat[:num].tolist(), flat[num : 2 * num].tolist()
        logprobs = self._logprobs(ids, flat[2 * num :])
        return [
            Sampled(token_id, logprobs.get(row)) if is_good else None
            for row, (token_id, is_good) in enumerate(zip(ids, is_finite, strict=True))
        ]

    def _logprobs(self, ids: list[int], flat: np.ndarray) -> dict[int, TokenLogprob]:
        num = len(self._num_logprobs)
        if not num:
            return {}
        most = max(self._num_logprobs.values())
        stop = num * (1 + most)
        chosen = flat[:num].view(np.float32).tolist()
        values = flat[num:stop].view(np.float32).reshape(num, most).tolist()
        tops = flat[stop:].reshape(num, most).tolist()
        found: dict[int, TokenLogprob] = {}
        for place, (row, count) in enumerate(self._num_logprobs.items()):
            top = tuple(zip(tops[place][:count], values[place][:count], strict=True))
            found[row] = TokenLogprob(ids[row], chosen[place], top)
        return found
