"""Classifiers that can be marked: stacks of linears with ReLU between them, and marked copies.

A classifier's directory holds `model.safetensors`, the state_dict of a torch.nn.Sequential of
Linear, ReLU, Linear, ...; a marked copy that is not folded also
`mark.safetensors`, the branches that its user's bits choose.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from polyadapt.errors import StartupError
from polyadapt.watermark.branches import Branches, MarkedModel
from polyadapt.watermark.tensor_files import load_tensors

MODEL_NAME = "model.safetensors"
COPY_NAME = "mark.safetensors"
_PARAMETER = re.compile(r"(0|[1-9][0-9]*)\.(weight|bias)")

Answer = Callable[[NDArray[np.float32]], NDArray[np.int64]]  # inputs [rows, size] -> labels [rows]


def load_classifier(directory: Path) -> nn.Sequential:
    """Return the classifier of a directory, in float32; raises StartupError."""
    path = directory / MODEL_NAME
    tensors = load_tensors(path)
    problems = [name for name in tensors if not _PARAMETER.fullmatch(name)]
    if problems:
        raise StartupError(
            f"{path} holds {problems[0]!r}, expected names such as 0.weight and 0.bias: the "
            "state_dict of a torch.nn.Sequential of Linear and ReLU"
        )
    indices = sorted({int(name.partition(".")[0]) for name in tensors})
    if indices != list(range(0, 2 * len(indices), 2)) or len(indices) < 2:
        raise StartupError(f"{path} holds layers {indices}, expected 0, 2, ... with ReLU between")
    layers: list[nn.Module] = []
    size = None
    for index in indices:
        weight, bias = tensors.get(f"{index}.weight"), tensors.get(f"{index}.bias")
        if weight is None or bias is None or weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise StartupError(f"layer {index} of {path} has no weight [out, in] and bias [out]")
        if size is not None and weight.shape[1] != size:
            raise StartupError(
                f"layer {index} of {path} takes {weight.shape[1]} numbers and is given {size}"
            )
        size = weight.shape[0]
        layers += [nn.Linear(weight.shape[1], weight.shape[0]), nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.requires_grad_(False).eval()


def save_classifier(model: nn.Sequential, directory: Path) -> None:
    """Write the classifier; raises StartupError."""
    state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    _save(state, directory, MODEL_NAME)


def model_hash(model: nn.Module) -> str:
    """Return sha256:<hex> over the names, shapes, types and values of the model's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(repr((name, str(tensor.dtype), list(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def save_copy(model: nn.Sequential, module: str, own: Branches, directory: Path) -> None:
    """Write a copy whose branches stand beside the weights: those that `Branches.own` returned."""
    save_classifier(model, directory)
    _save({f"{module}.{k}": v for k, v in own.own_tensors().items()}, directory, COPY_NAME)


def load_suspect(directory: Path) -> Answer:
    """Return what answers for the directory, a marked copy or an unmarked classifier, as a stranger
    would ask it: inputs in, labels out. Raises StartupError.
    """
    model = load_classifier(directory)
    path = directory / COPY_NAME
    if not path.is_file():
        return answer_of(model)
    stored = load_tensors(path)
    modules = {name.rpartition(".")[0] for name in stored}
    if len(modules) != 1:
        raise StartupError(f"{path} holds branches of {sorted(modules)}, expected of one module")
    (module,) = modules
    branches = Branches.of_own({k.rpartition(".")[2]: v for k, v in stored.items()})
    marked = MarkedModel(model, module, branches)
    signs = torch.ones(1, branches.num_bits)
    return answer_of(lambda inputs: marked(inputs, signs.expand(len(inputs), -1)))


def answer_of(logits: Callable[[Tensor], Tensor]) -> Answer:
    """Return the labels that a model's logits name: inputs [rows, size] -> [rows]."""

    def answer(inputs: NDArray[np.float32]) -> NDArray[np.int64]:
        with torch.inference_mode():
            found: NDArray[np.int64] = logits(torch.from_numpy(inputs)).argmax(-1).numpy()
            return found

    return answer


def train_classifier(
    inputs: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    seed: int,
    hidden: int = 256,
    num_steps: int = 300,
) -> nn.Sequential:
    """Return a classifier of two hidden layers to try a mark with: Adam 1e-3 on batches of 128."""
    rng = np.random.default_rng([seed, 1])
    num_classes = int(labels.max()) + 1
    sizes = (inputs.shape[1], hidden, hidden, num_classes)
    layers: list[nn.Module] = []
    for num_in, num_out in itertools.pairwise(sizes):
        linear = nn.Linear(num_in, num_out)
        weight = rng.standard_normal((num_out, num_in)) * np.sqrt(2 / num_in)
        linear.weight.data = torch.from_numpy(weight.astype(np.float32))
        linear.bias.data.zero_()
        layers += [linear, nn.ReLU()]
    model = nn.Sequential(*layers[:-1])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(num_steps):
        rows = rng.integers(0, len(inputs), 128)
        loss = nn.functional.cross_entropy(
            model(torch.from_numpy(inputs[rows])), torch.from_numpy(labels[rows])
        )
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return model.requires_grad_(False).eval()


def _save(tensors: Mapping[str, Tensor], directory: Path, name: str) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), directory / name)
    except OSError as error:
        raise StartupError(f"{directory} cannot be written: {error.strerror}") from None
