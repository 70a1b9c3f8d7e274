"""GS-LoRA: one LoRA per forgetting task, laid end to end; a request chooses the tasks that apply.

y = W x + sum over the chosen tasks t of alpha_t / r_t * B_t A_t x. Every task was trained on the
base with all tasks before it, so all of them together are the trained model, and leaving one out
takes its forgetting back. Most groups (one task in one block) were driven to zero and pruned.

arXiv 2403.11530 and 2501.09705; bjzhb666/GS-LoRA:vit_pytorch_face/vit_face.py builds on loralib,
whose alpha is 1 unless it is given, so that the scale is 1 / r. The directory is our own;
`polyadapt convert` makes it of the original's models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

from polyadapt.adapters.adapter import Delta, Option
from polyadapt.adapters.deltas import SiteBase, low_rank
from polyadapt.adapters.peft_config import ConfigReader, is_number, is_rank
from polyadapt.adapters.peft_family import Module, PeftFamily, TensorForm
from polyadapt.adapters.peft_modules import beginnings
from polyadapt.errors import Problem
from polyadapt.types import BaseSpec, SiteSpec
from polyadapt_store.strict_json import shown

if TYPE_CHECKING:
    import torch

MAX_TASKS = 64
_MAX_NAME = 64  # characters
_TASK_KEYS = frozenset({"name", "r", "alpha", "pruned"})
_NOT_OF_A_TASK = "it belongs to no task, so that leaving out tasks would not take it back"


@dataclass(frozen=True, slots=True)
class _Task:
    """One entry of the config's `tasks`."""

    name: str
    rank: int
    alpha: float
    pruned: frozenset[str]  # paths of modules, or of what they lie in, that it leaves alone

    def has_pruned(self, path: str) -> bool:
        """Whether the module at `path` is one that the task leaves alone."""
        return not self.pruned.isdisjoint(beginnings(path))


@dataclass(frozen=True, slots=True)
class _Settings:
    """What a config says about the numbers.

    starts[t] is the first component of task t, in every module: one gate serves them all. Tasks
    that are pruned in few places come first, since only the last components of a module can be
    left out where it does not have them.
    """

    tasks: tuple[_Task, ...]
    starts: tuple[int, ...]

    @staticmethod
    def of(tasks: tuple[_Task, ...], base: BaseSpec) -> _Settings:
        """Lay out the tasks' components."""
        paths = [site.path for site in base.sites if site.kind == "linear"]
        num_pruned = [sum(map(task.has_pruned, paths)) for task in tasks]
        order = sorted(range(len(tasks)), key=lambda t: (num_pruned[t], t))
        starts = [0] * len(tasks)
        ends = accumulate((tasks[t].rank for t in order), initial=0)
        for t, start in zip(order, ends, strict=False):
            starts[t] = start
        return _Settings(tasks, tuple(starts))

    def end(self, t: int) -> int:
        """The component behind the last one of task t."""
        return self.starts[t] + self.tasks[t].rank


class GsLora(PeftFamily[_Settings]):
    """The family `gs_lora`. Its plan counts every stored group; those that turn out to be zero and
    lie last are dropped, so rank and num_elements are upper bounds.
    """

    name = "gs_lora"
    peft_types = frozenset({"GS_LORA"})
    summary = "forgetting tasks end to end, alpha / r each; a request chooses which of them apply"
    # By role, "a" or "b" with the task's number.
    forms: ClassVar = {
        f"{role}{t}": TensorForm(f"tasks.{t}.{name}", shape, is_optional=True)
        for t in range(MAX_TASKS)
        for role, name, shape in (
            ("a", "lora_A", (f"rank{t}", "in")),
            ("b", "lora_B", ("out", f"rank{t}")),
        )
    }
    read_keys = frozenset({"tasks"})
    training_keys = frozenset({"lora_dropout"})
    refused_keys: ClassVar = {
        "modules_to_save": _NOT_OF_A_TASK,
        "trainable_token_indices": _NOT_OF_A_TASK,
        "use_dora": "its row norms belong to one sum of tasks, and every choice would need its own",
    }

    def settings(self, reader: ConfigReader, base: BaseSpec) -> _Settings:
        """See PeftFamily.settings."""
        if reader.config.get("bias", "none") != "none":
            reader.refuse("bias", f"bias is not served: {_NOT_OF_A_TASK}")
        given = reader.config.get("tasks")
        if not isinstance(given, list) or not 1 <= len(given) <= MAX_TASKS:
            reader.invalid("tasks", given, f"a list of 1 to {MAX_TASKS} objects with name and r")
            return _Settings((), ())
        tasks = [_read_task(reader, f"tasks[{t}]", entry, base) for t, entry in enumerate(given)]
        names = [task.name for task in tasks if task is not None]
        for name in sorted({name for name in names if names.count(name) > 1}):
            reader.invalid("tasks", name, "every name once")
        return _Settings.of(tuple(task for task in tasks if task is not None), base)

    def shape(self, role: str, site: SiteSpec, settings: _Settings) -> tuple[int | str, ...]:
        """See PeftFamily.shape: the config gives each task its rank."""
        t = int(role[1:])
        if t >= len(settings.tasks):
            return self.forms[role].shape
        rank = settings.tasks[t].rank
        return (rank, "in") if role[0] == "a" else ("out", rank)

    def cell(self, module: Module, settings: _Settings) -> tuple[int, int]:
        """See PeftFamily.cell."""
        return max((settings.end(t) for t in _tasks_of(module, settings)), default=0), 0

    def delta(
        self,
        module: Module,
        tensors: Mapping[str, torch.Tensor],
        shared: Mapping[str, torch.Tensor],
        settings: _Settings,
        base: SiteBase,
    ) -> Delta:
        """See PeftFamily.delta: zeros stand for what is pruned before other components."""
        import torch

        kept = [
            t
            for t in _tasks_of(module, settings)
            if tensors[f"a{t}"].any() and tensors[f"b{t}"].any()
        ]
        rank = max((settings.end(t) for t in kept), default=0)
        a = torch.zeros(rank, module.site.in_features)
        b = torch.zeros(module.site.out_features, rank)
        for t in kept:
            task, start, end = settings.tasks[t], settings.starts[t], settings.end(t)
            a[start:end] = tensors[f"a{t}"]
            b[:, start:end] = tensors[f"b{t}"] * (task.alpha / task.rank)
        return low_rank(a, b)

    def traits(self, settings: _Settings) -> dict[str, Any]:
        """See PeftFamily.traits."""
        names = tuple(task.name for task in settings.tasks)
        ranges = tuple(zip(settings.starts, map(settings.end, range(len(names))), strict=True))
        what = "which forgetting tasks apply, all unless it says"
        return {"options": (Option("tasks", "words", what, names, names, components=ranges),)}

    def check(
        self,
        modules: Mapping[int, Module],
        settings: _Settings,
        base: BaseSpec,
        problems: list[Problem],
        notes: list[str],
    ) -> None:
        """See PeftFamily.check: a group is stored whole, or said to be pruned; and no task is
        pruned everywhere, as a gate as wide as its rank would be all that is left of it.
        """
        stored = {role for module in modules.values() for role in module.keys}
        for t, task in enumerate(settings.tasks) if modules else ():
            if f"a{t}" not in stored:
                problems.append(
                    Problem(
                        "missing_tensor",
                        f"the checkpoint holds no tensor of tasks[{t}], {shown(task.name)}; "
                        "leave it out of `tasks` if it was pruned everywhere",
                        "tasks",
                    )
                )
        for _, module in sorted(modules.items()):
            path = module.site.path
            for role in sorted(module.keys.keys() & self.forms.keys()):
                if int(role[1:]) >= len(settings.tasks):
                    problems.append(
                        Problem(
                            "config_mismatch",
                            f"{shown(module.keys[role])} is of task {role[1:]}, and `tasks` has "
                            f"{len(settings.tasks)}, counted from 0",
                            "tasks",
                        )
                    )
            for t, task in enumerate(settings.tasks) if module.has_own else ():
                found = [role for role in (f"a{t}", f"b{t}") if role in module.keys]
                if task.has_pruned(path) and found:
                    problems.append(
                        Problem(
                            "config_mismatch",
                            f"tasks[{t}].pruned names {path}, and the checkpoint holds "
                            f"{shown(module.keys[found[0]])}",
                            path,
                        )
                    )
                elif not task.has_pruned(path) and len(found) < 2:
                    missing = next(role for role in (f"a{t}", f"b{t}") if role not in found)
                    problems.append(
                        Problem(
                            "missing_tensor",
                            f"{path} has no {self.forms[missing].name} of task {shown(task.name)}, "
                            f"and tasks[{t}].pruned does not name it",
                            path,
                        )
                    )
        notes.append(
            "groups that are zero and lie behind all others of their module are dropped when it is "
            "loaded: sizes are upper bounds"
        )


def _tasks_of(module: Module, settings: _Settings) -> list[int]:
    """The tasks of which the module has both tensors."""
    return [t for t in range(len(settings.tasks)) if {f"a{t}", f"b{t}"} <= module.keys.keys()]


def _read_task(reader: ConfigReader, where: str, entry: Any, base: BaseSpec) -> _Task | None:
    """One entry of `tasks`; None with what is wrong added to the reader's problems."""
    before = len(reader.problems)
    if not isinstance(entry, dict):
        reader.invalid(where, entry, "an object with name and r")
        return None
    for key in sorted(entry.keys() - _TASK_KEYS):
        known = ", ".join(sorted(_TASK_KEYS))
        reader.invalid(f"{where}[{shown(key)}]", entry[key], f"no keys but {known}")
    name: Any = entry.get("name")
    rank: Any = entry.get("r")
    alpha: Any = entry.get("alpha", 1)
    is_name = isinstance(name, str) and 1 <= len(name) <= _MAX_NAME and name.isprintable()
    if not is_name:
        reader.invalid(f"{where}.name", name, f"a name of 1 to {_MAX_NAME} printable characters")
    if not is_rank(rank):
        reader.invalid(f"{where}.r", rank, "the rank of its matrices")
    if not is_number(alpha):
        reader.invalid(f"{where}.alpha", alpha, "a finite number")
    pruned = entry.get("pruned") or []
    if not isinstance(pruned, list) or any(not isinstance(path, str) for path in pruned):
        reader.invalid(f"{where}.pruned", pruned, "null or a list of paths of modules")
    if len(reader.problems) > before:
        return None
    known_paths = {path for site in base.sites for path in beginnings(site.path)}
    for path in pruned:
        if path not in known_paths:
            reader.problems.append(
                Problem(
                    "unknown_module",
                    f"{where}.pruned names {shown(path)}, and no module of the base {base.name} "
                    "has that path or lies below it",
                    f"{where}.pruned",
                )
            )
    return _Task(name, rank, float(alpha), frozenset(pruned))
