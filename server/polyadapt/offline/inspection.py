"""What an adapter is, what it will cost and whether it is served as it should be, before uploading.

Without a model: what its files say by themselves. With one: all that an upload is judged by, the
cost, and the adapter served by the engine beside the same adapter written into the weights.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from polyadapt.adapters.adapter import AdapterPlan, Delta, Family, Traits
from polyadapt.adapters.registry import open_adapter
from polyadapt.adapters.validator import validate
from polyadapt.config import EngineConfig
from polyadapt.errors import AdapterRejected, PolyadaptError, Problem
from polyadapt.ops import cells
from polyadapt.types import BaseSpec, SiteSpec, TokenLogprob
from polyadapt_store.checkpoint import Checkpoint
from polyadapt_store.limits import StoreLimits
from polyadapt_store.manifest import PEFT_FORM, WEIGHTS_NAME, weight_files

if TYPE_CHECKING:
    import torch

# The largest difference of a log-probability that is rounding: a part of the largest logit. Two
# orders below what a forgotten scale or bias does, one above float32 through thirty layers.
TOLERANCE = 1e-4

_NUM_TOKENS = 24
_NUM_TOP = 64  # of each position's likeliest tokens that are compared
_PICKLES = (".bin", ".pt", ".pth")
# Without a base, these say only that there is none.
_NEEDS_BASE = frozenset(
    {
        *("unknown_module", "no_tensors", "missing_tensor", "not_targeted", "shape_mismatch"),
        *("rank_mismatch", "config_mismatch", "unsupported_base"),
    }
)
_NO_BASE = BaseSpec("", "", "", 1 << 62, 1 << 62, False, "", "", ())
_OVERRIDES = {
    cells.TRANSFORM: "transform",
    cells.SWAP: "swap",
    cells.DENSE: "dense",
    cells.WEIGHT: "norm weight",
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What serving takes. Multiply-adds are per token, in the base's linears and embeddings."""

    num_elements: int  # on the device
    num_base_elements: int
    num_multiply_adds: int
    num_base_multiply_adds: int
    slow_parts: Mapping[str, int]  # computed adapter by adapter and not for the batch -> modules

    @property
    def device_share(self) -> float:
        """Of the base's own memory, both in one dtype."""
        return self.num_elements / self.num_base_elements

    @property
    def compute_share(self) -> float:
        """Of the base's own multiply-adds."""
        return self.num_multiply_adds / self.num_base_multiply_adds


@dataclass(frozen=True, slots=True)
class Parity:
    """Log-probabilities as the engine serves them in float32, beside the edited weights' own."""

    largest_difference: float
    tolerance: float
    largest_effect: float  # of the adapter, beside the base
    num_tokens: int
    ranks: tuple[int, ...] = ()  # at which a nested adapter was compared

    @property
    def is_equal(self) -> bool:
        """Whether the difference is rounding."""
        return self.largest_difference <= self.tolerance


@dataclass(frozen=True, slots=True)
class Inspection:
    """Everything that was found. None: not known, for a reason that `unchecked` gives."""

    directory: str
    files: Mapping[str, int]  # name -> bytes
    model: str | None = None
    family: str | None = None
    summary: str | None = None  # how the family is served
    rank: int | None = None
    target_modules: tuple[str, ...] = ()
    num_tensors: int | None = None
    traits: Traits | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    cost: Cost | None = None
    parity: Parity | None = None
    unchecked: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> str:
        """served, refused, differs (a fault of ours: it would be served wrongly), or unknown."""
        if self.problems:
            return "refused"
        if self.parity is not None and not self.parity.is_equal:
            return "differs"
        return "unknown" if self.traits is None else "served"


def inspect_files(directory: Path) -> Inspection:
    """Inspect what needs no base: files, header, numbers, and the config by its own family."""
    found, family = _open(directory)
    try:
        validate(directory, _NO_BASE, StoreLimits())
        problems: list[Problem] = []
    except AdapterRejected as error:
        problems = [problem for problem in error.problems if problem.code not in _NEEDS_BASE]
    unchecked = "whether its tensors fit a base, its cost and its parity: give --model"
    if family is None and problems:
        unchecked = "whether its tensors fit a base: it is refused without one"
    return replace(
        found,
        problems=_with_hints(problems, directory),
        unchecked=(unchecked,),
        num_tensors=_num_tensors(directory, family),
    )


def inspect_adapter(directory: Path, model_dir: Path, config: EngineConfig) -> Inspection:
    """Inspect the adapter beside the model in `model_dir`; raises StartupError if that cannot be
    served.
    """
    with tempfile.TemporaryDirectory(prefix="polyadapt-inspect-") as scratch:
        return asyncio.run(_inspect(directory, model_dir, config, Path(scratch)))


async def _inspect(
    directory: Path, model_dir: Path, config: EngineConfig, scratch: Path
) -> Inspection:
    from polyadapt.offline.served import ServedModel

    found, family = _open(directory)
    found = replace(found, model=config.model, num_tensors=_num_tensors(directory, family))
    served = ServedModel(config, model_dir, scratch / "blobs")
    await served.start()
    try:
        base = served.engine.info.base
        try:
            validate(directory, base, StoreLimits())
            assert family is not None  # validate would have raised
            plan, deltas = _read(directory, family, base, served.engine.runner.base)
        except AdapterRejected as error:
            return replace(found, problems=_with_hints(error.problems, directory))
        found = replace(
            found,
            rank=plan.rank,
            target_modules=plan.target_modules,
            traits=plan.traits,
            notes=plan.notes,
        )
        token_ids = _prompt(deltas, base, plan.traits)
        try:
            num_top, adapter = min(_NUM_TOP, base.vocab_size), served.put(directory)
            # Of a signature all ones, which is what its components say by themselves.
            signed = tuple(
                (option.name, "1" * len(option.components))
                for option in plan.traits.options
                if option.kind == "bits"
            )
            scores = {
                rank: await served.score(adapter, rank, token_ids, num_top, signed)
                for rank in _ranks(plan.traits)
            }
        except PolyadaptError as error:
            return replace(found, problems=(Problem(error.code, error.message),))
    finally:
        await served.stop()
    del served  # its weights, before the other copy is loaded
    return _with_dense(found, model_dir, deltas, base, token_ids, scores)


def _with_dense(
    found: Inspection,
    model_dir: Path,
    deltas: Mapping[int, Delta],
    base: BaseSpec,
    token_ids: list[int],
    scores: Mapping[int | None, list[TokenLogprob]],
) -> Inspection:
    """Add what a second, plain copy of the model tells: cost beside it, and parity."""
    from polyadapt.offline.dense import NotDenseError, load_dense, logits_of, write_into

    model = load_dense(model_dir)
    cost = _cost(deltas, base, sum(p.numel() for p in model.parameters()))
    found = replace(found, cost=_with_first_pass(cost, base, found.traits))
    if found.traits is not None and found.traits.is_for_first_token:
        why = "it acts on one row of a prompt, and weights act on all"
        return replace(found, unchecked=(f"its parity with a dense model: {why}",))
    plain = logits_of(model, token_ids).log_softmax(-1)
    parity = Parity(0.0, 0.0, 0.0, len(token_ids), tuple(rank for rank in scores if rank))
    for number, (rank, served) in enumerate(scores.items()):
        model = load_dense(model_dir) if number else model
        try:
            write_into(model, _of_rank(deltas, rank), base)
        except NotDenseError as error:
            return replace(found, unchecked=(f"its parity with a dense model: {error}",))
        logits = logits_of(model, token_ids)
        expected = logits.log_softmax(-1)
        effect = float((expected - plain).abs().max())
        parity = replace(
            parity,
            largest_difference=max(
                parity.largest_difference, _largest_difference(served, expected)
            ),
            tolerance=max(parity.tolerance, TOLERANCE * float(logits.abs().max())),
            largest_effect=max(parity.largest_effect, effect),
        )
    unchecked = []
    if parity.largest_effect <= parity.tolerance:
        unchecked.append("parity: the adapter changes nothing that could be told from rounding")
    return replace(found, parity=parity, unchecked=tuple(unchecked))


def _ranks(traits: Traits) -> Sequence[int | None]:
    """The ranks that are compared: of a nested adapter the ends and the middle."""
    if not traits.nested_rank:
        return [None]
    middle = (traits.min_nested_rank + traits.nested_rank) // 2
    return sorted({traits.min_nested_rank, middle, traits.nested_rank})


def _of_rank(deltas: Mapping[int, Delta], rank: int | None) -> Mapping[int, Delta]:
    """A nested adapter's own formula: the first components of all, times their part of all."""
    if rank is None:
        return deltas
    return {
        site_id: replace(delta, a=delta.a[:rank], b=delta.b[:, :rank] * (len(delta.a) / rank))
        for site_id, delta in deltas.items()
    }


def _largest_difference(scores: list[TokenLogprob], expected: torch.Tensor) -> float:
    """Over all positions and listed tokens; expected [tokens, vocabulary] in natural logarithms."""
    assert len(scores) == len(expected)
    return max(
        abs(logprob - float(expected[position, token_id]))
        for position, score in enumerate(scores)
        for token_id, logprob in ((score.token_id, score.logprob), *score.top)
    )


def _open(directory: Path) -> tuple[Inspection, Family | None]:
    """What the files are, and the family if their config names one."""
    files = {
        path.relative_to(directory).as_posix(): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
    found = Inspection(str(directory), files)
    try:
        family, _ = open_adapter(directory)
    except (AdapterRejected, OSError):
        return found, None  # validate says what is wrong
    return replace(found, family=family.name, summary=family.summary), family


def _num_tensors(directory: Path, family: Family | None) -> int | None:
    files = (PEFT_FORM,) if family is None else family.files
    paths = weight_files(directory, files)
    if not paths:
        return None
    try:
        with Checkpoint(paths) as checkpoint:
            return len(checkpoint.header)
    except (AdapterRejected, OSError):
        return None


def _read(
    directory: Path, family: Family, base: BaseSpec, weights: Any
) -> tuple[AdapterPlan, dict[int, Delta]]:
    _, config = open_adapter(directory)
    with Checkpoint(weight_files(directory, family.files)) as checkpoint:
        plan = family.plan(config, checkpoint.header, base)
        return plan, family.read(config, checkpoint, base, weights)


def _with_hints(problems: list[Problem], directory: Path) -> tuple[Problem, ...]:
    """Say how to mend what `polyadapt convert` mends."""
    pickles = [path.name for path in directory.iterdir() if path.suffix in _PICKLES]
    return tuple(
        replace(p, message=f"{p.message}; `polyadapt convert` makes it of {sorted(pickles)[0]}")
        if p.code == "missing_file" and p.where == WEIGHTS_NAME and pickles
        else p
        for p in problems
    )


def _prompt(deltas: Mapping[int, Delta], base: BaseSpec, traits: Traits) -> list[int]:
    """Tokens that the adapter acts on: its invocation first, tokens that it replaces, and others.

    The same for every run.
    """
    rng = random.Random(0)
    named: list[int] = []
    for site_id, delta in sorted(deltas.items()):
        if base.sites[site_id].kind == "embedding" and len(delta.a):
            touched = delta.a.abs().amax(0).nonzero().flatten().tolist()
            if len(touched) <= base.vocab_size // 2:
                named += rng.sample(touched, min(len(touched), _NUM_TOKENS // 4))
    num_others = _NUM_TOKENS - len(named)
    others = [rng.randrange(base.vocab_size) for _ in range(num_others)]
    rest = [token for token in (*named, *others) if token not in traits.invocation[:1]]
    return [*traits.invocation, *rest][: base.max_model_len - 1]


# --------------------------------------------------------------------------- the cost
def _cost(deltas: Mapping[int, Delta], base: BaseSpec, num_base_elements: int) -> Cost:
    num_elements = num_multiply_adds = 0
    slow: dict[str, int] = {}
    for site_id, delta in deltas.items():
        site, rank = base.sites[site_id], len(delta.a)
        num_elements += cells.num_elements(
            site.in_features, site.out_features, rank, delta.parts, delta.code
        )
        num_multiply_adds += _multiply_adds(site, rank, delta.parts, delta.code)
        for bit, name in _OVERRIDES.items():
            if delta.parts & cells.OVERRIDES & bit:
                slow[name] = slow.get(name, 0) + 1
    linears = [site for site in base.sites if site.kind == "linear"]
    return Cost(
        num_elements=num_elements,
        num_base_elements=num_base_elements,
        num_multiply_adds=num_multiply_adds,
        num_base_multiply_adds=sum(site.in_features * site.out_features for site in linears),
        slow_parts=slow,
    )


def _with_first_pass(cost: Cost, base: BaseSpec, traits: Traits | None) -> Cost:
    """Add what weighs the experts, where a pass over the base without its head does."""
    if traits is None or traits.probe is None:
        return cost
    head = next(s for s in base.sites if s.path == base.head_path)
    num_first = cost.num_base_multiply_adds - head.in_features * head.out_features
    num_probe = traits.probe.num_elements
    return replace(
        cost,
        num_elements=cost.num_elements + num_probe,
        num_multiply_adds=cost.num_multiply_adds + num_first + num_probe,
    )


def _multiply_adds(site: SiteSpec, rank: int, parts: int, routing: int) -> int:
    """Of one token; an embedding's rows are looked up and not multiplied."""
    is_table = site.kind == "embedding"
    of = cells.Routing.of(routing)
    if of.router is cells.Router.EXPERTS and of.top_k:  # the others' are not computed
        rank = rank * of.top_k // of.num_scores
    total = rank * (site.out_features if is_table else site.in_features + site.out_features)
    total += cells.num_router_rows(routing) * site.in_features
    if parts & cells.OUT_SCALE:
        total += site.out_features
    if parts & cells.TRANSFORM:
        total += site.in_features * cells.group_of(parts)
    if parts & cells.SWAP:
        total += 2 * site.out_features
    if parts & cells.DENSE and not is_table:
        total += site.in_features * site.out_features
    return total
