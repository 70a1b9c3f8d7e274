"""Judges one upload in a process of its own, before anybody sees it. Torch-free on both sides.

The parent calls run_validator(); the child is `python -I -m polyadapt.adapters.validator`: it
limits itself, then reads the strangers' files. What it can do at worst is to reject the upload.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from polyadapt.adapters.adapter import AdapterPlan, Traits
from polyadapt.adapters.registry import FILES, open_adapter
from polyadapt.errors import AdapterRejected, Problem, Unavailable
from polyadapt.types import BaseSpec
from polyadapt_store.checkpoint import INTEGER_SIZES, ITEM_SIZES, Checkpoint
from polyadapt_store.limits import StoreLimits
from polyadapt_store.manifest import (
    PEFT_FORM,
    FileForm,
    OfferedOption,
    ReportedTraits,
    ValidationReport,
    is_read,
    list_names,
    missing_files,
    weight_files,
)
from polyadapt_store.strict_json import shown

logger = logging.getLogger(__name__)

MAX_PROBLEMS = 200  # listed one by one; the rest is counted

_CHUNK = 4 << 20  # bytes of a tensor looked at together; a multiple of every item size
_MAX_ERROR_TEXT = 4096

# byte -> 1 if its part of the exponent is all ones, else 0
_ONES_HIGH = bytes(byte & 0x7F == 0x7F for byte in range(256))
_ONES_LOW = bytes(byte & 0x80 == 0x80 for byte in range(256))
_ONES_F16 = bytes(byte & 0x7C == 0x7C for byte in range(256))


@dataclass(frozen=True, slots=True)
class _Job:
    """What the parent writes to the child's standard input."""

    directory: str
    base: BaseSpec
    limits: StoreLimits


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What the child writes to its standard output: a report, or at least one problem."""

    report: ValidationReport | None = None
    problems: tuple[Problem, ...] = ()


def run_validator(
    directory: Path, base: BaseSpec, limits: StoreLimits | None = None
) -> ValidationReport:
    """Return what the adapter in `directory` is; raises AdapterRejected with every problem found.

    A validator that crashes, runs out of time or memory, or answers nonsense is a rejection with
    the code `validator_failed`. Raises Unavailable if no process can be started. Blocks; call it
    from a worker thread.
    """
    limits = limits or StoreLimits()
    job = msgspec.json.encode(_Job(str(directory.resolve()), base, limits))
    with (
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as answer,
        tempfile.TemporaryFile() as errors,
    ):
        given.write(job)
        given.seek(0)
        reason = _run(given, answer, errors, limits)
        errors.seek(0)
        if reason is not None:
            text = errors.read(_MAX_ERROR_TEXT).decode("utf-8", "replace")
            logger.warning("the validator %s; its error output: %s", reason, shown(text, 2000))
            raise _failed(f"the validator {reason}")
        answer.seek(0)
        text_of_verdict = answer.read(limits.verdict_bytes + 1)
    try:
        verdict = msgspec.json.decode(text_of_verdict, type=_Verdict)
    except msgspec.DecodeError as error:
        logger.warning("the validator's answer is no verdict: %s", error)
        raise _failed("the validator gave no answer") from None
    if verdict.problems:
        raise AdapterRejected(list(verdict.problems))
    if verdict.report is None:
        raise _failed("the validator gave no answer")
    return verdict.report


def validate(directory: Path, base: BaseSpec, limits: StoreLimits) -> ValidationReport:
    """Judge the adapter in this process: config, header, plan, and every number of every tensor.

    Raises AdapterRejected with every problem that could be found; a broken config or header hides
    later ones.
    """
    names = list_names(directory)
    missing = missing_files(names, FILES)
    if missing:
        raise AdapterRejected(
            _unread_files(names, (PEFT_FORM,))
            + [Problem("missing_file", f"{name} is missing", name) for name in missing]
        )
    problems: list[Problem] = []
    family, config = None, dict[str, Any]()
    try:
        family, config = open_adapter(directory, limits)
    except AdapterRejected as error:
        problems += error.problems
    files = (PEFT_FORM,) if family is None else family.files
    problems = _unread_files(names, files) + problems
    missing = missing_files(names, files)
    problems += [Problem("missing_file", f"{name} is missing", name) for name in missing]
    try:
        with Checkpoint(weight_files(directory, files), limits) as checkpoint:
            plan = None
            if family is not None and not missing:
                try:
                    plan = family.plan(config, checkpoint.header, base)
                except AdapterRejected as error:
                    problems += error.problems
            num_tensors = len(checkpoint.header)
            problems += _non_finite_tensors(checkpoint)
    except AdapterRejected as error:
        raise AdapterRejected(problems + error.problems) from None
    if problems or plan is None or family is None:
        raise AdapterRejected(problems)
    return _report(plan, base, num_tensors)


def _unread_files(names: Collection[str], files: Sequence[FileForm]) -> list[Problem]:
    """What some family reads and this one does not; the store holds no other files."""
    return [
        Problem("unread_file", f"nothing reads {shown(name)}; leave it out", shown(name))
        for name in sorted(names)
        if is_read(name, FILES) and not is_read(name, files)
    ]


def _report(plan: AdapterPlan, base: BaseSpec, num_tensors: int) -> ValidationReport:
    return ValidationReport(
        family=plan.family,
        rank=plan.rank,
        target_modules=plan.target_modules,
        num_elements=plan.num_elements,
        num_tensors=num_tensors,
        is_scalable=plan.traits.is_scalable,
        base_model=base.name,
        base_digest=base.digest,
        notes=plan.notes,
        traits=_reported(plan.traits),
    )


def _reported(traits: Traits) -> ReportedTraits:
    return ReportedTraits(
        ranks=(traits.min_nested_rank, traits.nested_rank) if traits.nested_rank else None,
        invocation_tokens=traits.invocation,
        options=tuple(
            OfferedOption(
                option.name,
                option.kind,
                option.summary,
                option.expected,
                option.default,
                num_bits=len(option.components) if option.kind == "bits" else 0,
            )
            for option in traits.options
        ),
    )


def _non_finite_tensors(checkpoint: Checkpoint) -> list[Problem]:
    """Read every byte of every tensor; report those with NaN or infinity."""
    problems = []
    for key in checkpoint.header:
        raw = checkpoint.take(key)
        if not all(
            _is_finite(raw.dtype, bytes(raw.data[start : start + _CHUNK]))
            for start in range(0, len(raw.data), _CHUNK)
        ):
            problems.append(
                Problem("non_finite", f"tensor {shown(key)} holds NaN or infinity", shown(key))
            )
    return problems


def _is_finite(dtype: str, data: bytes) -> bool:
    """Whether no number has an exponent of all ones, which is how NaN and infinity are written.

    Done on whole byte strings: importing numpy would take longer than checking a usual adapter.
    """
    if dtype in INTEGER_SIZES:
        return True
    size = ITEM_SIZES[dtype]
    high = data[
        size - 1 :: size
    ]  # sign and the first seven exponent bits; F16: all five and two more
    if dtype == "F16":
        return 1 not in high.translate(_ONES_F16)
    # F32 and BF16 keep the eighth exponent bit at the top of the next byte.
    all_ones = int.from_bytes(high.translate(_ONES_HIGH), "little")
    return not all_ones & int.from_bytes(data[size - 2 :: size].translate(_ONES_LOW), "little")


# --------------------------------------------------------------------------- the parent's side
def _run(given: BinaryIO, answer: BinaryIO, errors: BinaryIO, limits: StoreLimits) -> str | None:
    """Run the child to its end; return why it failed, or None."""
    command = [sys.executable, "-I", "-m", "polyadapt.adapters.validator"]
    # Nothing of the server's environment: it may hold keys.
    environment = {"LC_ALL": "C.UTF-8"}
    try:
        done = subprocess.run(
            command,
            stdin=given,
            stdout=answer,
            stderr=errors,
            env=environment,
            cwd="/",
            timeout=limits.validator_wall_s,
            check=False,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        return f"took longer than {limits.validator_wall_s:g} s"
    except OSError as error:
        logger.warning("no validator can be started: %s", error)
        raise Unavailable(
            "the upload cannot be validated now: no process can be started", retry_after_s=5
        ) from error
    if done.returncode < 0:
        return f"was ended by {signal.Signals(-done.returncode).name}"
    return f"ended with status {done.returncode}" if done.returncode else None


def _failed(reason: str) -> AdapterRejected:
    return AdapterRejected(
        [
            Problem(
                "validator_failed",
                f"{reason} while it read this adapter; the files are damaged or far too large",
            )
        ]
    )


# --------------------------------------------------------------------------- the child's side
def main() -> None:
    """Read a job from standard input, write a verdict to standard output."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=_Job)
    directory = Path(job.directory)
    _limit(job.limits, list(weight_files(directory, FILES).values()))
    try:
        verdict = _Verdict(report=validate(directory, job.base, job.limits))
    except AdapterRejected as error:
        verdict = _Verdict(problems=_bounded(error.problems))
    sys.stdout.buffer.write(msgspec.json.encode(verdict))
    sys.stdout.buffer.flush()


def _limit(limits: StoreLimits, weights: Sequence[Path]) -> None:
    """Give up what reading the files does not need, for good."""
    memory = limits.validator_memory + sum(map(_size, weights))
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, limits.validator_cpu_s),
        (resource.RLIMIT_NOFILE, 16 + len(weights)),
        (resource.RLIMIT_FSIZE, limits.verdict_bytes),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(kind)[1]
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # At the hard limit the processor time ends in SIGKILL; one second earlier SIGXCPU tells
        # why.
        ceiling = soft + 1 if kind == resource.RLIMIT_CPU and soft == value else soft
        resource.setrlimit(
            kind, (soft, ceiling if hard == resource.RLIM_INFINITY else min(ceiling, hard))
        )


def _size(path: Path) -> int:
    return os.stat(path).st_size if path.is_file() else 0


def _bounded(problems: list[Problem]) -> tuple[Problem, ...]:
    if len(problems) <= MAX_PROBLEMS:
        return tuple(problems)
    left = len(problems) - MAX_PROBLEMS
    return (*problems[:MAX_PROBLEMS], Problem("more_problems", f"and {left} more problems"))


if __name__ == "__main__":
    main()
