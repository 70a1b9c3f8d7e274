"""The state of a training on disk, so that an interrupted run ends in the same bits as one that
went through. Knows no losses.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from polyadapt.errors import StartupError
from polyadapt.watermark.secrets import write_file


def write_checkpoint(
    path: Path,
    run: str,
    step: int,
    module: nn.Module,
    optimiser: torch.optim.Adam,
    rng: np.random.Generator,
) -> None:
    """Write what is trained of `module` and its Adam's state after `step` steps; `run` says of
    what the result depends on.
    """
    tensors = {}
    for name, parameter in _trained(module):
        state = optimiser.state[parameter]
        tensors[name] = parameter.detach().contiguous()
        tensors[f"{name}.mean"] = state["exp_avg"].contiguous()
        tensors[f"{name}.square"] = state["exp_avg_sq"].contiguous()
    metadata = {"run": run, "step": str(step), "rng": json.dumps(rng.bit_generator.state)}
    write_file(path, save(tensors, metadata))


def resume(
    path: Path,
    run: str,
    module: nn.Module,
    optimiser: torch.optim.Adam,
    rng: np.random.Generator,
) -> int:
    """Put the state back and return how many steps were done; raises StartupError for a file that
    cannot be read or is of another run.
    """
    metadata, tensors = read_run(path, run)
    step = int(metadata["step"])
    with torch.no_grad():
        for name, parameter in _trained(module):
            parameter.copy_(tensors[name])
            optimiser.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"{name}.mean"],
                "exp_avg_sq": tensors[f"{name}.square"],
            }
    rng.bit_generator.state = json.loads(metadata["rng"])
    return step


def read_run(path: Path, run: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and tensors of a checkpoint of this run; raises StartupError."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise StartupError(
            f"the checkpoint {path} cannot be read: {error}; delete it to begin anew"
        ) from None
    if metadata.get("run") != run:
        raise StartupError(
            f"the checkpoint {path} is of another run: the model, the data, the key or a setting "
            "differs; give what it was begun with, or delete it to begin anew"
        )
    return metadata, tensors


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
