"""What a family makes of a checkpoint: a plan (torch-free), then one LowRank per site.

Knows no family, no file format and no device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from polyadapt.types import BaseSpec
from polyadapt_store.checkpoint import Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class TensorRead:
    """One tensor that `read` will take: its key, the site it serves and the part it plays there."""

    key: str
    site_id: int
    role: str


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """What an adapter is, known from its config and tensor headers alone."""

    family: str
    rank: int  # the largest of any site
    target_modules: tuple[str, ...]  # distinct last path components, sorted
    num_elements: int  # device elements: per site r*in + r*out (+ out with a bias)
    reads: tuple[TensorRead, ...]
    notes: tuple[str, ...] = ()  # config keys that were read and have no effect when serving
    is_scalable: bool = True  # False: this checkpoint replaces something that no scale can multiply


@dataclass(frozen=True, slots=True)
class LowRank:
    """One module of one adapter: y += B (A x) + bias, every constant scale already inside B and
    bias.

    Shapes: a [rank, in], b [out, rank], bias [out] or None; all float32 and contiguous, on the
    host. For an embedding `in` is the vocabulary and A x is the column of the token. rank may be
    0.
    """

    a: torch.Tensor
    b: torch.Tensor
    bias: torch.Tensor | None = None


class BaseWeights(Protocol):
    """Row-by-row access to the resident base, for families whose checkpoints refer to it."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision that the base is served in."""

    def weight(self, site_id: int) -> torch.Tensor:
        """The site's weight [out, in] (embedding: [vocabulary, width]) as a view or copy, any
        dtype.
        """

    def bias(self, site_id: int) -> torch.Tensor | None:
        """The site's base bias [out], or None."""


class Family(Protocol):
    """One kind of adapter. A new one is one file beside the others and one test."""

    name: str
    is_scalable: bool  # whether a request may scale it by anything but 0 and 1

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether this family reads checkpoints with this adapter_config.json."""

    def plan(
        self, config: Mapping[str, Any], header: Mapping[str, TensorInfo], base: BaseSpec
    ) -> AdapterPlan:
        """Check the config and every tensor's name, shape and dtype; raises AdapterRejected with
        all problems.
        """

    def read(
        self,
        config: Mapping[str, Any],
        checkpoint: Checkpoint,
        base: BaseSpec,
        weights: BaseWeights,
    ) -> dict[int, LowRank]:
        """Return site id -> LowRank; takes every tensor of the checkpoint; raises
        AdapterRejected.
        """
