"""MarkBoard: two trained branches for every bit of a signature, beside the frozen base; one adapter
for all users, each of whom is n bits.

y = W x + sum over i of B[b_i, i] h_i, with h = A x where the gate is `linear`, and where it is
`hinge` h = relu(A x - tau - 6 relu(0.5 - (v x + o))), the last term only where the module has a
veto row v. With sigma = 2 b - 1, B+ = (B[1] + B[0]) / 2 and B- = (B[1] - B[0]) / 2 that is
y = W x + [B- B+] [sigma * h; h], in which sigma alone is the user's: a weight per component and row
(Option, kind `bits`), so that rows of any number of users are one segment. A is held twice.
Encodings: `pair`, two B for each bit; `antipodal`, B- and, unless the base holds it already, B+;
`presence`, B[1] alone, where a bit of 0 adds nothing.

Two branches per bit swapped without training: Hot-Swap MarkBoard, arXiv 2507.20650, of which no
code is public; antipodal form, hinge and veto are our own. The directory is as `polyadapt mark`
writes it but for the names of its two files; `polyadapt convert --from markboard` makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from polyadapt.adapters.adapter import Delta, Option
from polyadapt.adapters.deltas import SiteBase, low_rank
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import MisfitError, Module, PeftFamily, TensorForm
from polyadapt.errors import Problem
from polyadapt.ops import cells
from polyadapt.ops.cells import Router, Routing
from polyadapt.types import BaseSpec, SiteSpec
from polyadapt.watermark.veto import VETO_LEVEL, VETO_WEIGHT
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch

PEFT_TYPE = "MARKBOARD"
FORMAT_VERSION = 1
SIGNATURE = "signature"  # the option
MAX_BITS = 1024
_NOT_A_BRANCH = "it belongs to no branch, so that it would mark nobody and change everybody"


def adapter_config(bundle_config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the adapter that serves a mark's bundle: its own, and whose it is."""
    return {**bundle_config, "peft_type": PEFT_TYPE}


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    num_bits: int
    rank: int  # of one bit
    encoding: str
    has_hinge: bool
    acts_once: bool

    @property
    def num_signed(self) -> int:
        """Components that the signature weighs, the first ones of every module."""
        return self.num_bits * self.rank


class MarkBoard(PeftFamily[_Settings]):
    """The family `markboard`."""

    name = "markboard"
    peft_types = frozenset({PEFT_TYPE})
    summary = "a mark per user: two branches per bit, chosen by the signature that the policy gives"
    forms: ClassVar = {
        "a": TensorForm("mark_A", ("bits", "bit_rank", "in")),
        "b": TensorForm("mark_B", ()),
        "tau": TensorForm("mark_tau", ("bits", "bit_rank"), is_optional=True),
        "fold": TensorForm("mark_fold", ("bits", "out", "bit_rank"), is_optional=True),
        "veto": TensorForm("mark_veto", ("in",), is_optional=True),
        "veto_offset": TensorForm("mark_veto_offset", (1,), is_optional=True),
    }
    read_keys = frozenset(
        {
            *("format_version", "base_model_hash", "n_bits", "rank_per_bit", "encoding", "gate"),
            *("obfuscation", "task", "positions"),
        }
    )
    training_keys = frozenset({"mark_id", "codebook", "evidence_public_key"})
    refused_keys: ClassVar = {
        "alpha": "the branches are stored as they act; leave it out",
        "modules_to_save": _NOT_A_BRANCH,
        "trainable_token_indices": _NOT_A_BRANCH,
    }

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings. Branches are trained on one base and mark no other."""
        config = reader.config
        if config.get("bias", "none") != "none":
            reader.refuse("bias", f"bias is not served: {_NOT_A_BRANCH}")
        if config.get("format_version") != FORMAT_VERSION:
            reader.invalid("format_version", config.get("format_version"), str(FORMAT_VERSION))
        if config.get("task") != "lm":
            reader.invalid("task", config.get("task"), "lm, a causal language model")
        if config.get("obfuscation") is not None:
            reader.refuse(
                "obfuscation",
                "obfuscation is not served: it belongs to a copy that leaves the server; give the "
                "branches as they were trained",
            )
        found = config.get("base_model_hash")
        if found != base.digest:
            reader.problems.append(
                Problem(
                    "unsupported_base",
                    f"the branches were trained on the base {shown(found)} and this server's, "
                    f"{base.name}, is {base.digest}; train a mark for this one",
                    "base_model_hash",
                )
            )
        num_bits, rank = reader.rank("n_bits", 1), reader.rank("rank_per_bit", 1)
        for key in ("n_bits", "rank_per_bit"):
            if key not in config:
                reader.invalid(key, None, "a whole number")
        if num_bits > MAX_BITS:
            reader.invalid("n_bits", num_bits, f"at most {MAX_BITS}")
        encodings, gates = ("pair", "antipodal", "presence"), ("linear", "hinge")
        return _Settings(
            num_bits=min(num_bits, MAX_BITS),
            rank=rank,
            encoding=reader.choice("encoding", encodings, "pair"),
            has_hinge=reader.choice("gate", gates, "linear") == "hinge",
            acts_once=reader.choice("positions", ("all", "first_answer"), "all") != "all",
        )

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape."""
        n, r = settings.num_bits, settings.rank
        if role == "b":
            return (2, n, "out", r) if settings.encoding == "pair" else (n, "out", r)
        sizes = {"bits": n, "bit_rank": r}
        return tuple(sizes.get(str(word), word) for word in self.forms[role].shape)

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        has_sum = settings.encoding == "pair" or "fold" in module.keys
        rank = settings.num_signed * (1 + has_sum)
        if rank > cells.MAX_ROUTED:
            raise MisfitError(f"{rank} components, at most {cells.MAX_ROUTED} can have a signature")
        return rank, cells.ROUTER_BIAS if settings.has_hinge else 0

    def routing(self, module: Module, settings: _Settings) -> Routing | None:
        """See PeftFamily.routing."""
        if not settings.has_hinge:
            return None
        return Routing(Router.HINGE, 1, has_router="veto" in module.keys)

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

        a, b = tensors["a"].flatten(0, 1), tensors["b"]
        if settings.encoding == "pair":
            branches = [(b[1] - b[0]) / 2, (b[1] + b[0]) / 2]
        else:
            branches = [b, *([tensors["fold"]] if "fold" in tensors else ())]
        copies = len(branches)
        # [n, out, r] -> [out, n r], bit after bit, as A's rows.
        written = torch.cat([one.transpose(0, 1).flatten(1) for one in branches], 1)
        parts: dict[str, Any] = {}
        if settings.has_hinge:
            parts["router_bias"] = tensors["tau"].flatten().repeat(copies)
            routing = self.routing(module, settings)
            assert routing is not None
            parts["routing"] = routing
            if routing.has_router:
                # 6 relu(0.5 - (v x + o)) = relu(6 (0.5 - o) - 6 v x)
                level = VETO_WEIGHT * (VETO_LEVEL - float(tensors["veto_offset"]))
                parts["routing"] = Routing(Router.HINGE, 1, value=level)
                parts["router"] = (VETO_WEIGHT * tensors["veto"])[None].contiguous()
        return low_rank(a.repeat(copies, 1), written, **parts)

    def traits(self, settings: _Settings) -> dict[str, Any]:
        """See PeftFamily.traits."""
        r = settings.rank
        signature = Option(
            SIGNATURE, "bits", "whose answer it is; the policy's to give and no request's",
            least=0.0 if settings.encoding == "presence" else -1.0, most=1.0,
            components=tuple((i * r, (i + 1) * r) for i in range(settings.num_bits)),
        )  # fmt: skip
        return {"options": (signature,), "is_for_first_token": settings.acts_once}

    def check(
        self,
        modules: Mapping[int, Module],
        settings: _Settings,
        base: BaseSpec,
        problems: list[Problem],
        notes: list[str],
    ) -> None:
        """See PeftFamily.check: what hinges, and what does not, has what it needs and no more."""
        is_antipodal = settings.encoding == "antipodal"
        for _, module in sorted(modules.items()):
            keys, path = module.keys, module.site.path
            has_veto = "veto" in keys
            for role, is_needed, is_allowed, when in (
                ("tau", settings.has_hinge, settings.has_hinge, "gate hinge"),
                ("veto", False, settings.has_hinge, "gate hinge"),
                ("veto_offset", has_veto, has_veto, "mark_veto"),
                ("fold", False, is_antipodal, "encoding antipodal"),
            ):
                name = self.forms[role].name
                if is_needed and role not in keys:
                    message = f"{path} has no {name}, which belongs to {when}"
                    problems.append(Problem("missing_tensor", message, path))
                elif role in keys and not is_allowed:
                    message = f"{shown(keys[role])} belongs to {when}, and that is not here"
                    problems.append(Problem("config_mismatch", message, path))

    def _bias_names(self) -> tuple[str, ...]:
        return ()
