"""The whole models that GS-LoRA's trainer left, one per forgetting task, made into one adapter.

Every file holds a task's lora_A and lora_B beside the weights of all modules. Saved in eval mode,
as its trainer does, a weight already holds the update of the task beside it: the adapter is A and B
on the base of before the first task, and what each weight holds is looked at, so that no update
counts twice.

bjzhb666/GS-LoRA:train/train_own_forget_cl.py and util/utils.py (reinitialize_lora_parameters), on
microsoft/LoRA:loralib/layers.py (Linear.eval, whose alpha is 1 unless it is given). Offline only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from polyadapt.adapters.families.conversion import (
    PEFT_PREFIX,
    Converted,
    Given,
    Stored,
    leave_out,
    modules_of,
    plain,
)
from polyadapt.errors import StartupError

if TYPE_CHECKING:
    import torch

_OWN = ("lora_A", "lora_B")
_NUMBER = re.compile(r"(\d+)$")
_NAME = re.compile(r"(?:.*_)?(task_\d+)$")
# What adding and taking away an update at every change of mode leaves behind, as a part of the
# largest weight and of the largest update; an update below a few of it proves nothing.
_TOLERANCE = 1e-5


def from_tasks(source: Stored, given: Given) -> Converted:
    """`<module>.lora_A [r, in]` and `.lora_B [out, r]` of every file, task after task."""
    series = _in_order(source.series)
    alpha = 1.0 if given.alpha is None else given.alpha
    tensors: dict[str, torch.Tensor] = {}
    tasks: list[dict[str, Any]] = []
    notes: list[str] = []
    base = _Base(given)
    paths: list[str] = []
    for t, (name, stored) in enumerate(series):
        modules = modules_of(stored, _OWN)
        if t and sorted(modules) != paths:
            raise StartupError(f"{name} has lora_A in other modules than {series[0][0]}")
        paths = sorted(modules)
        ranks = {len(parts["lora_A"]) for parts in modules.values()}
        rank = given.rank or max(ranks)
        if ranks != {rank}:
            raise StartupError(f"{name} holds ranks {sorted(ranks)}, expected {rank} everywhere")
        left_out = leave_out(stored, modules, (*_OWN, "weight"), given, may_replace_norms=False)[1]
        notes += [f"{name}: {note}" for note in left_out]
        base.pass_task(name, stored.tensors, modules, alpha / rank)
        pruned = [path for path in paths if not all(part.any() for part in modules[path].values())]
        if pruned == paths:
            notes.append(f"{name} changes nothing and was left out")
            continue
        for path in paths:
            for part, tensor in modules[path].items() if path not in pruned else ():
                tensors[f"{PEFT_PREFIX}{path}.tasks.{len(tasks)}.{part}"] = tensor
        tasks.append({"name": _task_name(name), "r": rank, "alpha": plain(alpha), "pruned": pruned})
    if not tensors:
        raise StartupError("every lora_A or lora_B of the source is zero: no task changes anything")
    if given.alpha is None:
        notes.append("alpha is taken to be 1, loralib's default, so the scale is 1 / r; --alpha")
    config = {"peft_type": "GS_LORA", "target_modules": paths, "tasks": tasks}
    return Converted(tensors, config, (*notes, *base.notes))


class _Base:
    """The base's weights as they are before each task; judges what a file's own weights hold."""

    def __init__(self, given: Given) -> None:
        self._given = given
        self._current: dict[str, torch.Tensor] = {}  # with all earlier tasks, float64
        self.notes: list[str] = []
        if given.base is None:
            if given.is_merged is not None:
                raise StartupError(
                    "what the weights of the source hold is looked at beside the base; give --base"
                )
            self.notes.append(
                "nothing was compared with the base: the adapter is for the base of before the "
                "first of its tasks, and would count twice on one that holds them"
            )

    def pass_task(
        self,
        name: str,
        tensors: Mapping[str, torch.Tensor],
        modules: Mapping[str, Mapping[str, torch.Tensor]],
        scale: float,
    ) -> None:
        """Compare the weights of a task's file with what they can be, and go on behind the task.

        Raises StartupError for weights that are neither those before the task nor those after it,
        and where it cannot be told whether the base holds the task already.
        """
        if self._given.base is None:
            return
        # Modules whose weight in the file holds the update, or does not.
        after: list[str] = []
        before: list[str] = []
        for path, parts in modules.items():
            key = f"{path}.weight"
            current = self._before(path, key)
            update = scale * parts["lora_B"].double() @ parts["lora_A"].double()
            if update.shape != current.shape:
                raise StartupError(
                    f"{path} has an update of shape {list(update.shape)} and a weight of shape "
                    f"{list(current.shape)} in the base"
                )
            self._current[path] = current + update
            if key not in tensors:
                raise StartupError(
                    f"{name} holds no {key}: whether the base holds the task already cannot be "
                    "told; leave --base out if it does not"
                )
            weight, size = tensors[key].double(), float(update.abs().max())
            tolerance = _TOLERANCE * max(size, float(weight.abs().max()))
            is_after = float((weight - current - update).abs().max()) <= tolerance
            is_before = float((weight - current).abs().max()) <= tolerance
            if not is_after and not is_before:
                raise StartupError(
                    f"{key} of {name} is neither the base's with the tasks so far nor that without "
                    "the last of them: the files of earlier tasks are missing, or the base is not "
                    "that of before the first task"
                )
            if size > 4 * tolerance:
                (after if is_after else before).append(path)
        self._judge(name, after, before)

    def _before(self, path: str, key: str) -> torch.Tensor:
        assert self._given.base is not None
        if path not in self._current:
            if key not in self._given.base:
                raise StartupError(f"the base has no {key}; give the base that was trained on")
            self._current[path] = self._given.base[key].double()
        return self._current[path]

    def _judge(self, name: str, after: list[str], before: list[str]) -> None:
        asked = self._given.is_merged
        if after and before:
            raise StartupError(
                f"{name} holds its update in {after[0]}.weight and not in {before[0]}.weight; it "
                "was put together from several models"
            )
        if after and asked is False:
            raise StartupError(
                f"the weights of {name} hold its update, which --unmerged denies; leave it out"
            )
        if before and asked is None:
            raise StartupError(
                f"the base's weights are those of {name}: either that was saved while training, "
                "then give --unmerged, or this base holds the task already, which would count "
                "twice, then give the base of before the task"
            )
        if before and asked:
            raise StartupError(
                f"the base's weights are those of {name}, which hold its update by --merged: on "
                "this base it would count twice; give the base of before the task"
            )


def _in_order(series: Mapping[str, Mapping[str, torch.Tensor]]) -> list[tuple[str, Stored]]:
    """The files by the numbers at the end of their names."""
    numbers = {name: _NUMBER.search(name) for name in series}
    if len(series) > 1:
        for name, number in numbers.items():
            if number is None:
                raise StartupError(
                    f"{name} has no number at its end, such as Backbone_task_1: the order of "
                    "the tasks is in the names of their files"
                )
    found = {name: int(number[1]) if number else 0 for name, number in numbers.items()}
    order = sorted(series, key=found.__getitem__)
    return [(name, Stored(series[name])) for name in order]


def _task_name(name: str) -> str:
    found = _NAME.match(name)
    return found[1] if found else name[-64:]
