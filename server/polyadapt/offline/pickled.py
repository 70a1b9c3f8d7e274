"""Tensors out of any file that torch or safetensors wrote. The only place that opens a pickle, with
torch's own reader of bare tensors, and no part of a server.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from polyadapt.errors import StartupError
from polyadapt_store.strict_json import shown

PICKLES = (".bin", ".pt", ".pth")
_WRAPPERS = ("state_dict", "model_state_dict", "model")


def load_tensors(path: Path, ignored: Collection[str] = ()) -> dict[str, torch.Tensor]:
    """Return every tensor of the file by name; raises StartupError, also for a pickle that holds
    anything but tensors. Plain values under a name of `ignored` are left out.
    """
    if path.suffix == ".safetensors":
        return dict(_of_safetensors(path))
    if path.suffix not in PICKLES:
        raise StartupError(
            f"{path} is no file of weights, expected .safetensors, {', '.join(PICKLES)}"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises whatever the bytes make it raise
        first = str(error).strip().partition("\n")[0]
        raise StartupError(
            f"{path} cannot be read as bare tensors ({first}); it may hold code, which is never "
            "run here: write its state_dict with torch.save or safetensors where it was trained"
        ) from error
    while isinstance(loaded, Mapping) and len(loaded) == 1 and next(iter(loaded)) in _WRAPPERS:
        loaded = next(iter(loaded.values()))
    if not isinstance(loaded, Mapping) or not loaded:
        raise StartupError(f"{path} holds a {type(loaded).__name__}, expected tensors by name")
    loaded = {
        name: value
        for name, value in loaded.items()
        if isinstance(value, torch.Tensor) or name not in ignored
    }
    for name, value in loaded.items():
        if not isinstance(value, torch.Tensor):
            raise StartupError(
                f"{path} holds {shown(name)} of type {type(value).__name__}, expected tensors by "
                "name alone; save the model's state_dict"
            )
    return {str(name): value.detach() for name, value in loaded.items()}


def load_base(directory: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a transformers directory by name; raises StartupError."""
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("pytorch_model*.bin"))
    if not files:
        raise StartupError(f"{directory} holds no model.safetensors and no pytorch_model.bin")
    return {name: tensor for file in files for name, tensor in load_tensors(file).items()}


def _of_safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                yield name, file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise StartupError(f"{path} cannot be read as safetensors: {error}") from error
