"""BOFT: the input turned by a product of butterfly factors, then one scale per output, bias apart.

Formats and rules: huggingface/peft:src/peft/tuners/boft/{config,layer}.py, version 0.21.2. arXiv
2311.06243. PEFT trains one factor alone where its CUDA extension is missing, whatever the config
says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, without_low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import MisfitError, Module, PeftFamily, TensorForm
from polyadapt.ops import cells
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    block_size: int  # 0: num_blocks is given instead
    num_blocks: int
    num_factors: int

    def group(self, site: SiteSpec) -> int:
        """Columns in one block."""
        return self.block_size or max(site.in_features // self.num_blocks, 1)


class Boft(PeftFamily[_Settings]):
    """The family `boft`."""

    name = "boft"
    peft_types = frozenset({"BOFT"})
    summary = (
        "one factor: blocks of the input times small matrices, one scale per output; more factors "
        "hold a dense matrix per module"
    )
    scaling = "no"
    overrides = cells.TRANSFORM | cells.DENSE
    forms: ClassVar = {
        "turns": TensorForm("boft_R", ("factors", "blocks", "group", "group")),
        "scale": TensorForm("boft_s", ("out", 1)),
    }
    read_keys = frozenset(
        {"boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "fan_in_fan_out"}
    )
    training_keys = frozenset({"boft_dropout", "init_weights"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings."""
        reader.flag("fan_in_fan_out")
        block_size = reader.whole("boft_block_size", 4)
        num_blocks = reader.whole("boft_block_num", 0)
        if (block_size == 0) == (num_blocks == 0):
            reader.invalid(
                "boft_block_num", num_blocks,
                f"0 or boft_block_size 0, not {block_size}, and not both",
            )  # fmt: skip
        return _Settings(
            block_size, num_blocks or 1, reader.whole("boft_n_butterfly_factor", 1, least=1)
        )

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        if role == "scale":
            return self.forms[role].shape
        group = settings.group(site)
        return "factors", site.in_features // group, group, group

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        site, group, num_factors = module.site, settings.group(module.site), module.sizes["factors"]
        if site.in_features % group:
            raise MisfitError(f"{site.in_features} inputs do not fall into blocks of {group}")
        if num_factors not in (1, settings.num_factors):
            raise MisfitError(
                f"boft_R holds {num_factors} factors, boft_n_butterfly_factor says "
                f"{settings.num_factors}"
            )
        num_blocks = site.in_features // group
        if num_factors > 1 and (group % 2 or num_blocks % (1 << (num_factors - 1))):
            raise MisfitError(
                f"{num_factors} factors need an even block size and a multiple of "
                f"{1 << (num_factors - 1)} blocks, not {num_blocks} of {group}"
            )
        if num_factors > 1:
            return 0, cells.DENSE
        parts = cells.TRANSFORM | cells.OUT_SCALE | (cells.BIAS if site.has_bias else 0)
        return 0, parts | group << cells.GROUP_SHIFT

    def multiplies(self, settings: _Settings) -> bool:
        """See PeftFamily.multiplies."""
        return True

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta: y = s * (W R^T x) + b, x R being a row of inputs turned."""
        site, scale = module.site, tensors["scale"].flatten()
        turns = _cayley(tensors["turns"])  # [factors, blocks, g, g]
        if turns.shape[0] > 1:
            weight = base.weight()
            dense = scale[:, None] * (weight @ _product(turns).t()) - weight
            return without_low_rank(site, dense=dense.contiguous())
        bias = base.bias()
        return without_low_rank(
            site, transform=turns[0].contiguous(), out_scale=scale - 1.0,
            bias=None if bias is None else -(scale - 1.0) * bias,
        )  # fmt: skip


def _cayley(given: torch.Tensor) -> torch.Tensor:
    """(I - S)(I + S)^-1 of the skew-symmetric half of the stored matrices."""
    import torch

    skew = 0.5 * (given - given.transpose(-1, -2))
    eye = torch.eye(skew.shape[-1]).expand_as(skew)
    turns: torch.Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
    return turns


def _product(turns: torch.Tensor) -> torch.Tensor:
    """The butterfly's matrix [in, in]: factor i is block-diagonal between P_i and P_i^T, and stands
    left of factor i - 1.
    """
    import torch

    num_factors, num_blocks, group, _ = turns.shape
    product = torch.eye(num_blocks * group)
    for factor in range(num_factors):
        order = _butterfly(num_blocks, group, factor)
        blocks: torch.Tensor = torch.block_diag(*turns[factor])  # type: ignore[no-untyped-call]
        product = blocks[order][:, order] @ product
    return product


def _butterfly(num_blocks: int, group: int, factor: int) -> torch.Tensor:
    """The order in which factor i takes its inputs: of every 2^i blocks first the half blocks with
    even numbers, then those with odd ones.
    """
    import torch

    halves = torch.arange(num_blocks * group).reshape(-1, 2 << factor, group // 2)
    return torch.cat([halves[:, ::2], halves[:, 1::2]], 1).flatten()
