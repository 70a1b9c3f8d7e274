"""What the conversions of other code's files share: what they are given, what they make, and how
they judge the tensors beside an adapter's own. Offline only. Knows no file and no command.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from polyadapt.errors import StartupError
from polyadapt_store.manifest import CONFIG_NAME
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch

PEFT_PREFIX = "base_model.model."
_LISTED = 5  # names in a message


@dataclass(frozen=True, slots=True)
class Stored:
    """An adapter as somebody wrote it: its tensors by name, and its config if there is one.

    A series is several files that belong together: the name of each, without its ending, and its
    tensors; then there are no `tensors`.
    """

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any] | None = None
    series: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Given:
    """What the command was told beside the source. None: nothing."""

    rank: int | None = None
    min_rank: int = 1
    alpha: float | None = None
    initial: Stored | None = None
    base: Mapping[str, torch.Tensor] | None = None  # the base's own tensors by name
    deltas_only: bool = False
    experts: tuple[Stored, ...] = ()  # beside the source
    general: tuple[Stored, ...] = ()
    top_k: int | None = None
    temperature: float = 1.0
    is_merged: bool | None = None  # whether weights in the source hold what lies beside them
    halves: Mapping[str, str | None] = field(default_factory=dict)  # name -> path of its block


@dataclass(frozen=True, slots=True)
class Converted:
    """The new directory's content, and what people should know of it."""

    tensors: Mapping[str, torch.Tensor]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Conversion:
    """One way in: its word for --from, what it reads, and the function."""

    name: str
    summary: str
    convert: Callable[[Stored, Given], Converted]  # raises StartupError
    is_series: bool = False  # whether all files of a directory are read together
    # Values beside the tensors that its writer stores and that mean nothing here.
    ignored: frozenset[str] = frozenset()
    config_name: str = CONFIG_NAME  # of the config beside the weights


def config_of(source: Stored) -> Mapping[str, Any]:
    """The config beside the weights; raises StartupError when there is none."""
    if source.config is None:
        raise StartupError(
            "there is no adapter_config.json beside the weights, which says what they are"
        )
    return source.config


def modules_of(source: Stored, names: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """Module path -> name -> tensor, all of `names` for each; raises StartupError."""
    modules: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in source.tensors.items():
        for name in names:
            if key.endswith(f".{name}"):
                modules.setdefault(key.removesuffix(f".{name}"), {})[name] = tensor
    if not modules:
        raise StartupError(
            f"the source holds no tensors named {' and '.join(f'<module>.{n}' for n in names)}"
        )
    for path, tensors in sorted(modules.items()):
        missing = [name for name in names if name not in tensors]
        if missing:
            raise StartupError(f"{path} has no {' and no '.join(missing)}")
    return modules


def leave_out(
    source: Stored,
    modules: Mapping[str, Any],
    names: tuple[str, ...],
    given: Given,
    *,
    may_replace_norms: bool,
) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """Judge every other tensor: equal to the base's it is left out, a trained norm is kept if that
    is allowed, and anything else that was trained is an error. Returns the norms and the notes;
    raises StartupError.
    """
    own = {f"{path}.{name}" for path in modules for name in names}
    others = {key: tensor for key, tensor in source.tensors.items() if key not in own}
    if not others:
        return {}, ()
    if given.deltas_only:
        return {}, (f"{len(others)} other tensors were left out unseen, trained or not",)
    if given.base is None:
        raise StartupError(
            f"the source holds {len(others)} tensors beside the adapter's ({some(others)}); give "
            "--base to tell those that were trained from the base's own, or --deltas-only to leave "
            "all of them out"
        )
    trained = {key for key, tensor in others.items() if not is_in_base(key, tensor, given.base)}
    norms = {
        path
        for path, _, name in (key.rpartition(".") for key in trained)
        if may_replace_norms and name in ("weight", "bias") and _is_norm(path, others)
    }
    rest = sorted(key for key in trained if key.rpartition(".")[0] not in norms)
    if rest:
        raise StartupError(
            f"{len(rest)} tensors differ from the base's and have no place in the adapter: "
            f"{some(rest)}; it was trained on another base, or trains more than is served"
        )
    kept = {key: tensor for key, tensor in others.items() if key.rpartition(".")[0] in norms}
    left = len(others) - len(kept)
    return kept, (f"{left} tensors are the base's own and were left out",) if left else ()


def _is_norm(path: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    """A module with one vector of weights, and maybe one of biases."""
    weight = tensors.get(f"{path}.weight")
    return weight is not None and weight.dim() == 1


def is_in_base(key: str, tensor: torch.Tensor, base: Mapping[str, torch.Tensor]) -> bool:
    """Whether it is the base's own; one that shares another's weight may be stored under both."""
    import torch

    candidates = [base[key]] if key in base else [b for b in base.values() if b.dim() == 2]
    return any(
        tensor.shape == own.shape and torch.equal(tensor.float(), own.float()) for own in candidates
    )


def some(names: Mapping[str, Any] | list[str]) -> str:
    """The first few of the names, and how many more there are."""
    first = sorted(names)
    more = f" and {len(first) - _LISTED} more" if len(first) > _LISTED else ""
    return ", ".join(shown(name) for name in first[:_LISTED]) + more


def plain(number: float) -> int | float:
    """The number as JSON should show it."""
    return int(number) if float(number).is_integer() else float(number)
