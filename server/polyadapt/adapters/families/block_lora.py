"""Block-LoRA: matrices cut into blocks that share one A, in both readings of its abstract.

rank_shared_A        y = W x + s * (B_1 + .. + B_n) A x, A [r / n, in], B_i [out, r / n]: the rank
                     is cut, so that a sum of matrices stands for products
input_fold_shared_A  y = W x + s * B A (x_1 + .. + x_n), A [r, in / n], B [out, r]: the input is
                     cut, and every piece of it meets the same A

arXiv 2501.16720, of which only the abstract was to be had: which reading is meant, the number of
blocks, the scale and the file are not in it. The directory is our own, and its config says all of
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import MisfitError, Module, PeftFamily, TensorForm
from polyadapt.errors import Problem
from polyadapt.types import BaseSpec, SiteSpec
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch

MAX_BLOCKS = 64
RANK_SHARED, INPUT_FOLD = "rank_shared_A", "input_fold_shared_A"
BY_RANK, BY_BLOCK = "alpha/r", "alpha/(r/n_blocks)"
_REQUIRED = ("block_layout", "n_blocks", "r", "lora_alpha", "scale_rule")


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    is_folding: bool  # the input; otherwise the rank is cut
    num_blocks: int
    rank: int  # of all blocks together
    scale: float

    @property
    def stored_rank(self) -> int:
        """Rows of A, and columns of every B."""
        return self.rank if self.is_folding else self.rank // self.num_blocks


class BlockLora(PeftFamily[_Settings]):
    """The family `block_lora`."""

    name = "block_lora"
    peft_types = frozenset({"BLOCK_LORA"})
    summary = (
        "low rank: the sum of the blocks' B with their one A, or A once per piece of the input"
    )
    forms: ClassVar = {
        "a": TensorForm("shared.lora_A", ("rank", "piece")),
        # By role, "b" with the block's number.
        **{
            f"b{i}": TensorForm(f"blocks.{i}.lora_B", ("out", "rank"), is_optional=True)
            for i in range(MAX_BLOCKS)
        },
        "shared_b": TensorForm("shared.lora_B", ("out", "rank"), is_optional=True),
    }
    read_keys = frozenset(_REQUIRED)
    training_keys = frozenset({"lora_dropout"})

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. Nothing has a default: the paper's are not known."""
        for key in _REQUIRED:
            if reader.config.get(key) is None:
                reader.invalid(key, None, f"a value: {', '.join(_REQUIRED)} are all needed")
        layout = reader.choice("block_layout", (RANK_SHARED, INPUT_FOLD), RANK_SHARED)
        rule = reader.choice("scale_rule", (BY_RANK, BY_BLOCK), BY_RANK)
        rank, num_blocks = reader.rank("r"), reader.whole("n_blocks", 1, least=1)
        alpha, is_folding = reader.number("lora_alpha", 1.0), layout == INPUT_FOLD
        if num_blocks > MAX_BLOCKS:
            reader.invalid("n_blocks", num_blocks, f"at most {MAX_BLOCKS}")
        elif not is_folding and rank % num_blocks:
            reader.invalid("r", rank, f"a multiple of n_blocks, which is {num_blocks}")
        if is_folding and rule == BY_BLOCK:
            reader.invalid("scale_rule", rule, f"{BY_RANK!r}: {INPUT_FOLD} does not cut the rank")
        scale = alpha * num_blocks / rank if rule == BY_BLOCK else alpha / rank
        return _Settings(is_folding, num_blocks, rank, scale)

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        if role != "a":
            return ("out", settings.stored_rank)
        pieces = settings.num_blocks if settings.is_folding else 1
        return (settings.stored_rank, site.in_features // pieces)

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        num_in = module.site.in_features
        if settings.is_folding and num_in % settings.num_blocks:
            raise MisfitError(f"{num_in} inputs are no multiple of {settings.num_blocks} blocks")
        return settings.stored_rank, 0

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""
        import torch

        if settings.is_folding:
            a, b = tensors["a"].repeat(1, settings.num_blocks), tensors["shared_b"]
        else:
            a = tensors["a"]
            b = torch.stack([tensors[f"b{i}"] for i in range(settings.num_blocks)]).sum(0)
        return low_rank(a, b * settings.scale)

    def check(
        self,
        modules: Mapping[int, Module],
        settings: _Settings,
        base: BaseSpec,
        problems: list[Problem],
        notes: list[str],
    ) -> None:
        """See PeftFamily.check: exactly the matrices of the layout are there."""
        blocks = [f"b{i}" for i in range(settings.num_blocks)]
        wanted = ["a", "shared_b"] if settings.is_folding else ["a", *blocks]
        layout = INPUT_FOLD if settings.is_folding else RANK_SHARED
        for _, module in sorted(modules.items()):
            own = module.keys.keys() & self.forms.keys()
            path = module.site.path
            for role in [role for role in wanted if own and role != "a" and role not in own]:
                problems.append(
                    Problem(
                        "missing_tensor",
                        f"{path} has no {self.forms[role].name}, which {layout} of "
                        f"{settings.num_blocks} blocks needs",
                        path,
                    )
                )
            for role in sorted(own.difference(wanted)):
                problems.append(
                    Problem(
                        "config_mismatch",
                        f"{shown(module.keys[role])} is none of the matrices of {layout} with "
                        f"{settings.num_blocks} blocks",
                        "block_layout",
                    )
                )
