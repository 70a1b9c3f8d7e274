"""Files of tensors as an operator names them: what cannot be had is a StartupError."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from polyadapt.errors import StartupError
from polyadapt.watermark.mark_directory import BRANCHES_NAME, MarkDirectory


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a safetensors file by name; raises StartupError."""
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise StartupError(f"{path} cannot be read as safetensors: {error}") from None


def load_branches(mark: MarkDirectory, digest: str) -> dict[str, Tensor]:
    """Return the trained branches as they are stored, of the one module that has them; `digest`:
    the base's that they are for. Raises StartupError for another than they were trained on.
    """
    if digest != mark.config.base_model_hash:
        raise StartupError(
            f"the model is {digest}, the branches were trained on {mark.config.base_model_hash}; "
            "they mean nothing on another base"
        )
    stored = load_tensors(mark.path / BRANCHES_NAME)
    return {name.removeprefix(f"{mark.module}."): tensor for name, tensor in stored.items()}


def expect_empty(directory: Path) -> None:
    """Raise StartupError unless it is an empty directory, or nothing yet."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise StartupError(
            f"{directory} is not an empty directory; give one that need not exist yet"
        )
