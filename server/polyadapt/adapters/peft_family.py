"""What the families that PEFT writes have in common, so that one of them is its own mathematics.

A family names its tensors with their shapes, reads its own config keys, says what a cell takes and
makes a Delta of a module's tensors. Here is the rest: whose tensor is whose, whether config and
tensors agree, replaced biases, weights and token rows (modules_to_save, bias,
trainable_token_indices), and every problem at once. `plan` needs no torch.

Formats: huggingface/peft:src/peft/utils/save_and_load.py and src/peft/utils/other.py, 0.21.2.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from polyadapt.adapters.adapter import (
    AdapterPlan,
    BaseWeights,
    Delta,
    Option,
    TensorRead,
    Traits,
    keeps_keys_and_values,
)
from polyadapt.adapters.base_parts import (
    BASE_ENDINGS,
    BASE_ROLES,
    TiedRows,
    check_announced,
    check_base_parts,
    modules_own,
    replaced_parameters,
    tied_rows,
    token_indices,
    with_base_parts,
)
from polyadapt.adapters.deltas import (
    SiteBase,
    is_finite,
    joined,
    replaced_rows,
    to_float32,
    to_int64,
)
from polyadapt.adapters.peft_config import ConfigReader
from polyadapt.adapters.peft_modules import ModuleTargets, find_site, without_prefixes
from polyadapt.errors import AdapterRejected, Problem
from polyadapt.ops import cells
from polyadapt.types import BaseSpec, SiteSpec
from polyadapt_store.checkpoint import (
    INTEGER_SIZES,
    ITEM_SIZES,
    Checkpoint,
    TensorInfo,
)
from polyadapt_store.manifest import PEFT_FORM, FileForm
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch


class MisfitError(Exception):
    """A module's tensors do not fit the base or each other; the text says which and why."""


@dataclass(frozen=True, slots=True)
class TensorForm:
    """One kind of tensor of an adapted module.

    name: how it ends, without the adapter's name; shape: numbers, "in" and "out" of the site, and
    other words for sizes that the tensors of one module must agree on.
    """

    name: str
    shape: tuple[int | str, ...]
    kinds: tuple[str, ...] = ("linear",)  # of the sites that it may stand at
    is_optional: bool = False
    aliases: tuple[str, ...] = ()  # other names that it has had
    # Whole numbers, of which `delta` gets int64; PEFT stores them as float32 under Windows.
    is_index: bool = False


@dataclass(frozen=True, slots=True)
class Common:
    """What every config says beside a family's own settings."""

    bias: str  # none, all, or <something>_only
    targets: ModuleTargets
    saved_modules: tuple[str, ...]  # endings of the paths of modules that are replaced whole
    token_indices: Mapping[str, tuple[int, ...]]  # ending of an embedding's path -> token ids

    def saves(self, path: str) -> bool:
        """Whether the module, or one that it lies in, is replaced whole."""
        parts = path.split(".")
        parents = [".".join(parts[: end + 1]) for end in range(len(parts))]
        return any(parent.endswith(name) for name in self.saved_modules for parent in parents)


@dataclass(slots=True)
class Module:
    """One site's tensors: role -> tensor name, and the sizes that their shapes name."""

    site_id: int
    site: SiteSpec
    keys: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def has_own(self) -> bool:
        """Whether any tensor is the family's, and not a replaced parameter of the base."""
        return any(role not in BASE_ROLES for role in self.keys)


SettingsT = TypeVar("SettingsT")


class PeftFamily(Generic[SettingsT]):
    """A Family whose adapters are PEFT's; subclasses fill in what is marked with `->`."""

    name: ClassVar[str]  # -> the word for it in APIs
    peft_types: ClassVar[frozenset[str]]  # -> its spellings in `peft_type`
    summary: ClassVar[str]  # -> how it is served, for people
    scaling: ClassVar[str] = "yes"  # -> see Family; replaced parameters of the base apart
    overrides: ClassVar[int] = 0  # -> see Family
    files: ClassVar[tuple[FileForm, ...]] = (PEFT_FORM,)  # -> see Family
    forms: ClassVar[Mapping[str, TensorForm]] = {}  # -> by role
    shared_forms: ClassVar[Mapping[str, TensorForm]] = {}  # -> of tensors that no module owns
    # -> Config keys that `settings` reads, that only training reads, and that are refused if set.
    read_keys: ClassVar[frozenset[str]] = frozenset()
    training_keys: ClassVar[frozenset[str]] = frozenset()
    refused_keys: ClassVar[Mapping[str, str]] = {}
    foreign: ClassVar[Mapping[str, str]] = {}  # parts of tensor names of other families, and why
    target_key: ClassVar[str] = "target_modules"
    token_key: ClassVar[str] = "trainable_token_indices"
    may_be_empty: ClassVar[bool] = False  # whether a module's rank may be zero

    # ------------------------------------------------------------------ what a family fills in
    def settings(self, reader: ConfigReader, base: BaseSpec) -> SettingsT:
        """Read the family's own config keys; what is wrong goes to `reader.problems`."""
        raise NotImplementedError

    def shape(self, role: str, site: SiteSpec, settings: SettingsT) -> tuple[int | str, ...]:
        """The shape of a tensor, where the settings change what its form says."""
        return self.forms[role].shape

    def shared_shape(self, role: str, settings: SettingsT) -> tuple[int | str, ...] | None:
        """The shape of a tensor that no module owns; None: the settings say that it is not stored.

        A word is any size.
        """
        return self.shared_forms[role].shape

    def complete(
        self, shared: Mapping[str, torch.Tensor], settings: SettingsT
    ) -> Mapping[str, torch.Tensor]:
        """What `delta` gets as `shared`, made once of the tensors that are stored."""
        return shared

    def cell(self, module: Module, settings: SettingsT) -> tuple[int, int]:
        """Return rank and `parts` of the module's cell (ops/cells.py); raises MisfitError.

        module.sizes holds the words of its forms. Torch-free.
        """
        raise NotImplementedError

    def routing(self, module: Module, settings: SettingsT) -> cells.Routing | None:
        """How the module's components are weighed by the rows themselves; None: they are not.

        Asked for modules whose `cell` was made. Torch-free.
        """
        return None

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: SettingsT,
        base: SiteBase,
    ) -> Delta:
        """Make the module's Delta of its tensors by role, float32; raises MisfitError."""
        raise NotImplementedError

    def check(
        self,
        modules: Mapping[int, Module],
        settings: SettingsT,
        base: BaseSpec,
        problems: list[Problem],
        notes: list[str],
    ) -> None:
        """Compare settings and modules beyond what is done for all families."""

    def targets(self, settings: SettingsT, base: BaseSpec) -> set[int]:
        """Sites that the family adapts beside those that target_modules selects."""
        return set()

    def replaced_whole(
        self, modules: Mapping[int, Module], settings: SettingsT, base: BaseSpec
    ) -> tuple[str, ...]:
        """Paths of modules whose stored parameters replace the base's though no key says so."""
        return ()

    def multiplies(self, settings: SettingsT) -> bool:
        """Whether what is added is a multiple of the base's own weight: it cannot be scaled, and no
        other adapter can multiply the same weight.
        """
        return False

    def places(self, settings: SettingsT, base: BaseSpec) -> dict[str, int]:
        """Paths below which a checkpoint holds tensors -> the site that they serve."""
        return {s.path: site_id for site_id, s in enumerate(base.sites) if s.kind != "experts"}

    def traits(self, settings: SettingsT) -> dict[str, Any]:
        """Fields of Traits that follow from the settings."""
        return {}

    # ------------------------------------------------------------------ a Family
    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether PEFT's name for the adapter is one of this family's."""
        given = config.get("peft_type")
        return isinstance(given, str) and given in self.peft_types

    def plan(
        self, config: Mapping[str, Any], header: Mapping[str, TensorInfo], base: BaseSpec
    ) -> AdapterPlan:
        """See Family.plan."""
        return self._draft(config, header, base).plan

    def read(
        self,
        config: Mapping[str, Any],
        checkpoint: Checkpoint,
        base: BaseSpec,
        weights: BaseWeights,
    ) -> dict[int, Delta]:
        """See Family.read.

        A replaced parameter becomes the difference to the base's. A stored copy of an embedding or
        head that modules_to_save does not name must equal the base's in the base's dtype, and is
        dropped.
        """
        draft = self._draft(config, checkpoint.header, base)
        broken: list[Problem] = []  # tensors; no Delta is made once there are any
        misfits: list[Problem] = []
        reads: dict[int, list[TensorRead]] = {}
        for read in draft.plan.reads:
            reads.setdefault(read.site_id, []).append(read)
        shared = self._tensors(reads.pop(-1, []), checkpoint, broken)
        complete = shared if broken else self.complete(shared, draft.settings)
        token_rows: dict[int, torch.Tensor] = {}
        deltas: dict[int, Delta] = {}
        # Module by module: a read that takes long gives way whenever it takes a tensor.
        for site_id, own in reads.items():
            tensors = self._tensors(own, checkpoint, broken)
            if "token_rows" in tensors:
                token_rows[site_id] = tensors["token_rows"]
            if not broken:
                module, site_base = draft.modules[site_id], SiteBase(site_id, weights)
                delta = self._checked_delta(module, tensors, complete, draft, site_base, misfits)
                if delta is not None:
                    deltas[site_id] = delta
        for key in checkpoint.drained():
            broken.append(Problem("unread_tensor", f"nothing reads tensor {shown(key)}", key))
        problems = broken + misfits
        if not problems:
            for site_id, rows in draft.tied_rows.items():
                deltas[site_id] = joined(
                    deltas.get(site_id),
                    replaced_rows(
                        base.sites[site_id], rows.token_ids, token_rows[rows.site_id],
                        SiteBase(site_id, weights),
                    ),
                )  # fmt: skip
        if problems:
            raise AdapterRejected(problems)
        return deltas

    def read_probe(
        self, config: Mapping[str, Any], checkpoint: Checkpoint, base: BaseSpec
    ) -> tuple[torch.Tensor, ...]:
        """See Family.read_probe: PEFT's own families have none."""
        return ()

    # ------------------------------------------------------------------ the plan
    def _draft(
        self, config: Mapping[str, Any], header: Mapping[str, TensorInfo], base: BaseSpec
    ) -> _Draft[SettingsT]:
        problems: list[Problem] = []
        notes: list[str] = []
        reader = ConfigReader(config, problems, notes)
        reader.judge(
            read=self.read_keys | _COMMON_KEYS | {self.target_key},
            training=self.training_keys,
            refused=self.refused_keys,
        )
        note_origin(config, base, notes)
        common = self._common(reader)
        settings = self.settings(reader, base)
        is_config_sound = not problems
        modules, shared = self._sort(header, settings, base, problems)
        if common is not None:
            saved = (*common.saved_modules, *self.replaced_whole(modules, settings, base))
            common = replace(common, saved_modules=saved)
        shapes: dict[int, tuple[int, int]] = {}
        for module in modules.values():
            if self._measure(module, header, settings, problems) and is_config_sound:
                self._shape(module, common, settings, shapes, problems)
        self._check_shared(shared, header, modules, settings, problems)
        own = {site_id for site_id, module in modules.items() if module.has_own}
        if not own and not problems and not self._may_be_bare():
            names = " and ".join(f.name.removesuffix(".weight") for f in self._required())
            problems.append(Problem("no_tensors", f"the checkpoint holds no {names}"))
        tied: dict[int, TiedRows] = {}
        if is_config_sound:
            assert common is not None
            self._check_common(modules, own, common, settings, base, problems, notes)
            self.check(modules, settings, base, problems, notes)
            tied = tied_rows(modules, common, base, shapes)
            check_announced(modules, common, self.token_key, problems)
        if problems:
            raise AdapterRejected(problems)
        assert common is not None
        reads = [TensorRead(key, -1, role) for role, key in sorted(shared.items())]
        for site_id, module in sorted(modules.items()):
            reads += [TensorRead(key, site_id, role) for role, key in module.keys.items()]
        return _Draft(
            settings,
            common,
            modules,
            tied,
            self._plan(base, modules, shapes, common, tied, settings, reads, notes),
        )

    def _plan(
        self,
        base: BaseSpec,
        modules: Mapping[int, Module],
        shapes: Mapping[int, tuple[int, int]],
        common: Common,
        tied: Mapping[int, TiedRows],
        settings: SettingsT,
        reads: list[TensorRead],
        notes: list[str],
    ) -> AdapterPlan:
        multiplies = self.multiplies(settings)
        replaced = replaced_parameters(modules, shapes, common, base, tied, multiplies=multiplies)
        routings = {
            site_id: self.routing(module, settings)
            for site_id, module in modules.items()
            if site_id in shapes and module.has_own
        }
        codes = {site_id: of.code for site_id, of in routings.items() if of is not None}
        num_elements = sum(
            cells.num_elements(
                base.sites[s].in_features, base.sites[s].out_features, *shape, codes.get(s, 0)
            )
            for s, shape in shapes.items()
        )
        paths = [base.sites[site_id].path for site_id in shapes if modules_own(modules, site_id)]
        ranks = [r // (base.sites[site_id].num_experts or 1) for site_id, (r, _) in shapes.items()]
        traits = Traits(
            is_scalable=not replaced,
            is_kv_neutral=keeps_keys_and_values(shapes, base),
            replaced=replaced,
            is_scaling=any(parts & cells.OUT_SCALE for _, parts in shapes.values()),
            **self.traits(settings),
        )
        return AdapterPlan(
            family=self.name,
            rank=max(ranks, default=0),
            target_modules=tuple(sorted({path.rpartition(".")[2] for path in paths})),
            num_elements=num_elements,
            reads=tuple(reads),
            notes=(*notes, *map(_note_option, traits.options)),
            traits=traits,
        )

    def _common(self, reader: ConfigReader) -> Common | None:
        before = len(reader.problems)
        bias = reader.config.get("bias", "none")
        allowed = ("none", "all", *(f"{name}_only" for name in self._bias_names()))
        if not isinstance(bias, str) or bias not in allowed:
            reader.invalid("bias", bias, ", ".join(allowed[:-1]) + f" or {allowed[-1]}")
        targets = ModuleTargets.read(
            {**reader.config, "target_modules": reader.config.get(self.target_key)}, reader.problems
        )
        saved = reader.words("modules_to_save")
        indices = token_indices(reader, self.token_key)
        if len(reader.problems) > before or targets is None:
            return None
        return Common(str(bias), targets, saved, indices)

    def _bias_names(self) -> tuple[str, ...]:
        return (self.name,)

    @functools.cached_property
    def _endings(self) -> dict[tuple[str, ...], str]:
        """The end of a tensor's name -> its role. Old files still carry the adapter's name."""
        endings = dict(BASE_ENDINGS)
        for role, form in self.forms.items():
            for name in (form.name, *form.aliases):
                parts = tuple(name.split("."))
                split = len(parts) - (parts[-1] in ("weight", "bias"))
                endings[parts] = role
                endings[(*parts[:split], "default", *parts[split:])] = role
        return endings

    def _required(self) -> list[TensorForm]:
        forms = list(self.forms.values())
        return ([form for form in forms if not form.is_optional] or forms)[:2]

    def _is_index(self, role: str) -> bool:
        form = self.forms.get(role) or self.shared_forms.get(role)
        return form is not None and form.is_index

    def _sort(
        self,
        header: Mapping[str, TensorInfo],
        settings: SettingsT,
        base: BaseSpec,
        problems: list[Problem],
    ) -> tuple[dict[int, Module], dict[str, str]]:
        """Return site id -> module for every tensor that has a place, and role -> name of those
        that no module owns.
        """
        site_ids = self.places(settings, base)
        shared_names = {form.name: role for role, form in self.shared_forms.items()}
        endings, longest = self._endings, max(map(len, self._endings))
        modules: dict[int, Module] = {}
        shared: dict[str, str] = {}
        for key in sorted(header):
            bare = without_prefixes(key)
            if bare in shared_names:
                shared[shared_names[bare]] = key
                continue
            parts = key.split(".")
            ending = next((n for n in range(longest, 0, -1) if tuple(parts[-n:]) in endings), 0)
            split = len(parts) - ending
            path, role = ".".join(parts[:split]), endings.get(tuple(parts[split:]), "")
            site_id = find_site(path, site_ids) if role else None
            reason = next((self.foreign[part] for part in parts if part in self.foreign), None)
            if site_id is None and (reason is not None or not role):
                problems.append(
                    Problem(
                        "unread_tensor",
                        f"nothing reads tensor {shown(key)}: "
                        f"{reason or f'its name is none of {self.name}'}",
                        shown(key),
                    )
                )
            elif site_id is None:
                problems.append(
                    Problem(
                        "unknown_module",
                        f"tensor {shown(key)} belongs to module {shown(path)}, which the base "
                        f"{base.name} ({base.architecture}) does not have as one that adapters "
                        "can change",
                        shown(key),
                    )
                )
            else:
                module = modules.setdefault(site_id, Module(site_id, base.sites[site_id]))
                self._take(module, role, key, problems)
        return {s: module for s, module in modules.items() if module.keys}, shared

    def _take(self, module: Module, role: str, key: str, problems: list[Problem]) -> None:
        if role in module.keys:
            problems.append(
                Problem(
                    "duplicate_tensor",
                    f"tensors {shown(module.keys[role])} and {shown(key)} are the same "
                    f"part of {module.site.path}",
                    shown(key),
                )
            )
        elif (misfit := self._misfit(role, module.site)) is not None:
            problems.append(Problem("unread_tensor", f"{shown(key)}: {misfit}", shown(key)))
        else:
            module.keys[role] = key

    def _misfit(self, role: str, site: SiteSpec) -> str | None:
        """Why a tensor of this role has no meaning at this module, or None."""
        if role in BASE_ROLES and site.kind == "experts":
            return f"{site.path} can be adapted and not be replaced"
        if role == "new_bias":
            return None if site.has_bias else f"{site.path} of the base has no bias to replace"
        if role == "new_weight":
            return None
        if role == "token_rows":
            is_table = site.kind == "embedding" or site.kind == "linear"
            return None if is_table else f"{site.path} has no rows of tokens"
        form = self.forms[role]
        if site.kind in form.kinds:
            return None
        if not any(site.kind in form.kinds for form in self.forms.values()):
            if site.kind == "norm":
                return f"{site.path} is a normalisation; only its weight and bias can be replaced"
            return f"{site.path} is of kind {site.kind}, which {self.name} does not adapt"
        names = [f.name for f in self.forms.values() if site.kind in f.kinds and not f.is_optional]
        return f"{site.path} is of kind {site.kind} and takes {' and '.join(names)}"

    def _measure(
        self,
        module: Module,
        header: Mapping[str, TensorInfo],
        settings: SettingsT,
        problems: list[Problem],
    ) -> bool:
        """Check partners and shapes of one module and fill in its sizes; whether all is well."""
        site, before = module.site, len(problems)
        own = [role for role in module.keys if role not in BASE_ROLES]
        for role, form in self.forms.items() if own else ():
            if site.kind in form.kinds and not form.is_optional and role not in module.keys:
                present = shown(module.keys[own[0]])
                problems.append(
                    Problem(
                        "missing_tensor", f"{site.path} has {present} and no {form.name}", present
                    )
                )
        sizes = {"in": site.in_features, "out": site.out_features}
        for role, key in module.keys.items():
            self._check_dtype(role, key, header, problems)
            given = header[key].shape
            wanted = self._shape_of(role, site, settings)
            fits = len(given) == len(wanted)
            for word, size in zip(wanted, given, strict=False):
                expected = word if isinstance(word, int) else sizes.setdefault(word, size)
                fits = fits and size == expected
            if 0 in given and fits and not self.may_be_empty:
                problems.append(
                    Problem(
                        "invalid_rank",
                        f"{shown(key)} is empty: its shape is {list(given)}; a partitioned export "
                        "must be gathered before it is saved",
                        shown(key),
                    )
                )
            elif not fits:
                named = [
                    str(word if isinstance(word, int) else sizes.get(word, word)) for word in wanted
                ]
                problems.append(
                    Problem(
                        "shape_mismatch",
                        f"{shown(key)} has shape {list(given)}, {site.path} of the base needs "
                        f"[{', '.join(named)}]",
                        shown(key),
                    )
                )
        module.sizes = sizes
        return len(problems) == before

    def _check_dtype(
        self, role: str, key: str, header: Mapping[str, TensorInfo], problems: list[Problem]
    ) -> None:
        dtype = header[key].dtype
        if dtype in INTEGER_SIZES and not self._is_index(role):
            expected = ", ".join(ITEM_SIZES)
            problems.append(
                Problem(
                    "unsupported_dtype",
                    f"{shown(key)} has dtype {dtype}, expected one of {expected}",
                    shown(key),
                )
            )

    def _shape_of(self, role: str, site: SiteSpec, settings: SettingsT) -> tuple[int | str, ...]:
        if role == "new_bias":
            return ("out",)
        if role == "new_weight":
            if site.kind == "norm":
                return ("out",)
            return ("in", "out") if site.kind == "embedding" else ("out", "in")
        if role == "token_rows":
            return ("tokens", "out" if site.kind == "embedding" else "in")
        return self.shape(role, site, settings)

    def _shape(
        self,
        module: Module,
        common: Common | None,
        settings: SettingsT,
        shapes: dict[int, tuple[int, int]],
        problems: list[Problem],
    ) -> None:
        """Note what the module's cell takes."""
        assert common is not None
        rank = parts = 0
        if module.has_own:
            try:
                rank, parts = self.cell(module, settings)
            except MisfitError as error:
                problems.append(
                    Problem("shape_mismatch", f"{module.site.path}: {error}", module.site.path)
                )
                return
        if "new_bias" in module.keys:
            parts |= cells.BIAS
        if "new_weight" in module.keys and common.saves(module.site.path):
            parts |= cells.WEIGHT if module.site.kind == "norm" else cells.DENSE
        rank += module.sizes.get("tokens", 0)
        if rank or parts:
            shapes[module.site_id] = (rank, parts)

    def _check_shared(
        self,
        shared: Mapping[str, str],
        header: Mapping[str, TensorInfo],
        modules: Mapping[int, Module],
        settings: SettingsT,
        problems: list[Problem],
    ) -> None:
        for role, form in self.shared_forms.items():
            wanted = self.shared_shape(role, settings)
            if role not in shared:
                is_wanted = not form.is_optional and wanted is not None
                if is_wanted and any(m.has_own for m in modules.values()):
                    problems.append(
                        Problem("missing_tensor", f"the checkpoint has no {form.name}", form.name)
                    )
                continue
            self._check_dtype(role, shared[role], header, problems)
            given = header[shared[role]].shape
            if wanted is None:
                problems.append(
                    Problem(
                        "config_mismatch",
                        f"the checkpoint holds {shown(shared[role])}, and adapter_config.json says "
                        "that it is not stored",
                        shown(shared[role]),
                    )
                )
                continue
            pairs = zip(wanted, given, strict=False)
            is_equal = all(word == size for word, size in pairs if isinstance(word, int))
            if len(given) != len(wanted) or 0 in given or not is_equal:
                problems.append(
                    Problem(
                        "shape_mismatch",
                        f"{shown(shared[role])} has shape {list(given)}, expected "
                        f"[{', '.join(map(str, wanted))}]",
                        shown(shared[role]),
                    )
                )

    def _may_be_bare(self) -> bool:
        """Whether a checkpoint may hold replaced parameters of the base alone."""
        return not self.forms

    def _check_common(
        self,
        modules: Mapping[int, Module],
        own: set[int],
        common: Common,
        settings: SettingsT,
        base: BaseSpec,
        problems: list[Problem],
        notes: list[str],
    ) -> None:
        """Compare what the config announces with the tensors that are there."""
        kinds = {kind for form in self.forms.values() for kind in form.kinds}
        targeted = {
            site_id
            for site_id, site in enumerate(base.sites)
            if site.kind in kinds and common.targets.selects(site, base)
        } | self.targets(settings, base)
        for site_id in sorted(own - targeted):
            path = base.sites[site_id].path
            problems.append(
                Problem(
                    "not_targeted",
                    f"the checkpoint adapts {path}, {self.target_key} and its companions in "
                    "adapter_config.json do not select it",
                    path,
                )
            )
        for site_id, module in sorted(modules.items()):
            check_base_parts(module, site_id in targeted, common, base, self.token_key, problems)
        left = sorted(base.sites[site_id].path for site_id in targeted - own)
        if left and own:
            more = f" and {len(left) - 5} more" if len(left) > 5 else ""
            notes.append(
                f"no tensors for {', '.join(left[:5])}{more}, which {self.target_key} selects; "
                "they stay as in the base"
            )

    # ------------------------------------------------------------------ the numbers
    def _tensors(
        self, reads: Sequence[TensorRead], checkpoint: Checkpoint, problems: list[Problem]
    ) -> dict[str, torch.Tensor]:
        """Take tensors by role, without those that no product may meet."""
        found: dict[str, torch.Tensor] = {}
        for read in reads:
            raw = checkpoint.take(read.key)
            tensor = to_int64(raw) if raw.dtype in INTEGER_SIZES else to_float32(raw)
            if not is_finite(tensor):
                problems.append(_non_finite(shown(read.key)))
            elif not self._is_index(read.role):
                found[read.role] = tensor
            elif (tensor != tensor.trunc()).any():
                problems.append(_not_whole(shown(read.key)))
            else:
                found[read.role] = tensor.long()
        return found

    def _checked_delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        draft: _Draft[SettingsT],
        base: SiteBase,
        problems: list[Problem],
    ) -> Delta | None:
        """The module's Delta; None where it changes nothing, or has a problem."""
        try:
            delta = None
            if module.has_own:
                delta = self.delta(module, tensors, shared, draft.settings, base)
            delta = with_base_parts(delta, module, tensors, draft.common, base, problems)
        except MisfitError as error:
            problems.append(Problem("shape_mismatch", str(error), module.site.path))
            return None
        if delta is None or not (delta.a.shape[0] or delta.tails):
            return None
        blocks = [delta.b, *(tensor for _, tensor in delta.tails)]
        if all(delta.a is not tensor for tensor in tensors.values()):
            blocks.append(delta.a)
        if not all(map(is_finite, blocks)):
            problems.append(_non_finite(f"{module.site.path}: B times the scale"))
        return delta


@dataclass(frozen=True, slots=True)
class _Draft(Generic[SettingsT]):
    settings: SettingsT
    common: Common
    modules: Mapping[int, Module]
    tied_rows: Mapping[int, TiedRows]  # by the head's site id
    plan: AdapterPlan


_COMMON_KEYS = frozenset(
    {
        *("bias", "modules_to_save", "trainable_token_indices", "target_modules"),
        *("exclude_modules", "layers_to_transform", "layers_pattern"),
    }
)


def note_origin(config: Mapping[str, Any], base: BaseSpec, notes: list[str]) -> None:
    """Note what the adapter was trained on and for, where it is served on or as something else."""
    origin = config.get("base_model_name_or_path")
    if origin and origin != base.name:
        notes.append(f"trained on {shown(origin)}, served on {base.name}; all shapes agree")
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        notes.append(f"task_type {shown(task)} is served as CAUSAL_LM")


def _note_option(option: Option) -> str:
    return f"a request may choose {option.name}, {option.summary}: {option.expected}"


def _non_finite(what: str) -> Problem:
    return Problem("non_finite", f"tensor {what} holds NaN or infinity", what)


def _not_whole(what: str) -> Problem:
    return Problem("invalid_index", f"tensor {what} holds numbers that are no whole ones", what)
