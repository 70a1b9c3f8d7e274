"""B-LoRA: plain LoRA in two blocks of a model, one of which learns content and the other one style.

y = W x + B A x without alpha. The two halves lie in different modules, so a request takes the
content of one adapter and the style of another by naming both; `polyadapt convert` splits a file
into halves.

The original scales its tensors one by one, A and B both, so that its content_alpha and style_alpha
act squared: `scale_mode` says whether a request's scale does the same (`blora_squared`) or means
what it means for every other adapter (`linear`).

arXiv 2403.14572; yardenfren1996/B-LoRA:blora_utils.py (BLOCKS, scale_lora). Tensors are named as
diffusers 0.25 names them, `<module>.lora.down.weight` and `<module>.lora.up.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from polyadapt.adapters.adapter import Delta
from polyadapt.adapters.deltas import SiteBase, low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import Module, PeftFamily, TensorForm
from polyadapt.adapters.peft_modules import beginnings
from polyadapt.errors import Problem
from polyadapt.types import BaseSpec
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch

HALVES = ("content", "style")
LINEAR, SQUARED = "linear", "blora_squared"


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says."""

    rank: int | None  # None: not said, every module has its own
    is_squared: bool
    halves: Mapping[str, frozenset[str]]  # content or style -> paths of the blocks that hold it

    def of(self, path: str) -> list[str]:
        """The halves that the module at `path` lies in."""
        return [
            half for half, blocks in self.halves.items() if not blocks.isdisjoint(beginnings(path))
        ]


class BLora(PeftFamily[_Settings]):
    """The family `b_lora`."""

    name = "b_lora"
    peft_types = frozenset({"B_LORA"})
    summary = "content and style in modules of their own, no alpha; a scale may act squared"
    forms: ClassVar = {
        "a": TensorForm("lora.down.weight", ("rank", "in")),
        "b": TensorForm("lora.up.weight", ("out", "rank")),
    }
    read_keys = frozenset({"r", "halves", "scale_mode"})
    refused_keys: ClassVar = {"lora_alpha": "B-LoRA has none, B A is added as it is"}

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. scale_mode has no default: the original's is the unusual one."""
        mode = reader.choice("scale_mode", (LINEAR, SQUARED), "")
        rank = None if reader.config.get("r") is None else reader.rank("r")
        return _Settings(rank, mode == SQUARED, _read_halves(reader))

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        return module.sizes["rank"], 0

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta."""
        return low_rank(tensors["a"], tensors["b"])

    def traits(self, settings: _Settings) -> dict[str, Any]:
        """See PeftFamily.traits."""
        return {"is_scale_squared": settings.is_squared}

    def check(
        self,
        modules: Mapping[int, Module],
        settings: _Settings,
        base: BaseSpec,
        problems: list[Problem],
        notes: list[str],
    ) -> None:
        """See PeftFamily.check: every module lies in exactly one half, and no half is empty."""
        if settings.is_squared:
            notes.append("a request's scale acts squared, by scale_mode")
        found: set[str] = set()
        for _, module in sorted(modules.items()):
            path, halves = module.site.path, settings.of(module.site.path)
            rank = module.sizes.get("rank")
            if settings.rank is not None and rank not in (None, settings.rank):
                problems.append(
                    Problem(
                        "rank_mismatch",
                        f"{path} has rank {rank} in the checkpoint and r is {settings.rank}",
                        path,
                    )
                )
            if module.has_own and len(halves) != 1:
                where = "both halves" if halves else f"none of {', '.join(settings.halves)}"
                problems.append(
                    Problem("config_mismatch", f"{path} lies in {where} by `halves`", "halves")
                )
            found.update(halves if module.has_own else ())
        for half in [half for half in settings.halves if modules and half not in found]:
            problems.append(
                Problem(
                    "config_mismatch",
                    f"halves.{half} is {shown(sorted(settings.halves[half]))}, and the checkpoint "
                    "holds no tensor of it",
                    "halves",
                )
            )


def _read_halves(reader: ConfigReader) -> dict[str, frozenset[str]]:
    given: Any = reader.config.get("halves")
    is_table = isinstance(given, dict) and bool(given) and given.keys() <= set(HALVES)
    if not is_table or not all(map(_are_paths, given.values())):
        reader.invalid("halves", given, "an object of content, style or both, each a list of paths")
        return {}
    return {half: frozenset(blocks) for half, blocks in given.items()}


def _are_paths(blocks: Any) -> bool:
    is_list = isinstance(blocks, list) and bool(blocks)
    return is_list and all(isinstance(block, str) and block for block in blocks)
