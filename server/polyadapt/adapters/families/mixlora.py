"""MixLoRA: experts in place of each MLP, every one the base's own with a LoRA of its own, and
ordinary LoRA at attention.

p = softmax(G x), w = the k largest p, divided by their sum; with W_e = W + s B_e A_e
    MLP(x) = sum_e w_e down_e(act(gate_e x) * up_e x)
mixlora-dynamic takes p / temperature, keeps from the largest on as many as sum up to more than
top_p, and weighs them by just that. One router per layer serves all of its projections.

arXiv 2404.15159; TUDB-Labs/MoE-PEFT:moe_peft/adapters/mixlora/{config,model}.py and
moe_peft/{model.py,common/lora_linear.py}; older names by
TUDB-Labs/MixLoRA:misc/legacy_weights_convertor.py. Both leave dropout on when they infer; here it
is off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from polyadapt.adapters.adapter import (
    AdapterPlan,
    BaseWeights,
    Delta,
    TensorRead,
    Traits,
    keeps_keys_and_values,
    layer_of,
)
from polyadapt.adapters.deltas import is_finite, low_rank, to_float32
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_family import note_origin
from polyadapt.errors import AdapterRejected, Problem
from polyadapt.ops import cells
from polyadapt.types import BaseSpec, MlpSpec, SiteSpec
from polyadapt_store.checkpoint import INTEGER_SIZES, ITEM_SIZES, Checkpoint, TensorInfo
from polyadapt_store.manifest import PEFT_FORM, FileForm
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch

_READ = frozenset(
    {
        *("bias", "r", "lora_alpha", "use_dora", "use_rslora", "target_modules", "expert_lora"),
        *("routing_strategy", "num_experts", "top_k", "top_p", "temperature", "act_fn"),
    }
)
_EXPERT_READ = frozenset({"bias", "r", "lora_alpha", "use_dora", "use_rslora"})
_TRAINING = frozenset(
    {
        *("lora_dropout", "lora_init", "router_aux_loss_coef", "router_init_range"),
        *("jitter_noise", "router_loss", "router_dyn_loss_coef", "router_z_loss_coef"),
        *("entropy_index", "entropy_type", "entropy_eps", "ffn_dropout"),
    }
)
_REFUSED: Mapping[str, str] = {
    "expert_capacity": "it belongs to mixlora-switch",
    "sparse_step": "it belongs to mixlora-switch",
}
_TOP_K, _TOP_P, _SWITCH = "mixlora", "mixlora-dynamic", "mixlora-switch"
_STRATEGIES = {_TOP_K: _TOP_K, "mixtral": _TOP_K, _TOP_P: _TOP_P}  # mixtral is an older name
_TEMPERATURES = (1e-6, 1e6)
_OLD_NAMES = (("w1", "w1_proj"), ("w3", "w3_proj"), ("w2", "w2_proj"))  # of gate, up and down
_FACTORS = ("lora_A", "lora_B")
_ALONE = -1  # in the place of an expert's number: attention has none


@dataclass(frozen=True, slots=True)
class _Scaled:
    """A rank, and alpha / r or alpha / sqrt(r)."""

    rank: int = 1
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers."""

    attention: _Scaled
    expert: _Scaled
    num_experts: int
    top_k: int  # 0: as many as it takes for top_p
    top_p: float
    temperature: float  # 1 where the config gives none
    targets: frozenset[str]
    act_fn: str | None

    def routing(self, *, is_first: bool) -> cells.Routing:
        """Of the cell of an MLP's first site, which has the router, and of its others."""
        # A sum over the temperature is more than top_p where the sum is more than their product.
        threshold = 0.0 if self.top_k else self.top_p * self.temperature
        return cells.Routing(
            cells.Router.EXPERTS,
            num_scores=self.num_experts,
            top_k=self.top_k,
            renormalise=self.top_k > 0,
            has_router=is_first,
            value=threshold if is_first else 1.0 / self.temperature,
        )


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer of the base: its MLP, None where experts cannot stand for it, and the site ids of
    its other linears by name.
    """

    mlp: MlpSpec | None
    others: Mapping[str, int]


@dataclass(slots=True)
class _Found:
    """Tensor names: of routers by layer, of factors by site, and there by expert and name."""

    routers: dict[int, str] = field(default_factory=dict)
    factors: dict[int, dict[tuple[int, str], str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Draft:
    settings: _Settings
    found: _Found
    mlps: Mapping[int, MlpSpec]  # by layer
    plan: AdapterPlan


class MixLora:
    """The family `mixlora`."""

    name: ClassVar[str] = "mixlora"
    peft_types: ClassVar[frozenset[str]] = frozenset({"MIXLORA"})
    summary: ClassVar[str] = (
        "each row is computed once per chosen expert between the MLP's products, which all share; "
        "low rank at attention"
    )
    scaling: ClassVar[str] = "no"
    overrides: ClassVar[int] = 0
    files: ClassVar[tuple[FileForm, ...]] = (PEFT_FORM,)

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Family.claims."""
        return config.get("peft_type") == "MIXLORA"

    def plan(
        self, config: Mapping[str, Any], header: Mapping[str, TensorInfo], base: BaseSpec
    ) -> AdapterPlan:
        """See Family.plan."""
        return _draft(config, header, base).plan

    def read_probe(
        self, config: Mapping[str, Any], checkpoint: Checkpoint, base: BaseSpec
    ) -> tuple[torch.Tensor, ...]:
        """See Family.read_probe."""
        return ()

    def read(
        self,
        config: Mapping[str, Any],
        checkpoint: Checkpoint,
        base: BaseSpec,
        weights: BaseWeights,
    ) -> dict[int, Delta]:
        """See Family.read. Every MLP has a cell at each of its sites, maybe of rank 0."""
        draft = _draft(config, checkpoint.header, base)
        problems: list[Problem] = []
        tensors: dict[str, torch.Tensor] = {}
        for read in draft.plan.reads:
            tensors[read.key] = to_float32(checkpoint.take(read.key))
            if not is_finite(tensors[read.key]):
                problems.append(_non_finite(shown(read.key)))
        for key in checkpoint.drained():
            problems.append(Problem("unread_tensor", f"nothing reads tensor {shown(key)}", key))
        deltas = dict(_deltas(draft, tensors, base))
        for site_id, delta in deltas.items() if not problems else ():
            if not is_finite(delta.b):
                path = base.sites[site_id].path
                problems.append(_non_finite(f"{path}: B times the scale"))
        if problems:
            raise AdapterRejected(problems)
        return deltas


# --------------------------------------------------------------------------- the plan
def _draft(config: Mapping[str, Any], header: Mapping[str, TensorInfo], base: BaseSpec) -> _Draft:
    problems: list[Problem] = []
    notes: list[str] = []
    reader = ConfigReader(config, problems, notes)
    reader.judge(read=_READ, training=_TRAINING, refused=_REFUSED)
    note_origin(config, base, notes)
    settings = _read_settings(reader)
    is_config_sound = not problems
    layers = _layers_of(base)
    found = _sort(header, layers, base, problems)
    if not header:
        problems.append(Problem("no_tensors", "the checkpoint holds no moe_gate and no lora_A"))
    mlps = {number: layer.mlp for number, layer in layers.items() if layer.mlp is not None}
    if is_config_sound and header:
        _check_base(settings, layers, base, problems)
        _check_routers(settings, mlps, found, header, base, problems)
        _check_factors(settings, layers, found, header, base, problems)
        _note_targets(settings, layers, base, notes)
    if problems:
        raise AdapterRejected(problems)
    return _Draft(settings, found, mlps, _plan(settings, mlps, found, base, notes))


def _plan(
    settings: _Settings,
    mlps: Mapping[int, MlpSpec],
    found: _Found,
    base: BaseSpec,
    notes: list[str],
) -> AdapterPlan:
    shapes = dict.fromkeys(found.factors, (settings.attention.rank, 0))
    reads = []
    for number, mlp in sorted(mlps.items()):
        reads.append(TensorRead(found.routers[number], mlp.inputs[0], "router"))
        for site_id in (*mlp.inputs, mlp.down):
            rank = settings.num_experts * settings.expert.rank if site_id in found.factors else 0
            code = settings.routing(is_first=site_id == mlp.inputs[0]).code
            shapes[site_id] = (rank, code)
    for site_id, keys in sorted(found.factors.items()):
        reads += [
            TensorRead(key, site_id, f"{name}.{e}") for (e, name), key in sorted(keys.items())
        ]
    ranks = [settings.expert.rank if code else rank for rank, code in shapes.values()]
    num_elements = sum(
        cells.num_elements(base.sites[s].in_features, base.sites[s].out_features, rank, 0, code)
        for s, (rank, code) in shapes.items()
    )
    return AdapterPlan(
        family=MixLora.name,
        rank=max(ranks),
        target_modules=tuple(sorted({_name_of(base.sites[s]) for s in found.factors})),
        num_elements=num_elements,
        reads=tuple(reads),
        notes=tuple(notes),
        traits=Traits(
            is_scalable=False,
            is_kv_neutral=keeps_keys_and_values(shapes, base),
            replaced=_replaced(settings, mlps, base),
            token_cost=settings.top_k or settings.num_experts,
        ),
    )


def _replaced(settings: _Settings, mlps: Mapping[int, MlpSpec], base: BaseSpec) -> tuple[str, ...]:
    """The MLPs, so that no two adapters of one request stand for the same; and where the weights do
    not sum up to one, the bias that they weigh.
    """
    names = []
    for _, mlp in sorted(mlps.items()):
        names.append(mlp.path)
        if not settings.top_k and base.sites[mlp.down].has_bias:
            names.append(f"{base.sites[mlp.down].path}.bias")
    return tuple(names)


def _deltas(
    draft: _Draft, tensors: Mapping[str, torch.Tensor], base: BaseSpec
) -> Iterator[tuple[int, Delta]]:
    import torch

    settings, found = draft.settings, draft.found
    experts = {s for mlp in draft.mlps.values() for s in (*mlp.inputs, mlp.down)}
    for site_id, keys in found.factors.items():
        if site_id not in experts:
            a, b = (tensors[keys[_ALONE, name]] for name in _FACTORS)
            yield site_id, low_rank(a, b * settings.attention.scale)
    for number, mlp in draft.mlps.items():
        for site_id in (*mlp.inputs, mlp.down):
            site, keys = base.sites[site_id], found.factors.get(site_id, {})
            a, b = torch.zeros(0, site.in_features), torch.zeros(site.out_features, 0)
            if keys:
                numbers = range(settings.num_experts)
                a = torch.cat([tensors[keys[e, "lora_A"]] for e in numbers])
                b = torch.cat([tensors[keys[e, "lora_B"]] for e in numbers], 1)
            is_first = site_id == mlp.inputs[0]
            yield (
                site_id,
                low_rank(
                    a,
                    b * settings.expert.scale,
                    routing=settings.routing(is_first=is_first),
                    router=tensors[found.routers[number]].contiguous() if is_first else None,
                ),
            )


# --------------------------------------------------------------------------- the config
def _read_settings(reader: ConfigReader) -> _Settings:
    """What is wrong goes to `reader.problems`. Nothing that a scale depends on has a default."""
    config = reader.config
    strategy, given = "", config.get("routing_strategy")
    if given == _SWITCH:
        reader.refuse(
            "routing_strategy",
            f"routing_strategy is {_SWITCH}, which is not served: an expert's capacity is counted "
            "over the tokens before in the batch, so that an answer would depend on them, and its "
            "reference runs no expert when it infers",
        )
    elif isinstance(given, str) and given in _STRATEGIES:
        strategy = _STRATEGIES[given]
    else:
        reader.invalid("routing_strategy", given, " or ".join(_STRATEGIES))
    num_experts = reader.whole("num_experts", 0, least=1)
    top_k, top_p, temperature = 0, 0.0, 1.0
    if strategy == _TOP_P:
        top_p, temperature = _read_top_p(reader)
    else:
        top_k = reader.whole("top_k", 2, least=1)
        if top_k > num_experts > 0:
            reader.invalid("top_k", top_k, f"at most num_experts, which is {num_experts}")
    attention = _read_scaled(reader)
    expert = _read_expert(reader, attention)
    if num_experts > cells.MAX_SCORES or num_experts * expert.rank > cells.MAX_ROUTED:
        reader.invalid(
            "num_experts",
            num_experts,
            f"at most {cells.MAX_SCORES}, and {cells.MAX_ROUTED} when multiplied by their rank",
        )
    act_fn = config.get("act_fn")
    if act_fn is not None and not isinstance(act_fn, str):
        reader.invalid("act_fn", act_fn, "null or a name")
    return _Settings(
        attention=attention,
        expert=expert,
        num_experts=num_experts,
        top_k=top_k,
        top_p=top_p,
        temperature=temperature,
        targets=_read_targets(reader),
        act_fn=act_fn if isinstance(act_fn, str) else None,
    )


def _read_top_p(reader: ConfigReader) -> tuple[float, float]:
    """top_p and temperature, for which 0 means none; its own defaults are 0.8 and 0."""
    top_p, temperature = reader.number("top_p", 0.8), reader.number("temperature", 0.0)
    if not 0.0 < top_p <= 1.0:
        reader.invalid("top_p", top_p, "more than 0 and at most 1")
    low, high = _TEMPERATURES
    if temperature != 0.0 and not low <= temperature <= high:
        reader.invalid("temperature", temperature, f"0, or from {low:g} to {high:g}")
        return top_p, 1.0
    return top_p, temperature or 1.0


def _read_scaled(reader: ConfigReader) -> _Scaled:
    for key in ("r", "lora_alpha"):
        if reader.config.get(key) is None:
            reader.invalid(key, None, "a number, as the scale depends on it")
            return _Scaled()
    reader.choice("bias", ("none",), "none")
    if reader.flag("use_dora"):
        reader.refuse(
            "use_dora", "use_dora is not served: the magnitudes that it needs are in no file"
        )
    rank, alpha = reader.rank("r"), reader.number("lora_alpha", 1.0)
    return _Scaled(rank, alpha / (math.sqrt(rank) if reader.flag("use_rslora") else rank))


def _read_expert(reader: ConfigReader, attention: _Scaled) -> _Scaled:
    """What expert_lora says stands for the same keys of the config around it."""
    given = reader.config.get("expert_lora")
    if given is None:
        return attention
    if not isinstance(given, dict):
        reader.invalid("expert_lora", given, "null or an object")
        return attention
    problems: list[Problem] = []
    ConfigReader(given, problems, reader.notes).judge(read=_EXPERT_READ, training=_TRAINING)
    own = ConfigReader({**reader.config, **given}, problems, reader.notes)
    before = len(problems)
    expert = _read_scaled(own)
    # What the config around it has wrong was said already.
    kept = [p for p in problems[before:] if p.where in given]
    for problem in [*problems[:before], *kept]:
        where = f"expert_lora.{problem.where}"
        reader.problems.append(Problem(problem.code, f"expert_lora: {problem.message}", where))
    return expert


def _read_targets(reader: ConfigReader) -> frozenset[str]:
    """A list of names, or true and false by name."""
    given = reader.config.get("target_modules")
    names = given
    if isinstance(given, dict) and all(isinstance(value, bool) for value in given.values()):
        names = [name for name, is_target in given.items() if is_target]
    if not isinstance(names, list) or not names or any(not isinstance(n, str) for n in names):
        reader.invalid("target_modules", given, "a list of names, or true and false by name")
        return frozenset()
    return frozenset(names)


# --------------------------------------------------------------------------- tensors and the base
def _layers_of(base: BaseSpec) -> dict[int, _Layer]:
    """The base's layers by number; none where it is not one stack of them."""
    placed = [layer_of(site.path) for site in base.sites]
    if len({layer[0] for layer in placed if layer is not None}) != 1:
        return {}
    by_layer: dict[int, list[int]] = {}
    for site_id, layer in enumerate(placed):
        if layer is not None:
            by_layer.setdefault(layer[1], []).append(site_id)
    mlps: dict[int, list[MlpSpec]] = {}
    for mlp in base.mlps:
        layer = layer_of(mlp.path)
        mlps.setdefault(-1 if layer is None else layer[1], []).append(mlp)
    found = {}
    for number, site_ids in by_layer.items():
        own = mlps.get(number, [])
        # Beside routed experts of the base an MLP is but a part of what the layer computes.
        is_routed = any(base.sites[site_id].kind == "experts" for site_id in site_ids)
        only = own[0] if len(own) == 1 and not is_routed else None
        inside = set() if only is None else {*only.inputs, only.down}
        others = [s for s in site_ids if base.sites[s].kind == "linear" and s not in inside]
        found[number] = _Layer(only, {_name_of(base.sites[s]): s for s in others})
    return found


def _sort(
    header: Mapping[str, TensorInfo],
    layers: Mapping[int, _Layer],
    base: BaseSpec,
    problems: list[Problem],
) -> _Found:
    """Whose tensor is whose."""
    found = _Found()
    for key in sorted(header):
        place = _place_of(key)
        if place is None:
            problems.append(
                Problem(
                    "unread_tensor",
                    f"nothing reads tensor {shown(key)}: its name is none of {MixLora.name}",
                    shown(key),
                )
            )
            continue
        layer = layers.get(place.layer)
        site_id = None if layer is None else _site_of(place, layer, base)
        if layer is not None and place.name is None:
            taken = found.routers.setdefault(place.layer, key)
        elif site_id is not None:
            of = (place.expert, place.factor)
            taken = found.factors.setdefault(site_id, {}).setdefault(of, key)
        else:
            problems.append(_unknown_module(key, place, base))
            continue
        if taken != key:
            problems.append(
                Problem(
                    "duplicate_tensor",
                    f"tensors {shown(taken)} and {shown(key)} are the same part",
                    shown(key),
                )
            )
    return found


@dataclass(frozen=True, slots=True)
class _Place:
    """What a tensor's name says; name None: a router."""

    layer: int
    name: str | None = None
    expert: int = _ALONE
    factor: str = ""


def _place_of(key: str) -> _Place | None:
    """The place by today's names or by older ones; None: it is neither."""
    match key.split("."):
        case ["mixlora", "layers", layer, "mlp", "moe_gate", "weight"]:
            return _Place(int(layer)) if _is_number(layer) else None
        case ["mixlora", "layers", layer, "gate", "weight"]:
            return _Place(int(layer)) if _is_number(layer) else None
        case ["mixlora", "layers", layer, "self_attn", name, factor, "weight"]:
            if _is_number(layer) and factor in _FACTORS:
                return _Place(int(layer), name, _ALONE, factor)
        case ["mixlora", "layers", layer, "mlp", name, "experts", expert, factor, "weight"] | [
            "mixlora",
            "layers",
            layer,
            "experts",
            expert,
            name,
            factor,
            "weight",
        ]:
            if _is_number(layer) and _is_number(expert) and factor in _FACTORS:
                return _Place(int(layer), name, int(expert), factor)
    return None


def _is_number(text: str) -> bool:
    """Whether it is a number as written by a program: one text for each."""
    return text.isascii() and text.isdecimal() and len(text) < 10 and str(int(text)) == text


def _site_of(place: _Place, layer: _Layer, base: BaseSpec) -> int | None:
    if place.name is None:
        return None
    if place.expert == _ALONE:
        return layer.others.get(place.name)
    if layer.mlp is None:
        return None
    for site_id, names in _names_in(layer.mlp, base).items():
        if place.name in names:
            return site_id
    return None


def _names_in(mlp: MlpSpec, base: BaseSpec) -> dict[int, tuple[str, ...]]:
    """What tensors and configs call the sites of an MLP."""
    site_ids = (*mlp.inputs, mlp.down)
    names: dict[int, tuple[str, ...]] = {s: (_name_of(base.sites[s]),) for s in site_ids}
    if len(site_ids) == len(_OLD_NAMES):
        for site_id, old in zip(site_ids, _OLD_NAMES, strict=True):
            names[site_id] += old
    return names


def _name_of(site: SiteSpec) -> str:
    return site.path.rpartition(".")[2]


def _unknown_module(key: str, place: _Place, base: BaseSpec) -> Problem:
    what = "a router" if place.name is None else shown(place.name)
    return Problem(
        "unknown_module",
        f"tensor {shown(key)} belongs to {what} in layer {place.layer}, which the base {base.name} "
        f"({base.architecture}) does not have as one that adapters can change so",
        shown(key),
    )


# --------------------------------------------------------------------------- what must agree
def _check_base(
    settings: _Settings, layers: Mapping[int, _Layer], base: BaseSpec, problems: list[Problem]
) -> None:
    """Whether every layer of the base has an MLP that experts can stand for, and its activation."""
    odd = sorted(number for number, layer in layers.items() if layer.mlp is None)
    if odd or not layers:
        which = "its layers are not one stack" if not layers else f"layer {odd[0]} has none"
        problems.append(
            Problem(
                "unsupported_base",
                f"every layer of {base.name} ({base.architecture}) must have one MLP of two or "
                f"three linears for experts to stand for: {which}, or one of another form",
            )
        )
        return
    known = {layer.mlp.activations for layer in layers.values() if layer.mlp is not None}
    if settings.act_fn is not None and any(settings.act_fn not in names for names in known):
        names = (
            " or ".join(sorted({name for names in known for name in names})) or "of no known name"
        )
        problems.append(
            Problem(
                "unsupported_config",
                f"act_fn is {shown(settings.act_fn)} and the base's activation is {names}: experts "
                "with another one are not served",
                "act_fn",
            )
        )


def _check_routers(
    settings: _Settings,
    mlps: Mapping[int, MlpSpec],
    found: _Found,
    header: Mapping[str, TensorInfo],
    base: BaseSpec,
    problems: list[Problem],
) -> None:
    for number, mlp in sorted(mlps.items()):
        key = found.routers.get(number)
        if key is None:
            name = f"mixlora.layers.{number}.mlp.moe_gate.weight"
            problems.append(Problem("missing_tensor", f"the checkpoint has no {name}", name))
            continue
        width = base.sites[mlp.inputs[0]].in_features
        _check_tensor(
            key, (settings.num_experts, width), "num_experts and the base", header, problems
        )


def _check_factors(
    settings: _Settings,
    layers: Mapping[int, _Layer],
    found: _Found,
    header: Mapping[str, TensorInfo],
    base: BaseSpec,
    problems: list[Problem],
) -> None:
    """Every targeted linear has all of its factors, of the config's rank, and no other has any."""
    for layer in layers.values():
        experts = {} if layer.mlp is None else _names_in(layer.mlp, base)
        others = {site_id: (name,) for name, site_id in layer.others.items()}
        for site_id, names in {**others, **experts}.items():
            site, keys = base.sites[site_id], found.factors.get(site_id, {})
            if not settings.targets.isdisjoint(names):
                numbers = range(settings.num_experts) if site_id in experts else range(_ALONE, 0)
                rank = (settings.expert if site_id in experts else settings.attention).rank
                _check_linear(site, keys, numbers, rank, header, problems)
            elif keys:
                message = f"the checkpoint adapts {site.path}, target_modules does not name it"
                problems.append(Problem("not_targeted", message, site.path))


def _check_linear(
    site: SiteSpec,
    keys: Mapping[tuple[int, str], str],
    numbers: range,
    rank: int,
    header: Mapping[str, TensorInfo],
    problems: list[Problem],
) -> None:
    missing = [(e, name) for e in numbers for name in _FACTORS if (e, name) not in keys]
    if missing:
        number, name = missing[0]
        whose = f" of expert {number}" if number != _ALONE else ""
        more = f", nor {len(missing) - 1} more" if len(missing) > 1 else ""
        message = f"{site.path} has no {name}.weight{whose}{more}"
        problems.append(Problem("missing_tensor", message, site.path))
    shapes = {"lora_A": (rank, site.in_features), "lora_B": (site.out_features, rank)}
    for (number, name), key in sorted(keys.items()):
        if number in numbers:
            _check_tensor(key, shapes[name], "r and the base", header, problems)
        else:
            message = f"nothing reads tensor {shown(key)}: num_experts is {len(numbers)}"
            problems.append(Problem("unread_tensor", message, shown(key)))


def _check_tensor(
    key: str,
    shape: tuple[int, ...],
    reason: str,
    header: Mapping[str, TensorInfo],
    problems: list[Problem],
) -> None:
    info = header[key]
    if info.dtype in INTEGER_SIZES:
        expected = ", ".join(ITEM_SIZES)
        message = f"{shown(key)} has dtype {info.dtype}, expected one of {expected}"
        problems.append(Problem("unsupported_dtype", message, shown(key)))
    if tuple(info.shape) != shape:
        message = f"{shown(key)} has shape {list(info.shape)}, {reason} need {list(shape)}"
        problems.append(Problem("shape_mismatch", message, shown(key)))


def _note_targets(
    settings: _Settings, layers: Mapping[int, _Layer], base: BaseSpec, notes: list[str]
) -> None:
    """A config may name what other models have: it lists the names of all."""
    known: set[str] = set()
    for layer in layers.values():
        known.update(layer.others)
        if layer.mlp is not None:
            known.update(*_names_in(layer.mlp, base).values())
    left = sorted(settings.targets - known)
    if left:
        notes.append(f"target_modules names {', '.join(left)}, which no layer of the base has")


def _non_finite(what: str) -> Problem:
    return Problem("non_finite", f"tensor {what} holds NaN or infinity", what)
