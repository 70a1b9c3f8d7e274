"""X-LoRA: LoRAs side by side, weighed token by token and module by module by a classifier that
reads the final hidden states of a first pass without them. arXiv 2402.07148.

    y = W x + gamma sum_e S[e] s_e B_e A_e x,    S[e]: adapter.Probe's weight of expert e
with each LoRA's own s_e. Three forms are read:
- PEFT's (huggingface/peft:src/peft/tuners/xlora/{config,classifier,layer,model}.py, 0.21.2): the
  classifier in adapter_model.safetensors as `internal_xlora_classifier.layers.<i>`, the experts in
  folders. PEFT itself cannot write it: its save_pretrained leaves out the layers of the classifier
  whose number is an expert's, and puts files without most tensors into the experts' folders.
- the original library's (EricLBuehler/xlora:src/xlora/{xlora_classifier,xlora_config}.py):
  xlora_config.json and xlora_classifier.safetensors with `inner.<i>` and `last`.
- mistral.rs' ordering beside either (EricLBuehler/mistral.rs:orderings/*.json): a JSON file whose
  name ends in "ordering.json", with the experts in class order and the modules' numbers.
Without an ordering modules are numbered as the base holds them, which is how PEFT and the original
walk them. Where top-k scalings get a softmax of their own it is PEFT's, over one token and module;
the original took it over the whole batch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

from polyadapt.adapters.adapter import (
    AdapterPlan,
    BaseWeights,
    Delta,
    Probe,
    TensorRead,
    Traits,
    keeps_keys_and_values,
)
from polyadapt.adapters.deltas import is_finite, low_rank, to_float32
from polyadapt.adapters.families.lora import Lora
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_modules import find_site, without_prefixes
from polyadapt.errors import AdapterRejected, Problem
from polyadapt.ops import cells
from polyadapt.ops.cells import Router, Routing
from polyadapt.types import BaseSpec
from polyadapt_store.checkpoint import ITEM_SIZES, Checkpoint, TensorInfo
from polyadapt_store.manifest import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    FileForm,
    is_read,
    weights_prefix,
)
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch

MAX_EXPERTS = 256
MAX_DEPTH = 32

_CONFIG, _CLASSIFIER = "xlora_config.json", "xlora_classifier.safetensors"
_ORDERING = "*ordering.json"
_FOLDERS = (f"*/{CONFIG_NAME}", f"*/{WEIGHTS_NAME}", _ORDERING)
_LAYERS = "internal_xlora_classifier.layers"  # PEFT's name of the classifier
_PEFT_LOSES = (
    "if PEFT 0.21.2 wrote these files, it left tensors out; take the classifier from "
    "model.state_dict() and put each expert's own files into its folder"
)
# Codes of problems that such a file has.
_LOST = frozenset({"unknown_module", "no_tensors", "missing_tensor", "unread_tensor"})
_LEFT_OUT = "X-LoRA takes A and B of its experts alone, so that this would be left out"


class _Expert(Lora):
    """One of the LoRAs, as it is alone; what PEFT's X-LoRA would not compute is refused."""

    forms: ClassVar = {name: Lora.forms[name] for name in ("a", "b", "embedding_a", "embedding_b")}
    refused_keys: ClassVar = {
        **Lora.refused_keys,
        **dict.fromkeys(
            (
                *("use_dora", "alora_invocation_tokens", "use_bdlora", "kasa_config"),
                *("target_parameters", "modules_to_save", "trainable_token_indices"),
            ),
            _LEFT_OUT,
        ),
        "lora_bias": "the bias of B would act ungated, whatever the classifier says",
    }
    foreign: ClassVar = {
        **Lora.foreign,
        "lora_magnitude_vector": _LEFT_OUT,
        "internal_xlora_classifier": f"it is the classifier's, {_PEFT_LOSES}",
    }

    def settings(self, reader: ConfigReader, base: BaseSpec) -> Any:
        """See PeftFamily.settings."""
        settings = super().settings(reader, base)
        if reader.config.get("bias", "none") != "none":
            reader.refuse("bias", f"bias is not served: {_LEFT_OUT}")
        if settings.init:
            reader.refuse(
                "init_lora_weights",
                f"init_lora_weights = {shown(settings.init)} makes an adapter of another base; "
                "`polyadapt convert --from pissa` makes an ordinary one of it",
            )
        return settings


@dataclass(frozen=True, slots=True)
class _Settings:
    """What the config says. layers: the names of the classifier's layers, first to last."""

    names: tuple[str, ...]  # of the experts, in the order of their classes
    folders: tuple[str, ...]  # beside `names`
    numbers: Mapping[str, int] | None  # of the modules, by path; None: as the base holds them
    layers: tuple[str, ...]
    hidden_size: int  # between the classifier's layers
    is_layerwise: bool
    has_bias: bool
    has_relu: bool
    has_softmax: bool
    temperature: float
    top_k: int
    has_top_softmax: bool
    scale: float
    resting: float


@dataclass(frozen=True, slots=True)
class _Draft:
    settings: _Settings
    plan: AdapterPlan
    probe: Probe
    probe_keys: tuple[str, ...]  # in the order of probe.shapes
    columns: Mapping[int, int]  # by site: the first column of its weights
    ranks: Mapping[int, int]  # by site: the largest of any expert


class XLora:
    """The family `xlora`."""

    name: ClassVar[str] = "xlora"
    peft_types: ClassVar[frozenset[str]] = frozenset({"XLORA"})
    summary: ClassVar[str] = (
        "low rank, weighed: a classifier reads a first pass over the base and weighs the LoRAs by "
        "token and module"
    )
    scaling: ClassVar[str] = "yes"
    overrides: ClassVar[int] = 0
    files: ClassVar[tuple[FileForm, ...]] = (
        FileForm((CONFIG_NAME, WEIGHTS_NAME), _FOLDERS),
        FileForm((_CONFIG, _CLASSIFIER), _FOLDERS),
    )

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether PEFT calls it so, or it is the original library's."""
        kind = config.get("peft_type")
        return kind == "XLORA" or (kind is None and _CONFIG in config)

    def plan(
        self, config: Mapping[str, Any], header: Mapping[str, TensorInfo], base: BaseSpec
    ) -> AdapterPlan:
        """See Family.plan."""
        return self._draft(config, header, base).plan

    def read_probe(
        self, config: Mapping[str, Any], checkpoint: Checkpoint, base: BaseSpec
    ) -> tuple[torch.Tensor, ...]:
        """See Family.read_probe."""
        draft = self._draft(config, checkpoint.header, base)
        tensors = tuple(to_float32(checkpoint.take(key)) for key in draft.probe_keys)
        problems = [
            Problem("non_finite", f"tensor {shown(key)} holds NaN or infinity", shown(key))
            for key, tensor in zip(draft.probe_keys, tensors, strict=True)
            if not is_finite(tensor)
        ]
        if problems:
            raise AdapterRejected(problems)
        return tensors

    def read(
        self,
        config: Mapping[str, Any],
        checkpoint: Checkpoint,
        base: BaseSpec,
        weights: BaseWeights,
    ) -> dict[int, Delta]:
        """See Family.read: the experts end to end, each filled up to the largest rank by zeros."""
        draft = self._draft(config, checkpoint.header, base)
        experts = [
            _Expert().read(
                config[f"{folder}/{CONFIG_NAME}"], checkpoint.below(_prefix(folder)), base, weights
            )
            for folder in draft.settings.folders
        ]
        found = {}
        for site_id, rank in draft.ranks.items():
            site, num = base.sites[site_id], len(experts)
            routing = _routing(num, draft.columns[site_id])
            deltas = [expert[site_id] for expert in experts]
            found[site_id] = _end_to_end(deltas, site.in_features, site.out_features, rank, routing)
        return found

    def _draft(
        self, config: Mapping[str, Any], header: Mapping[str, TensorInfo], base: BaseSpec
    ) -> _Draft:
        problems: list[Problem] = []
        notes: list[str] = []
        settings = _read_settings(config, header, problems, notes)
        if settings is None:
            raise AdapterRejected(problems)
        experts = [
            _plan_expert(folder, config, header, base, problems) for folder in settings.folders
        ]
        for expert in experts:
            notes += [note for note in (expert.notes if expert else ()) if note not in notes]
        ranks = _ranks(experts, settings, header, base, problems)
        columns = _columns(ranks, settings, base, problems)
        probe, keys = _probe(settings, len(ranks), config, header, base, problems)
        _check_header(header, settings, keys, problems)
        if problems:
            raise AdapterRejected(problems)
        num_experts = len(settings.folders)
        reads = [TensorRead(key, -1, "probe") for key in keys]
        for folder, expert in zip(settings.folders, experts, strict=True):
            assert expert is not None  # or there was a problem
            reads += [
                TensorRead(_prefix(folder) + read.key, read.site_id, f"{folder}.{read.role}")
                for read in expert.reads
            ]
        sites = {site_id: base.sites[site_id] for site_id in ranks}
        num_elements = sum(
            cells.num_elements(
                site.in_features, site.out_features, num_experts * ranks[site_id], 0,
                _routing(num_experts, columns[site_id]).code,
            )
            for site_id, site in sites.items()
        )  # fmt: skip
        plan = AdapterPlan(
            family=self.name,
            rank=max(ranks.values()),
            target_modules=tuple(sorted({s.path.rpartition(".")[2] for s in sites.values()})),
            num_elements=num_elements + probe.num_elements,
            reads=tuple(reads),
            notes=tuple(notes),
            traits=Traits(
                is_kv_neutral=keeps_keys_and_values(ranks, base),
                options=probe.options,
                probe=probe,
            ),
        )
        return _Draft(settings, plan, probe, keys, columns, ranks)


# --------------------------------------------------------------------------- the config
_BOTH_READ = frozenset(
    {
        *("hidden_size", "adapters", "enable_softmax", "enable_softmax_topk", "layerwise_scalings"),
        *("xlora_depth", "xlora_size", "softmax_temperature", "top_k_lora", "scaling_pass_value"),
        *("global_scaling_weight", "xlora_dropout_p"),
    }
)
_ORIGINAL_READ = _BOTH_READ | {"enable_relu_and_dropout", "use_bias", "base_model_id"}
_ORIGINAL_REFUSED = {
    "use_mean_pool": "it averages hidden states over the whole text, later tokens included"
}


def _read_settings(
    config: Mapping[str, Any],
    header: Mapping[str, TensorInfo],
    problems: list[Problem],
    notes: list[str],
) -> _Settings | None:
    """Return None with what is wrong added to the problems."""
    before = len(problems)
    own = {key: value for key, value in config.items() if not is_read(key, XLora.files[:1])}
    is_original = "peft_type" not in config
    reader = ConfigReader(config[_CONFIG] if is_original else own, problems, notes)
    if is_original:
        reader.judge(
            read=_ORIGINAL_READ,
            training={"use_trainable_adapters", "stop_token_id", "device"},
            refused=_ORIGINAL_REFUSED,
        )
        ConfigReader({k: v for k, v in own.items() if k != _CONFIG}, problems, notes).judge(read=())
    else:
        reader.judge(read=_BOTH_READ, training={"use_trainable_adapters"})
    depth = reader.whole("xlora_depth", 1, least=1)
    if depth > MAX_DEPTH:
        reader.invalid("xlora_depth", depth, f"at most {MAX_DEPTH}")
    dropout = reader.number("xlora_dropout_p", 0.2)
    has_relu = reader.flag("enable_relu_and_dropout") if is_original else True
    # The numbers of the linears count what stands between them.
    stride = (3 if has_relu else 1) if is_original else (3 if dropout > 0 else 2)
    inner = [f"inner.{stride * i}" for i in range(min(depth, MAX_DEPTH) - 1)]
    if is_original:
        layers = [f"{weights_prefix(_CLASSIFIER)}{name}" for name in (*inner, "last")]
    else:
        layers = [f"{_LAYERS}.{stride * i}" for i in range(min(depth, MAX_DEPTH))]
    ordering = _ordering(config, reader)
    names, paths = _experts(reader, ordering)
    folders = _assign(names, paths, config, header, problems)
    top_k = reader.config.get("top_k_lora")
    if top_k is not None and (type(top_k) is not int or not 1 <= top_k <= max(len(names), 1)):
        reader.invalid("top_k_lora", top_k, f"null or a whole number from 1 to {len(names)}")
        top_k = None
    has_top_softmax = reader.flag("enable_softmax_topk")
    resting = reader.config.get("scaling_pass_value", 0.0)
    if resting is None:
        resting = 1.0 / max(len(names), 1)
    else:
        resting = reader.number("scaling_pass_value", 0.0)
    if resting != 0.0 and (top_k is not None or has_top_softmax):
        reader.refuse(
            "scaling_pass_value",
            "scaling_pass_value other than 0 is not served beside top_k_lora or "
            "enable_softmax_topk, which would choose between equal scalings",
        )
    temperature = reader.number("softmax_temperature", 1.0)
    if temperature <= 0.0:
        reader.invalid("softmax_temperature", temperature, "a number above 0")
    settings = _Settings(
        names=names,
        folders=folders,
        numbers=None if ordering is None else _numbers(ordering, reader),
        layers=tuple(layers),
        hidden_size=reader.whole("xlora_size", 2048, least=1),
        is_layerwise=reader.flag("layerwise_scalings"),
        has_bias=reader.flag("use_bias", default=True) if is_original else True,
        has_relu=has_relu,
        has_softmax=reader.flag("enable_softmax", default=True),
        temperature=temperature,
        top_k=top_k or 0,
        has_top_softmax=has_top_softmax,
        scale=reader.number("global_scaling_weight", 1.0),
        resting=resting,
    )
    return None if len(problems) > before else settings


def _ordering(config: Mapping[str, Any], reader: ConfigReader) -> ConfigReader | None:
    found = [key for key in config if FileForm((), (_ORDERING,)).reads(key)]
    if not found:
        return None
    for name in found[1:]:
        reader.problems.append(
            Problem("unread_file", f"{shown(found[0])} orders the experts already", name)
        )
    given = config[found[0]]
    if not isinstance(given, dict):
        reader.invalid(found[0], given, "an object")
        return None
    ordering = ConfigReader(given, reader.problems, reader.notes)
    ordering.judge(read={"order", "layers", "base_model_id"})
    return ordering


def _experts(
    reader: ConfigReader, ordering: ConfigReader | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The experts' names in class order, and the paths that the config gives, if it does."""
    given = reader.config.get("adapters")
    listed = list(given) if isinstance(given, dict | list) else []
    paths = list(given.values()) if isinstance(given, dict) else [""] * len(listed)
    is_sound = given is None or isinstance(given, dict | list)
    if (
        not is_sound
        or not all(isinstance(text, str) and text for text in listed)
        or not all(isinstance(path, str) for path in paths)
    ):
        reader.invalid("adapters", given, "the experts' names, or an object of names and paths")
        return (), ()
    names = tuple(listed)
    if ordering is not None:
        order = ordering.words("order")
        if names and order != names:
            ordering.invalid("order", list(order), f"the experts as they are: {', '.join(names)}")
        names, paths = names or order, paths or [""] * len(order)
    if not 1 <= len(names) <= MAX_EXPERTS or len(set(names)) < len(names):
        reader.invalid(
            "adapters", given, f"1 to {MAX_EXPERTS} experts in the order of classes, each once"
        )
        return (), ()
    return names, tuple(paths)


def _assign(
    names: tuple[str, ...],
    paths: tuple[str, ...],
    config: Mapping[str, Any],
    header: Mapping[str, TensorInfo],
    problems: list[Problem],
) -> tuple[str, ...]:
    """The experts' folders: called like them, like the end of their paths, or by number."""
    present = {key.rpartition("/")[0] for key in config if FileForm((), _FOLDERS[:1]).reads(key)}
    present |= {key.split("/")[0] for key in header if f"/{WEIGHTS_NAME}/" in key}
    ways = (names, tuple(PurePosixPath(path).name for path in paths), _numbered(names))
    found = {way for way in ways if len(set(way)) == len(way) and present >= set(way)}
    if not names:
        return ()
    if len(found) != 1:
        how = "may stand for the experts in several ways" if found else "lack some of the experts"
        problems.append(
            Problem(
                "missing_file",
                f"the folders {', '.join(map(shown, sorted(present))) or '(none)'} {how}; expected "
                f"one folder with the files of each of {', '.join(map(shown, names))}, called like "
                f"it or by its number from 0",
                "adapters",
            )
        )
        return ()
    (folders,) = found
    for folder in sorted(present - set(folders)):
        problems.append(
            Problem("unread_file", f"the folder {shown(folder)} is no expert's", shown(folder))
        )
    return folders


def _numbered(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(map(str, range(len(names))))


def _numbers(ordering: ConfigReader, reader: ConfigReader) -> dict[str, int] | None:
    given = ordering.config.get("layers")
    if given is None:
        return None
    if not isinstance(given, dict) or any(type(n) is not int or n < 0 for n in given.values()):
        ordering.invalid("layers", given, "an object of modules and their numbers")
        return None
    return dict(given)


# --------------------------------------------------------------------------- the experts
def _prefix(folder: str) -> str:
    return weights_prefix(f"{folder}/{WEIGHTS_NAME}")


def _plan_expert(
    folder: str,
    config: Mapping[str, Any],
    header: Mapping[str, TensorInfo],
    base: BaseSpec,
    problems: list[Problem],
) -> AdapterPlan | None:
    """What the LoRA in the folder is by itself; None with what is wrong added to the problems."""
    own, prefix = config.get(f"{folder}/{CONFIG_NAME}"), _prefix(folder)
    if not isinstance(own, dict):
        name = f"{folder}/{CONFIG_NAME}"
        problems.append(Problem("missing_file", f"{shown(name)} is missing", name))
        return None
    if not _Expert().claims(own):
        given = shown(own.get("peft_type"))
        problems.append(
            Problem("unsupported_config", f"{folder}: peft_type is {given}, expected LORA", folder)
        )
        return None
    hint = f": {_PEFT_LOSES}" if "peft_type" in config else ""
    tensors = {k.removeprefix(prefix): v for k, v in header.items() if k.startswith(prefix)}
    try:
        return _Expert().plan(own, tensors, base)
    except AdapterRejected as error:
        problems += [
            Problem(
                p.code,
                f"{folder}: {p.message}{hint if p.code in _LOST else ''}",
                f"{folder}/{p.where or ''}",
            )
            for p in error.problems
        ]
        return None


def _ranks(
    experts: Sequence[AdapterPlan | None],
    settings: _Settings,
    header: Mapping[str, TensorInfo],
    base: BaseSpec,
    problems: list[Problem],
) -> dict[int, int]:
    """The largest rank of any expert at each site, in the order of the sites."""
    ranks: dict[int, int] = {}
    all_sites: list[frozenset[int]] = []
    for folder, expert in zip(settings.folders, experts, strict=True):
        if expert is None:
            continue
        all_sites.append(frozenset(read.site_id for read in expert.reads))
        for read in expert.reads:
            if read.role in ("a", "embedding_a"):
                rank = header[_prefix(folder) + read.key].shape[0]
                ranks[read.site_id] = max(ranks.get(read.site_id, 0), rank)
    for folder, sites in zip(settings.folders, all_sites, strict=False):
        if sites != all_sites[0]:
            differing = sorted(base.sites[s].path for s in sites ^ all_sites[0])
            problems.append(
                Problem(
                    "config_mismatch",
                    f"the expert in {shown(folder)} adapts other modules than that in "
                    f"{shown(settings.folders[0])}: {', '.join(differing[:5])}; all must adapt the "
                    "same",
                    folder,
                )
            )
    most = max(ranks.values(), default=0) * len(settings.folders)
    if most > cells.MAX_ROUTED:
        problems.append(
            Problem(
                "invalid_rank",
                f"{len(settings.folders)} experts of rank {max(ranks.values())} have {most} "
                f"components at a module, at most {cells.MAX_ROUTED} are served",
                "adapters",
            )
        )
    return dict(sorted(ranks.items()))


def _columns(
    ranks: Mapping[int, int], settings: _Settings, base: BaseSpec, problems: list[Problem]
) -> dict[int, int]:
    """By site, where its experts' weights begin among all that the classifier gives a token."""
    numbers = {site_id: number for number, site_id in enumerate(ranks)}
    if settings.numbers is not None:
        places = {base.sites[site_id].path: site_id for site_id in ranks}
        given = {find_site(path, places): n for path, n in settings.numbers.items()}
        if given.keys() != ranks.keys() or sorted(given.values()) != list(range(len(ranks))):
            problems.append(
                Problem(
                    "config_mismatch",
                    f"layers of the ordering must give the {len(ranks)} adapted modules, and no "
                    f"others, the numbers 0 to {len(ranks) - 1}; it names {len(settings.numbers)}",
                    "layers",
                )
            )
        numbers = {site_id: n for site_id, n in given.items() if site_id is not None}
    if not settings.is_layerwise:
        return dict.fromkeys(ranks, 0)
    return {site_id: numbers.get(site_id, 0) * len(settings.folders) for site_id in ranks}


def _routing(num_experts: int, column: int) -> Routing:
    return Routing(Router.TABLE, num_experts, has_router=False, value=column)


def _end_to_end(
    deltas: Sequence[Delta], num_in: int, num_out: int, rank: int, routing: Routing
) -> Delta:
    import torch

    a, b = torch.zeros(len(deltas), rank, num_in), torch.zeros(num_out, len(deltas), rank)
    for number, delta in enumerate(deltas):
        own = delta.a.shape[0]
        a[number, :own], b[:, number, :own] = delta.a, delta.b
    return low_rank(a.flatten(0, 1), b.flatten(1), routing=routing)


# --------------------------------------------------------------------------- the classifier
def _probe(
    settings: _Settings,
    num_modules: int,
    config: Mapping[str, Any],
    header: Mapping[str, TensorInfo],
    base: BaseSpec,
    problems: list[Problem],
) -> tuple[Probe, tuple[str, ...]]:
    """The classifier, and the names of its tensors in the order of its shapes."""
    num_experts, depth = len(settings.folders), len(settings.layers)
    widths = [site.in_features for site in base.sites if site.path == base.head_path]
    width = widths[0] if widths else 0  # files alone may be judged without a base
    num_outputs = num_experts * (num_modules if settings.is_layerwise else 1)
    probe = Probe(
        sizes=(width, *[settings.hidden_size] * (depth - 1), num_outputs),
        num_experts=num_experts,
        has_bias=settings.has_bias,
        has_relu=settings.has_relu,
        has_softmax=settings.has_softmax,
        temperature=settings.temperature,
        top_k=settings.top_k,
        has_top_softmax=settings.has_top_softmax,
        scale=settings.scale,
        resting=settings.resting,
    )
    own = config.get(_CONFIG, config)
    given = own.get("hidden_size", width)
    if given != width:
        message = f"hidden_size is {shown(given)}, the base's hidden states have {width} elements"
        problems.append(Problem("shape_mismatch", message, "hidden_size"))
    by_name = {without_prefixes(key): key for key in header}
    parts = ("weight", "bias") if settings.has_bias else ("weight",)
    wanted = [f"{layer}.{part}" for layer in settings.layers for part in parts]
    keys = []
    for name, shape in zip(wanted, probe.shapes, strict=True):
        key = by_name.get(name)
        if key is None:
            hint = f": {_PEFT_LOSES}" if name.startswith(_LAYERS) else ""
            message = f"the classifier has no {name}{hint}"
            problems.append(Problem("missing_tensor", message, name))
            continue
        keys.append(key)
        if header[key].dtype not in ITEM_SIZES:
            message = (
                f"{shown(key)} has dtype {header[key].dtype}, expected {', '.join(ITEM_SIZES)}"
            )
            problems.append(Problem("unsupported_dtype", message, shown(key)))
        if header[key].shape != shape:
            message = (
                f"{shown(key)} has shape {list(header[key].shape)}, expected {list(shape)} for "
                f"{num_experts} experts, {num_modules} modules and hidden states of {width}"
            )
            problems.append(Problem("shape_mismatch", message, shown(key)))
    return probe, tuple(keys)


def _check_header(
    header: Mapping[str, TensorInfo],
    settings: _Settings,
    probe_keys: Sequence[str],
    problems: list[Problem],
) -> None:
    """Refuse tensors that neither the classifier nor an expert has, and those given twice."""
    prefixes = tuple(map(_prefix, settings.folders))
    known = frozenset(probe_keys)
    twice = Counter(without_prefixes(key) for key in header)
    for key in sorted(header):
        if key in known or key.startswith(prefixes):
            continue
        code = "duplicate_tensor" if twice[without_prefixes(key)] > 1 else "unread_tensor"
        problems.append(Problem(code, f"nothing reads tensor {shown(key)}", shown(key)))
