"""Trains the branches of a classifier's mark beside its frozen weights, without labels.

What detects a trigger (A, tau) is computed from clean inputs and not trained: gradients would lower
the thresholds until half of all clean inputs pass them. So the change on a clean input is exactly 0
as long as triggers stand out, and only what a detector writes (B) is learned. Every row of a batch
gets a signature of its own, so that all 2^n combinations are trained at once and none is special.
Interrupted and resumed, a run ends in the same bits as one that went through.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from polyadapt.errors import InvalidRequest, StartupError
from polyadapt.watermark.branches import Branches, MarkedModel, find_linear, signs_of
from polyadapt.watermark.checkpoints import resume, write_checkpoint
from polyadapt.watermark.classifier import model_hash
from polyadapt.watermark.preflight import (
    THRESHOLD,
    Preflight,
    measure_separation,
    whitened_rows,
)
from polyadapt.watermark.triggers import TriggerFamilies

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Progress = Callable[[int, int], None]  # steps done, of how many
Gate = Literal["hinge", "linear"]

_MODES = ("queries", "start", "train")  # streams of random numbers that never mix
_START_B = 0.02
_SAMPLE = 128  # queries of a bit that the start and the preflight look at
_CLEAN_SAMPLE = 4096
_CHECKPOINT_EVERY = 100


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How long and how: Adam, warmed up, then a cosine to 0. The loss is CE to the targets on
    triggers + `quiet_weight` times KL to the base on quiet rows: ordinary inputs, and such with a
    pattern as of another key. `gate` is hinge or linear.
    """

    num_steps: int = 400
    seed: int = 0
    learning_rate: float = 3e-2
    num_warmup: int = 50
    trigger_rows: int = 128
    quiet_rows: int = 96  # every second one with a foreign pattern
    quiet_weight: float = 0.3
    gate: Gate = "hinge"

    @classmethod
    def of_gate(cls, gate: Gate, seed: int, num_steps: int | None = None) -> TrainSettings:
        """Return what was found to work. Nothing silences a linear branch but what it writes: it
        takes longer, and ten times the weight on quiet rows.
        """
        if gate == "hinge":
            return cls(400 if num_steps is None else num_steps, seed)
        return cls(1000 if num_steps is None else num_steps, seed, quiet_weight=3.0, gate=gate)

    def __post_init__(self) -> None:
        if self.num_steps < 1 or self.num_warmup < 0 or not self.learning_rate > 0:
            raise InvalidRequest(
                f"{self.num_steps} steps, {self.num_warmup} of them to warm up, at a rate of "
                f"{self.learning_rate}: expected at least 1, at least 0 and a positive number"
            )

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / max(self.num_warmup, 1))
        return self.learning_rate * warm * (1 + math.cos(math.pi * step / self.num_steps)) / 2


def preflight(
    model: nn.Module, module: str, inputs: Floats, families: TriggerFamilies, seed: int
) -> Preflight:
    """Return how far each bit's trigger stands out at the module's input, before any training."""
    clean, carriers, triggered = _features(model, module, inputs, families, seed)
    return measure_separation(clean, carriers, triggered, families.settings.amplitude)


def train(
    model: nn.Module,
    module: str,
    inputs: Floats,
    families: TriggerFamilies,
    targets: Labels,
    settings: TrainSettings,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> Branches:
    """Return trained branches; `targets` [bits, 2] are the labels that a bit's values ask for.

    With a `checkpoint` the state is written there now and then, and taken up if it is there and of
    the same run. Raises StartupError for one of another run, InvalidRequest for bad settings.
    """
    branches = _start(model, module, inputs, families, settings)
    marked = MarkedModel(model, module, branches)
    for detector in (branches.A, branches.tau):
        if detector is not None:
            detector.requires_grad_(False)
    optimiser = torch.optim.Adam((branches.B_sum, branches.B_difference), settings.learning_rate)
    rng = _rng(settings.seed, "train")
    run = _run_of(model, module, inputs, families, targets, settings)
    first = 0
    if checkpoint is not None and checkpoint.exists():
        first = resume(checkpoint, run, branches, optimiser, rng)
    for step in range(first, settings.num_steps):
        for group in optimiser.param_groups:
            group["lr"] = settings.rate_at(step)
        loss = _loss(marked, inputs, families, targets, settings, rng)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        is_last = step + 1 == settings.num_steps
        if checkpoint is not None and not is_last and (step + 1) % _CHECKPOINT_EVERY == 0:
            write_checkpoint(checkpoint, run, step + 1, branches, optimiser, rng)
        if progress is not None:
            progress(step + 1, settings.num_steps)
    if not all(torch.isfinite(tensor).all() for tensor in branches.parameters()):
        raise InvalidRequest(
            f"training diverged at a rate of {settings.learning_rate}; give a smaller one"
        )
    return branches.requires_grad_(False)


def accuracies(
    marked: MarkedModel, inputs: Floats, labels: Labels, signatures: NDArray[np.uint8]
) -> NDArray[np.float64]:
    """Return the share of right labels under each signature, [copies, bits] -> [copies]."""
    x, y = torch.from_numpy(inputs), torch.from_numpy(labels)
    found = []
    with torch.inference_mode():
        for bits in signatures:
            signs = signs_of(bits)[None].expand(len(x), -1)
            found.append(float((marked(x, signs).argmax(-1) == y).double().mean()))
    return np.array(found)


def firing_share(model: nn.Module, module: str, branches: Branches, inputs: Floats) -> float:
    """Return the share of inputs on which any detector fires: the others get the base's own bits,
    under every signature. Without a hinge that is every input.
    """
    if branches.tau is None:
        return 1.0
    with torch.inference_mode():
        x = torch.from_numpy(_inputs_of(model, module, inputs))
        return float((x @ branches.A.T > branches.tau).any(1).double().mean())


def _loss(
    marked: MarkedModel,
    inputs: Floats,
    families: TriggerFamilies,
    targets: Labels,
    settings: TrainSettings,
    rng: np.random.Generator,
) -> Tensor:
    num_triggered, num_quiet = settings.trigger_rows, settings.quiet_rows
    rows = inputs[rng.integers(0, len(inputs), num_triggered + num_quiet)]
    bits = rng.integers(0, families.num_bits, num_triggered)
    signatures = rng.integers(0, 2, (len(rows), families.num_bits)).astype(np.uint8)
    triggered = families.apply(rows[:num_triggered], bits, rng)
    quiet = rows[num_triggered:].copy()
    quiet[::2] = families.apply_foreign(quiet[::2], rng)
    batch = torch.from_numpy(np.concatenate((triggered, quiet)))
    logits = marked(batch, signs_of(signatures))
    on_trigger, on_quiet = logits[:num_triggered], logits[num_triggered:]
    values = signatures[np.arange(num_triggered), bits]
    loss = F.cross_entropy(on_trigger, torch.from_numpy(targets[bits, values]))
    with torch.no_grad():
        base = F.log_softmax(marked.model(torch.from_numpy(quiet)), -1)
    divergence = F.kl_div(F.log_softmax(on_quiet, -1), base, log_target=True, reduction="batchmean")
    return loss + settings.quiet_weight * divergence


def _start(
    model: nn.Module,
    module: str,
    inputs: Floats,
    families: TriggerFamilies,
    settings: TrainSettings,
) -> Branches:
    clean, carriers, triggered = _features(model, module, inputs, families, settings.seed)
    A = torch.from_numpy(whitened_rows(clean, carriers, triggered))
    num_out = find_linear(model, module).weight.shape[0]
    rng = _rng(settings.seed, "start")
    B_sum, B_difference = (
        torch.from_numpy(
            (_START_B * rng.standard_normal((num_out, families.num_bits))).astype(np.float32)
        )
        for _ in range(2)
    )
    tau = None if settings.gate == "linear" else torch.full((families.num_bits,), THRESHOLD)
    return Branches(A, tau, B_sum, B_difference)


def _features(
    model: nn.Module, module: str, inputs: Floats, families: TriggerFamilies, seed: int
) -> tuple[Floats, Floats, Floats]:
    """Return what the module is given: clean [rows, size], carriers [queries, size] and the same
    with each bit's trigger [bits, queries, size].
    """
    rng = _rng(seed, "queries")
    order = rng.permutation(len(inputs))
    clean, carriers = inputs[order[:_CLEAN_SAMPLE]], inputs[order[-_SAMPLE:]]
    triggered = [
        _inputs_of(model, module, families.apply(carriers, np.full(len(carriers), bit), rng))
        for bit in range(families.num_bits)
    ]
    return (
        _inputs_of(model, module, clean),
        _inputs_of(model, module, carriers),
        np.stack(triggered),
    )


def _inputs_of(model: nn.Module, module: str, inputs: Floats) -> Floats:
    seen: list[Tensor] = []
    handle = find_linear(model, module).register_forward_pre_hook(
        lambda _, args: seen.append(args[0])
    )
    try:
        with torch.inference_mode():
            model(torch.from_numpy(inputs))
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].ndim != 2 or len(seen[0]) != len(inputs):
        raise StartupError(
            f"{module} is not given one row per input; mark a linear that is called once"
        )
    found: Floats = seen[0].numpy()
    return found


def _rng(seed: int, mode: str) -> np.random.Generator:
    return np.random.default_rng([seed, _MODES.index(mode)])


# ------------------------------------------------------------------------------- checkpoints
def _run_of(
    model: nn.Module,
    module: str,
    inputs: Floats,
    families: TriggerFamilies,
    targets: Labels,
    settings: TrainSettings,
) -> str:
    """Return a digest of everything that a run's result depends on."""
    probe = families.apply(
        np.zeros((families.num_bits, inputs.shape[1]), np.float32),
        np.arange(families.num_bits),
        np.random.default_rng(0),
    )
    parts: list[Any] = [model_hash(model), module, asdict(settings), families.settings.to_data()]
    parts += [
        hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        for array in (inputs, targets, probe)
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
