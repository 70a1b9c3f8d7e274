"""OFT: the input turned block by block before the weight, W (R x) + b.

Formats and rules: huggingface/peft:src/peft/tuners/oft/{config,model,layer}.py, version 0.21.2.
arXiv 2306.07280; the Cayley-Neumann series: arXiv 2506.19847.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, without_low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import Module, PeftFamily, TensorForm
from polyadapt.ops import cells
from polyadapt.types import BaseSpec, SiteSpec

if TYPE_CHECKING:
    import torch

_MAX_TERMS = 64  # of the series; PEFT's default is 5, and each costs g^3 multiply-adds a block
_SERIES_CHANGED = (0, 18)  # PEFT's version in which the Cayley-Neumann series got its last term


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    block_size: int  # 0: num_blocks is given instead
    num_blocks: int
    is_shared: bool  # one block, used for all
    num_terms: int  # of the Neumann series; 0: the exact Cayley transform
    radius: float | None  # COFT: largest Frobenius norm of all blocks together

    def group(self, site: SiteSpec) -> int:
        """Columns in one block of what is turned: the input, of an embedding the output."""
        width = site.out_features if site.kind == "embedding" else site.in_features
        if self.block_size:
            return _nearest_divisor(width, self.block_size)
        return width // _nearest_divisor(width, self.num_blocks)


class Oft(PeftFamily[_Settings]):
    """The family `oft`."""

    name = "oft"
    peft_types = frozenset({"OFT"})
    summary = "blocks of the input times small matrices before W; an embedding's rows as dense ones"
    scaling = "no"
    overrides = cells.TRANSFORM | cells.DENSE
    forms: ClassVar = {
        "angles": TensorForm("oft_R.weight", ("blocks", "angles")),
        "embedding_angles": TensorForm(
            "oft_embedding_R.weight", ("blocks", "angles"), ("embedding",)
        ),
    }
    read_keys = frozenset(
        {
            *("r", "oft_block_size", "coft", "eps", "block_share", "use_cayley_neumann"),
            *("num_cayley_neumann_terms", "fan_in_fan_out"),
        }
    )
    training_keys = frozenset({"module_dropout", "init_weights"})
    foreign: ClassVar = {
        "oft_r": "it is of PEFT before 0.14, whose matrices meant something else; train it again"
    }

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings."""
        reader.flag("fan_in_fan_out")
        if "oft_block_size" not in reader.config:
            reader.refuse(
                "oft_block_size",
                "oft_block_size is missing, so the adapter is of PEFT before 0.14, whose matrices "
                "meant something else; train it again",
            )
        block_size = reader.whole("oft_block_size", 32)
        num_blocks = reader.whole("r", 0)
        if (block_size == 0) == (num_blocks == 0):
            reader.invalid(
                "r", num_blocks, f"0 or oft_block_size 0, not {block_size}, and not both"
            )
        num_terms = 0
        if reader.flag("use_cayley_neumann", True):
            num_terms = reader.whole("num_cayley_neumann_terms", 5, least=1)
            if num_terms > _MAX_TERMS:
                reader.invalid("num_cayley_neumann_terms", num_terms, f"at most {_MAX_TERMS}")
            _note_version(reader)
        return _Settings(
            block_size=block_size,
            num_blocks=num_blocks or 1,
            is_shared=reader.flag("block_share"),
            num_terms=num_terms,
            radius=reader.number("eps", 6e-5) if reader.flag("coft") else None,
        )

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape: the angles are what stands above a skew-symmetric diagonal."""
        group = settings.group(site)
        width = site.out_features if site.kind == "embedding" else site.in_features
        return 1 if settings.is_shared else width // group, group * (group - 1) // 2

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        if module.site.kind == "embedding":
            return 0, cells.DENSE
        return 0, cells.TRANSFORM | settings.group(module.site) << cells.GROUP_SHIFT

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
        """See PeftFamily.delta. An embedding's rows are turned as they come out."""
        import torch

        site, group = module.site, settings.group(module.site)
        is_table = site.kind == "embedding"
        angles = tensors["embedding_angles" if is_table else "angles"]
        skew = _skew(angles, group)
        if settings.radius is not None:
            skew = _inside(skew, settings.radius)
        turns = _series(skew, settings.num_terms) if settings.num_terms else _cayley(skew)
        width = site.out_features if is_table else site.in_features
        turns = turns.expand(width // group, group, group).contiguous()
        if not is_table:
            return without_low_rank(site, transform=turns)
        rows = base.weight()  # [vocabulary, width]
        blocks = rows.reshape(rows.shape[0], -1, group)
        turned = torch.einsum("vng,ngh->vnh", blocks, turns).reshape(rows.shape)
        return without_low_rank(site, dense=turned - rows)


def _nearest_divisor(width: int, given: int) -> int:
    """PEFT's adjust_oft_parameters: the divisor of `width` next to `given`, the lower of two."""
    if given >= width:
        return width
    higher = next(d for d in range(given, width + 1) if width % d == 0)
    lower = next(d for d in range(given, 0, -1) if width % d == 0)
    return lower if given - lower <= higher - given else higher


def _note_version(reader: ConfigReader) -> None:
    given = reader.config.get("peft_version")
    numbers = given.split(".")[:2] if isinstance(given, str) else []
    is_known = all(number.isdecimal() for number in numbers)
    if is_known and tuple(map(int, numbers)) >= _SERIES_CHANGED:
        return
    reader.notes.append(
        "use_cayley_neumann of PEFT before 0.18 ended its series otherwise; served as PEFT 0.18 "
        "and later read it"
    )


# --------------------------------------------------------------------------- the numbers
def _skew(angles: torch.Tensor, group: int) -> torch.Tensor:
    """Skew-symmetric matrices [blocks, g, g] of what stands above their diagonals, row by row."""
    import torch

    rows, columns = torch.triu_indices(group, group, 1)
    upper = torch.zeros(angles.shape[0], group, group)
    upper[:, rows, columns] = angles
    return upper - upper.transpose(1, 2)


def _inside(skew: torch.Tensor, radius: float) -> torch.Tensor:
    """COFT: each block pulled back onto a ball of radius / sqrt(blocks) around zero."""
    import torch

    limit = radius / skew.shape[0] ** 0.5
    norm = torch.linalg.norm(skew, dim=(1, 2), keepdim=True)
    return torch.where(norm <= limit, skew, skew * (limit / norm.clamp(min=1e-38)))


def _series(skew: torch.Tensor, num_terms: int) -> torch.Tensor:
    """(I + Q)(I - Q)^-1 as PEFT cuts it off: I + 2 Q + ... + 2 Q^(n-2) + Q^(n-1), but I + 2 Q for
    two terms, and what four terms give for three.
    """
    import torch

    result = torch.eye(skew.shape[-1]).repeat(skew.shape[0], 1, 1)
    if num_terms > 1:
        result += 2.0 * skew
    if num_terms > 2:
        power = skew
        for _ in range(max(num_terms, 4) - 3):
            power = power @ skew
            result += 2.0 * power
        result += power @ skew
    return result


def _cayley(skew: torch.Tensor) -> torch.Tensor:
    """(I - Q)(I + Q)^-1: the other direction than that of the series, as in PEFT."""
    import torch

    eye = torch.eye(skew.shape[-1]).expand_as(skew)
    turns: torch.Tensor = torch.linalg.solve(eye + skew, eye - skew, left=False)
    return turns
