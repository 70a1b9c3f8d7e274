"""Labelled inputs from a safetensors file, or the packaged handwritten digits. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from polyadapt.errors import StartupError

# 1,797 images of 8x8 pixels, 0 to 16: the test part of E. Alpaydin and C. Kaynak, "Optical
# Recognition of Handwritten Digits" (1998), UCI, CC BY 4.0; shuffled once, so that the writers of
# the held-out images are among those of the others.
_DIGITS = Path(__file__).parent / "data" / "digits.safetensors"
_DIGITS_TRAIN = 1000


@dataclass(frozen=True, slots=True)
class Dataset:
    """Inputs [rows, size] and labels [rows]; the held-out part is never trained on."""

    inputs: NDArray[np.float32]
    labels: NDArray[np.int64]
    num_train: int

    @property
    def train(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The inputs and labels to train with."""
        return self.inputs[: self.num_train], self.labels[: self.num_train]

    @property
    def held_out(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The inputs and labels to measure with."""
        return self.inputs[self.num_train :], self.labels[self.num_train :]


def load_digits() -> Dataset:
    """Return the packaged digits, scaled to [0, 1]."""
    tensors = load_file(_DIGITS)
    inputs = tensors["inputs"].astype(np.float32) / np.float32(16)
    return Dataset(inputs, tensors["labels"].astype(np.int64), _DIGITS_TRAIN)


def load_dataset(path: Path | None) -> Dataset:
    """Return the data of a file, or the digits for None; the last fifth of a file is held out.

    The file holds `inputs` [rows, ...] of floats and `labels` [rows] of whole numbers from 0 on.
    Raises StartupError.
    """
    if path is None:
        return load_digits()
    tensors = load_arrays(path)
    if set(tensors) != {"inputs", "labels"}:
        raise StartupError(f"{path} holds {sorted(tensors)}, expected `inputs` and `labels`")
    inputs, labels = tensors["inputs"], tensors["labels"]
    if inputs.ndim < 2 or labels.shape != inputs.shape[:1] or len(inputs) < 100:
        raise StartupError(
            f"{path} holds inputs {list(inputs.shape)} and labels {list(labels.shape)}, expected "
            "[rows, ...] and [rows] of at least 100 rows"
        )
    if inputs.dtype.kind != "f" or labels.dtype.kind not in "iu" or labels.min() < 0:
        raise StartupError(f"{path} must hold float inputs and labels of whole numbers from 0 on")
    if not np.isfinite(inputs).all():
        raise StartupError(f"{path} holds inputs that are not finite")
    flat = inputs.reshape(len(inputs), -1).astype(np.float32)
    return Dataset(flat, labels.astype(np.int64), len(flat) * 4 // 5)


def load_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    """Return every array of a safetensors file by name; raises StartupError."""
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise StartupError(f"{path} cannot be read as safetensors: {error}") from None
