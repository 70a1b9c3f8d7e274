"""Files in, a directory that can be uploaded out. Knows no format; those are the families'."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from polyadapt.adapters.families.conversion import Conversion, Given, Stored
from polyadapt.adapters.families.conversions import CONVERSIONS
from polyadapt.adapters.registry import read_config
from polyadapt.errors import AdapterRejected, StartupError
from polyadapt.offline.pickled import PICKLES, load_tensors
from polyadapt_store.manifest import CONFIG_NAME, WEIGHTS_NAME

# The weights of a directory, by who wrote it; the first that is there is meant.
_WEIGHTS = (
    *(WEIGHTS_NAME, "adapter_model.bin", "pytorch_model.bin", "model.safetensors"),
    *("pytorch_lora_weights.safetensors", "branches.safetensors"),
)


def read_source(path: Path, name: str = "pickle") -> Stored:
    """Read what conversion `name` takes: weights and, if it is there, the config beside them, or a
    series of files; raises StartupError.
    """
    conversion = _conversion(name)
    if conversion.is_series:
        files = [path] if path.is_file() else _series_of(path)
        for file, other in combinations(files, 2):
            if file.stem == other.stem:
                raise StartupError(
                    f"{file.name} and {other.name} are both {file.stem} of the series; leave one"
                )
        return Stored({}, series={file.stem: load_tensors(file) for file in files})
    weights = _weights_of(path)
    config: Mapping[str, Any] | None = None
    beside = weights.parent / conversion.config_name
    if beside.is_file():
        try:
            config = read_config(beside)
        except AdapterRejected as error:
            raise StartupError(f"{beside} cannot be read: {error.message}") from error
    return Stored(load_tensors(weights, conversion.ignored), config)


def convert(name: str, source: Stored, given: Given, out: Path, *, force: bool) -> tuple[str, ...]:
    """Write the directory `out` and return notes for people.

    Raises StartupError before anything is written, also when `out` holds files and not `force`.
    """
    conversion = _conversion(name)
    if out.exists() and not out.is_dir():
        raise StartupError(f"{out} is a file; give a directory that need not exist yet")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise StartupError(f"{out} is not empty; give another directory, or --force to write there")
    made = conversion.convert(source, given)
    # Copies: a state_dict may hold one tensor under two names, which safetensors does not store.
    tensors = {key: tensor.clone().contiguous() for key, tensor in made.tensors.items()}
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / WEIGHTS_NAME)
        text = json.dumps(made.config, indent=2, sort_keys=True)
        (out / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise StartupError(f"{out} cannot be written: {error.strerror}") from error
    return made.notes


def _conversion(name: str) -> Conversion:
    if name not in CONVERSIONS:
        known = ", ".join(f"{c.name} ({c.summary})" for c in CONVERSIONS.values())
        raise StartupError(f"--from is {name}, expected one of: {known}")
    return CONVERSIONS[name]


def _series_of(path: Path) -> list[Path]:
    if not path.is_dir():
        raise StartupError(
            f"{path} does not exist; give the directory of the files, or one of them"
        )
    found = sorted(file for file in path.iterdir() if file.suffix in (*PICKLES, ".safetensors"))
    if not found:
        raise StartupError(f"{path} holds no file of weights")
    return found


def _weights_of(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise StartupError(f"{path} does not exist; give an adapter's directory or its weights")
    for name in _WEIGHTS:
        if (path / name).is_file():
            return path / name
    found = sorted(file for file in path.iterdir() if file.suffix in PICKLES)
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise StartupError(
            f"{path} holds {names} of the files of weights; name the one that is meant"
        )
    return found[0]
