"""Which experts a prompt's tokens are sent to, module by module, as the engine serves them."""

from __future__ import annotations

import asyncio
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from polyadapt.adapters.validator import validate
from polyadapt.config import EngineConfig
from polyadapt.engine.usage import COLLAPSE_SHARE
from polyadapt.errors import InvalidRequest
from polyadapt.offline.served import ServedModel
from polyadapt_store.limits import StoreLimits


@dataclass(frozen=True, slots=True)
class ModuleRouting:
    """One module's weights summed over the prompt's tokens, as parts of their sum."""

    path: str
    shares: tuple[float, ...]  # of the experts; not negative, the sum is 1, or all are 0

    @property
    def effective_experts(self) -> float:
        """exp of the shares' entropy: from 1, one has all, to their number, all are alike."""
        return math.exp(-sum(share * math.log(share) for share in self.shares if share > 0))

    @property
    def is_collapsed(self) -> bool:
        """Whether one of several experts has nearly all."""
        return len(self.shares) > 1 and max(self.shares) > COLLAPSE_SHARE


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """What one adapter did with one prompt."""

    num_tokens: int
    modules: tuple[ModuleRouting, ...]

    @property
    def warning(self) -> str | None:
        """Said where routing has collapsed; None otherwise."""
        collapsed = [module.path for module in self.modules if module.is_collapsed]
        if not collapsed:
            return None
        return (
            f"in {len(collapsed)} of {len(self.modules)} modules one expert has more than "
            f"{COLLAPSE_SHARE:.0%} of the weight, such as in {collapsed[0]}: for this prompt the "
            "others are hardly used"
        )


def trace_routing(
    directory: Path, model_dir: Path, config: EngineConfig, token_ids: Sequence[int]
) -> RoutingReport:
    """Run the prompt once and return what was chosen; raises AdapterRejected for an adapter that is
    refused, InvalidRequest for one that routes nothing, StartupError for a model that cannot be
    served.
    """
    with tempfile.TemporaryDirectory(prefix="polyadapt-routing-") as scratch:
        return asyncio.run(_trace(directory, model_dir, config, token_ids, Path(scratch)))


async def _trace(
    directory: Path,
    model_dir: Path,
    config: EngineConfig,
    token_ids: Sequence[int],
    scratch: Path,
) -> RoutingReport:
    served = ServedModel(config, model_dir, scratch / "blobs")
    await served.start()
    try:
        sums: dict[int, torch.Tensor] = {}

        def note(site_id: int, slot: int, weights: torch.Tensor) -> None:
            # A weight may be negative, as X-LoRA's without a softmax: its size is what counts.
            total = weights.abs().double().sum(0)
            sums[site_id] = sums[site_id] + total if site_id in sums else total

        validate(directory, served.engine.info.base, StoreLimits())
        served.engine.runner.tokens.observer = note
        await served.score(served.put(directory), None, list(token_ids), 1)
        base = served.engine.info.base
    finally:
        await served.stop()
    if not sums:
        raise InvalidRequest(
            f"{directory} routes nothing: its components weigh the same for every token"
        )
    modules = tuple(
        ModuleRouting(base.sites[site_id].path, _shares(total))
        for site_id, total in sorted(sums.items())
    )
    return RoutingReport(len(token_ids), modules)


def _shares(total: torch.Tensor) -> tuple[float, ...]:
    whole = float(total.sum())
    return tuple((total / whole).tolist()) if whole > 0 else tuple([0.0] * len(total))
