"""What `polyadapt mark` does: from a key to trained branches, and from answers to a name.

Every function opens one mark's directory, does one thing and leaves the directory whole.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save
from safetensors.torch import save as save_tensors
from torch import nn

from polyadapt.errors import InvalidRequest, StartupError
from polyadapt.watermark import evidence
from polyadapt.watermark.branches import Branches, MarkedModel, chosen
from polyadapt.watermark.classifier import (
    answer_of,
    load_classifier,
    load_suspect,
    model_hash,
    save_classifier,
    save_copy,
)
from polyadapt.watermark.dataset import Dataset, load_arrays
from polyadapt.watermark.mark_directory import BRANCHES_NAME, CHECKPOINT_NAME, MarkDirectory
from polyadapt.watermark.obfuscation import expand, merge, obfuscate, seed_of
from polyadapt.watermark.preflight import Preflight
from polyadapt.watermark.reading import (
    NullRates,
    Queries,
    choose_targets,
    make_queries,
    measure_null_rates,
    read_answers,
    read_sequentially,
)
from polyadapt.watermark.records import read_record, sign_reading, trace_record
from polyadapt.watermark.secrets import write_file
from polyadapt.watermark.statistics import BitRule, SequentialRule
from polyadapt.watermark.tensor_files import expect_empty, load_branches
from polyadapt.watermark.trace import Trace
from polyadapt.watermark.training import Progress, TrainSettings, accuracies, firing_share, train
from polyadapt.watermark.training import preflight as measure
from polyadapt.watermark.triggers import TriggerFamilies, TriggerSettings

MODULE = "0"  # of a classifier, the first linear: where a trigger is still what was added
Form = Literal["merged", "expanded", "bundle"]
NUM_SIGNATURES = 50  # random ones that a training is measured with


@dataclass(frozen=True, slots=True)
class Trained:
    """What the marked classifier costs, on held-out inputs, over random signatures."""

    preflight: Preflight
    base_accuracy: float
    mean_drop: float  # in points
    worst_drop: float
    untouched: float  # share of inputs that are answered with the base's own bits by every copy


def preflight(
    mark: MarkDirectory, model_dir: Path, data: Dataset, spec: TriggerSettings, *, seed: int = 0
) -> Preflight:
    """Say whether the triggers would stand out; nothing is written."""
    families = TriggerFamilies(mark.secrets.key, mark.config.n_bits, spec)
    return measure(load_classifier(model_dir), MODULE, data.train[0], families, seed)


def train_mark(
    mark: MarkDirectory,
    model_dir: Path,
    data: Dataset,
    spec: TriggerSettings,
    settings: TrainSettings,
    progress: Progress | None = None,
) -> Trained:
    """Train the branches and note them; taken up where an earlier run of the same was interrupted.

    Raises InvalidRequest where the triggers would not stand out: no training mends that.
    """
    model = load_classifier(model_dir)
    inputs, _ = data.train
    num_labels = _num_labels(model, data)
    families = TriggerFamilies(mark.secrets.key, mark.config.n_bits, spec)
    found = measure(model, MODULE, inputs, families, settings.seed)
    if not found.is_enough:
        raise InvalidRequest(
            f"triggers do not stand out enough: {found}. Clean answers would change, whatever is "
            f"trained; give --amplitude {found.amplitude_needed:.2g} or more, or fewer bits"
        )
    rng = np.random.default_rng([settings.seed, 7])
    targets = choose_targets(mark.secrets.key, families, answer_of(model), inputs, num_labels, rng)
    checkpoint = mark.path / CHECKPOINT_NAME
    branches = train(
        model,
        MODULE,
        inputs,
        families,
        targets,
        settings,
        checkpoint=checkpoint,
        progress=progress,
    )
    stored = {f"{MODULE}.{name}": tensor for name, tensor in branches.pair_tensors().items()}
    write_file(mark.path / BRANCHES_NAME, save_tensors(stored))
    mark.trained(model_hash(model), MODULE, spec, targets, settings.gate)
    checkpoint.unlink(missing_ok=True)
    held_out, truth = data.held_out
    base = float((answer_of(model)(held_out) == truth).mean())
    signatures = rng.integers(0, 2, (NUM_SIGNATURES, mark.config.n_bits)).astype(np.uint8)
    found_accuracies = accuracies(MarkedModel(model, MODULE, branches), held_out, truth, signatures)
    drops = 100 * (base - found_accuracies)
    untouched = 1 - firing_share(model, MODULE, branches, held_out)
    return Trained(found, base, float(drops.mean()), float(drops.max()), untouched)


def calibrate(
    mark: MarkDirectory,
    references: Sequence[Path],
    data: Dataset,
    *,
    num_per_bit: int = 200,
    seed: int = 0,
) -> NullRates:
    """Measure what unmarked classifiers answer to the triggers, and note it."""
    asks = [answer_of(load_classifier(path)) for path in references]
    null = measure_null_rates(
        asks,
        mark.families,
        mark.targets,
        data.held_out[0],
        np.random.default_rng([seed, 8]),
        num_per_bit=num_per_bit,
    )
    mark.calibrated(null)
    return null


def export_copy(
    mark: MarkDirectory,
    model_dir: Path,
    user: str,
    out: Path,
    *,
    form: Form | None = None,
    strength: float = 1.0,
) -> Form:
    """Write the user's copy of the classifier and return its form: of each pair of branches the
    user's own alone, and nothing that is sealed.

    merged    an ordinary classifier of the same size; linear marks alone, whose form it is if None
    expanded  an ordinary classifier of one layer more; hinge marks alone
    bundle    weights and branches beside them, obfuscated with `strength`; 0: as they are, so that
              they can be cut off
    """
    expect_empty(out)
    model, module = load_classifier(model_dir), mark.module
    own = Branches.of_own(chosen(load_branches(mark, model_hash(model)), mark.codebook.row(user)))
    if form is None:
        form = "merged" if own.tau is None else "bundle"
    rng = seed_of(mark.secrets.key.derive("obfuscation", mark.config.codebook["key_version"], user))
    if form == "merged":
        save_classifier(merge(model, module, own), out)
    elif form == "expanded":
        save_classifier(expand(model, module, own, rng), out)
    else:
        if strength:
            model, own = obfuscate(model, module, own, strength, rng)
        save_copy(model, module, own, out)
    return form


def write_queries(mark: MarkDirectory, data: Dataset, num_per_bit: int, out: Path) -> int:
    """Write fresh queries for whoever can ask the suspect, `inputs` [rows, size], and return how
    many. Which bit each one asks for is sealed beside the mark.
    """
    rng = np.random.default_rng(secrets.randbits(128))
    queries = make_queries(mark.families, data.held_out[0], num_per_bit, rng)
    mark.keep_queries(_name_of(queries.inputs), queries.bits)
    write_file(out, save({"inputs": queries.inputs}))
    return len(queries.bits)


def read_labels(
    mark: MarkDirectory, asked: Path, answers: Path, rule: BitRule, suspect: str
) -> str:
    """Return the signed reading of a file of `labels` [rows], answers to the inputs of `asked`."""
    inputs = _array(asked, "inputs", "f")
    labels = _array(answers, "labels", "iu").astype(np.int64)
    queries = Queries(inputs, mark.find_queries(_name_of(inputs)))
    readings = read_answers(queries, labels, mark.targets, mark.null, rule)
    asked_of = {
        "kind": "labels of a file",
        "queries": len(queries.bits),
        "inputs_digest": evidence.digest(inputs.tobytes()),
        "labels_digest": evidence.digest(labels.tobytes()),
    }
    return sign_reading(
        mark,
        readings,
        {"kind": "fixed", **evidence.without_floats(asdict(rule))},
        asked_of,
        suspect,
    )


def read_suspect(
    mark: MarkDirectory, suspect_dir: Path, data: Dataset, rule: SequentialRule
) -> str:
    """Return the signed reading of a classifier's directory, asked bit by bit until it is clear."""
    ask = load_suspect(suspect_dir)
    asked: list[NDArray[np.float32]] = []

    def noted(inputs: NDArray[np.float32]) -> NDArray[np.int64]:
        asked.append(inputs)
        return ask(inputs)

    rng = np.random.default_rng(secrets.randbits(128))
    readings = read_sequentially(
        noted, mark.families, mark.targets, data.held_out[0], mark.null, rule, rng
    )
    inputs = np.concatenate(asked) if asked else np.zeros((0, 1), np.float32)
    asked_of = {
        "kind": "labels, sequentially",
        "queries": len(inputs),
        "inputs_digest": evidence.digest(inputs.tobytes()),
    }
    return sign_reading(
        mark,
        readings,
        {"kind": "sequential", **evidence.without_floats(asdict(rule))},
        asked_of,
        suspect_dir.name,
    )


def trace_reading(
    mark: MarkDirectory, reading: bytes, users: Sequence[str], alpha: float
) -> tuple[Trace, str]:
    """Return who the reading names, and the signed record of it; raises EvidenceRejected for a
    reading that this mark did not sign.
    """
    return trace_record(mark, read_record(mark, reading), users, alpha)


def _num_labels(model: nn.Module, data: Dataset) -> int:
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    if int(data.labels.max()) >= last.out_features:
        raise StartupError(
            f"the data has labels up to {int(data.labels.max())}, the classifier "
            f"{last.out_features} outputs; they are not of one task"
        )
    return last.out_features


def _array(path: Path, name: str, kinds: str) -> NDArray[Any]:
    arrays = load_arrays(path)
    if set(arrays) != {name} or arrays[name].dtype.kind not in kinds:
        raise StartupError(f"{path} holds {sorted(arrays)}, expected `{name}` alone")
    return arrays[name]


def _name_of(inputs: NDArray[np.float32]) -> str:
    return evidence.digest(inputs.tobytes()).partition(":")[2][:16]
