"""One user's copy of a marked causal language model, for where the server is not: merged weights,
or an adapter of that user alone beside the base.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from polyadapt.errors import InvalidRequest, StartupError
from polyadapt.models.load import model_digest
from polyadapt.watermark.branches import Branches
from polyadapt.watermark.mark_directory import BRANCHES_NAME, MarkDirectory
from polyadapt.watermark.obfuscation import carry_linear, seed_of

BASE_DIR, ADAPTER_DIR = "base", "adapter"
_WEIGHTS = "adapter_model.safetensors"
LmForm = Literal["merged", "bundle"]


def export_lm(
    config: Mapping[str, Any],
    branches: Path,
    base_dir: Path,
    bits: NDArray[np.uint8],
    out: Path,
    *,
    form: LmForm | None,
    strength: float,
    rng: np.random.Generator,
) -> LmForm:
    """Write the copy and return its form. `config` and `branches` as a mark's directory has them.

    merged  the base's directory with W + B A in place of W, in the dtype of the checkpoint; of
            linear branches alone, and their form if None
    bundle  of linear branches `base` without a random part of the weights and `adapter`, a PEFT
            LoRA that brings it back; of hinges `adapter` alone, for the base as it is: they are not
            obfuscated, as a veto row is no part of a sum, and can be cut off

    Whatever positions the server applies the branches to, a copy has them at all. Raises
    StartupError for another base, InvalidRequest for a form that the branches do not have.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StartupError(f"{out} is not an empty directory; give one that need not exist yet")
    found = model_digest(base_dir)
    if found != config["base_model_hash"]:
        raise StartupError(
            f"the model is {found}, the branches were trained on {config['base_model_hash']}; they "
            "mean nothing on another base"
        )
    own = own_branches(config, _load(branches), bits)
    is_hinge = config["gate"] == "hinge"
    chosen: LmForm = form or ("bundle" if is_hinge else "merged")
    if is_hinge and chosen == "merged":
        raise InvalidRequest(
            "a hinge is not linear and cannot be folded into the weights; give the form bundle",
            param="form",
        )
    if chosen == "merged":
        _write_base(base_dir, out, {m: _product(own[m]) for m in own})
    elif is_hinge:
        _write_hinges(config, own, out / ADAPTER_DIR)
    else:
        carried = {m: carry_linear(_weight(base_dir, m), _as_branches(own[m]), strength, rng)
                   for m in own}  # fmt: skip
        _write_base(base_dir, out / BASE_DIR, {m: -c for m, (c, _) in carried.items()})
        _write_lora({m: (b.A, b.B_sum) for m, (_, b) in carried.items()}, out / ADAPTER_DIR)
    return chosen


def export_user(
    mark: MarkDirectory, base_dir: Path, user: str, out: Path, *, form: str | None, strength: float
) -> LmForm:
    """Write the copy of a user of a mark; see `export_lm`."""
    if form not in (None, "merged", "bundle"):
        raise InvalidRequest(
            f"the form {form} is of classifiers; give merged or bundle", param="form"
        )
    config, version = mark.config, mark.config.codebook["key_version"]
    return export_lm(
        asdict(config),
        mark.path / BRANCHES_NAME,
        base_dir,
        mark.codebook.row(user),
        out,
        form="merged" if form == "merged" else "bundle" if form == "bundle" else None,
        strength=strength,
        rng=seed_of(mark.secrets.key.derive("obfuscation", version, user)),
    )


def own_branches(
    config: Mapping[str, Any], stored: Mapping[str, Tensor], bits: NDArray[np.uint8]
) -> dict[str, dict[str, Tensor]]:
    """Return of every module what one user's copy has: A [n, rank, in], B [n, out, rank], and what
    belongs to a hinge as it is stored. The other value's branches are not in it.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        module, _, name = key.rpartition(".")
        modules.setdefault(module, {})[name] = tensor.float()
    rows = torch.arange(len(bits))
    index = torch.from_numpy(bits.astype(np.int64))
    for tensors in modules.values():
        B, fold = tensors["mark_B"], tensors.pop("mark_fold", None)
        if config["encoding"] == "pair":
            B = B[index, rows]
        elif config["encoding"] == "presence":
            B = B * index[:, None, None]
        elif fold is None:
            raise StartupError(
                "the branches have no mark_fold: it is in a base of the server's, which a copy is "
                "not made from; export from the mark as it was trained"
            )
        else:
            B = fold + (2 * index - 1)[:, None, None] * B
        tensors["mark_B"] = B.contiguous()
    return modules


def _as_branches(own: Mapping[str, Tensor]) -> Branches:
    B = own["mark_B"].transpose(0, 1).flatten(1)  # [out, n rank]
    return Branches(own["mark_A"].flatten(0, 1), None, B, torch.zeros_like(B)).requires_grad_(False)


def _product(own: Mapping[str, Tensor]) -> Tensor:
    branches = _as_branches(own)
    return branches.B_sum @ branches.A


def _write_hinges(
    config: Mapping[str, Any], own: Mapping[str, Mapping[str, Tensor]], out: Path
) -> None:
    out.mkdir(parents=True)
    tensors = {f"{module}.{name}": t for module, of in own.items() for name, t in of.items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, out / _WEIGHTS)
    # Of encoding presence and with every bit 1, which is what it does where nobody says otherwise.
    kept = ("format_version", "n_bits", "rank_per_bit", "gate", "task", "base_model_hash")
    written = {"peft_type": "MARKBOARD", "encoding": "presence", "obfuscation": None}
    written |= {name: config[name] for name in kept} | {"target_modules": sorted(own)}
    (out / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n")


def _write_lora(factors: Mapping[str, tuple[Tensor, Tensor]], out: Path) -> None:
    out.mkdir(parents=True)
    tensors = {}
    for module, (A, B) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.detach().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.detach().contiguous()
    save_file(tensors, out / _WEIGHTS)
    (rank,) = {len(A) for A, _ in factors.values()}
    written = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
               "target_modules": sorted(factors), "bias": "none"}  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(written, indent=2) + "\n")


def _write_base(base_dir: Path, out: Path, deltas: Mapping[str, Tensor]) -> None:
    """Copy the base's files with the weights of some modules changed."""
    out.mkdir(parents=True, exist_ok=True)
    missing = {f"{module}.weight": delta for module, delta in deltas.items()}
    for file in sorted(base_dir.iterdir()):
        if file.suffix == ".safetensors":
            tensors = _load(file)
            for name in tensors.keys() & missing.keys():
                weight = tensors[name]
                tensors[name] = (weight.float() + missing.pop(name)).to(weight.dtype)
            save_file(tensors, out / file.name, {"format": "pt"})
        elif file.is_file():
            shutil.copy(file, out / file.name)
    if missing:
        raise StartupError(f"{base_dir} has no {sorted(missing)[0]} in its safetensors files")


def _weight(base_dir: Path, module: str) -> Tensor:
    for file in sorted(base_dir.glob("*.safetensors")):
        tensors = _load(file)
        if f"{module}.weight" in tensors:
            return tensors[f"{module}.weight"].float()
    raise StartupError(f"{base_dir} has no {module}.weight in its safetensors files")


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise StartupError(f"{path} cannot be read as safetensors: {error}") from None
