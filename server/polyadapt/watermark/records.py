"""Readings and traces of one mark as signed records. Knows no files and no way of asking;
torch-free.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from polyadapt.errors import EvidenceRejected
from polyadapt.watermark import evidence
from polyadapt.watermark.attribution import (
    Attribution,
    Standing,
    attribute_copy,
    standing_of_copy,
)
from polyadapt.watermark.mark_directory import MarkDirectory
from polyadapt.watermark.prompts import Prose
from polyadapt.watermark.queries import AskChats, ChatQuery, read_chats, read_replies
from polyadapt.watermark.statistics import Bit, BitReading, BitRule, SequentialRule
from polyadapt.watermark.trace import Trace, trace


def read_model(
    mark: MarkDirectory, ask: AskChats, prose: Prose, rule: SequentialRule, suspect: str
) -> str:
    """Return the signed reading of a language model that `ask` asks, bit by bit until it is clear.

    `suspect` is how the record names it. Raises what `ask` raises, and StartupError for a mark that
    is not trained and calibrated, or not of a language model.
    """
    asked: list[str] = []
    told: list[str | None] = []

    def noted(messages: Sequence[str]) -> Sequence[str | None]:
        replies = ask(messages)
        asked.extend(messages)
        told.extend(replies)
        return replies

    rng = np.random.default_rng(secrets.randbits(128))
    readings = read_chats(noted, mark.prompts, prose, mark.null, rule, rng)
    fields = {"kind": "replies, sequentially", **_digests(asked, told)}
    return sign_reading(
        mark,
        readings,
        {"kind": "sequential", **evidence.without_floats(asdict(rule))},
        fields,
        suspect,
    )


def read_samples(
    mark: MarkDirectory,
    queries: Sequence[ChatQuery],
    replies: Sequence[str | None],
    rule: BitRule,
    suspect: str,
) -> str:
    """Return the signed reading of replies that somebody else has asked for; raises InvalidRequest
    unless there is one per query, and StartupError as read_model.
    """
    readings = read_replies(mark.prompts, queries, replies, mark.null, rule)
    fields = {
        "kind": "replies of a file",
        **_digests([query.message for query in queries], replies),
    }
    return sign_reading(
        mark, readings, {"kind": "fixed", **evidence.without_floats(asdict(rule))}, fields, suspect
    )


def sign_reading(
    mark: MarkDirectory,
    readings: tuple[BitReading, ...],
    rule: Mapping[str, Any],
    asked: Mapping[str, Any],
    suspect: str,
) -> str:
    """Return what was read as a signed record: how it was asked, the rule, and every bit."""
    null = mark.null
    return _sign(
        mark,
        "reading",
        {
            "suspect": suspect,
            "asked": dict(asked),
            "rule": dict(rule),
            "null": {
                "rates": [[evidence.number(rate) for rate in pair] for pair in null.rates],
                "confidence": evidence.number(null.confidence),
                "queries_per_bit": null.num_queries,
                "models": null.num_models,
            },
            "bits": evidence.describe_readings(readings),
        },
    )


def read_record(mark: MarkDirectory, reading: bytes) -> dict[str, Any]:
    """Return the reading in a signed record; raises EvidenceRejected unless this mark signed it."""
    record = evidence.verify(reading, mark.config.evidence_public_key)
    if record.get("kind") != "reading":
        raise EvidenceRejected(f"the record is a {record.get('kind')!r}, expected a reading")
    return record


def trace_record(
    mark: MarkDirectory,
    reading: Mapping[str, Any],
    users: Sequence[str],
    alpha: float,
    **about: Any,
) -> tuple[Trace, str]:
    """Return who the reading names, and the signed record of it. `reading` has `bits`, each with a
    `value`, as read_record returns it; `about` is written beside the trace.
    """
    found = trace(mark.codebook, users, _bits_of(reading), alpha=alpha)
    return found, _sign_trace(mark, reading, users, found, about)


def attribute_record(
    mark: MarkDirectory, reading: Mapping[str, Any], users: Sequence[str], alpha: float
) -> tuple[Attribution, Standing, str]:
    """Return the same in words, every user's score for a picture, and the record with the words."""
    bits = _bits_of(reading)
    found = trace(mark.codebook, users, bits, alpha=alpha)
    words = attribute_copy(found, float(reading["rule"]["alpha"]))
    standing = standing_of_copy(mark.codebook, users, bits, found)
    return words, standing, _sign_trace(mark, reading, users, found, {"words": words.to_data()})


def _bits_of(reading: Mapping[str, Any]) -> list[Bit]:
    return [entry["value"] for entry in reading["bits"]]


def _sign_trace(
    mark: MarkDirectory,
    reading: Mapping[str, Any],
    users: Sequence[str],
    found: Trace,
    about: Mapping[str, Any],
) -> str:
    fields = {
        "reading": dict(reading),
        "users_digest": evidence.digest("\n".join(sorted(users)).encode()),
        "trace": evidence.describe_trace(found),
    }
    return _sign(mark, "trace", {**fields, **about})


def _digests(asked: Sequence[str], told: Sequence[str | None]) -> dict[str, Any]:
    # Of messages and replies: the triggers in them stay secret.
    return {
        "queries": len(asked),
        "missing": sum(reply is None for reply in told),
        "inputs_digest": evidence.digest("\0".join(asked).encode()),
        "replies_digest": evidence.digest(evidence.canonical(list(told))),
    }


def _sign(mark: MarkDirectory, kind: str, fields: Mapping[str, Any]) -> str:
    record = {
        **evidence.head(kind),
        "mark": {
            "id": mark.config.mark_id,
            "base_model_hash": mark.config.base_model_hash,
            "n_bits": mark.config.n_bits,
            "codebook": dict(mark.config.codebook),
        },
        **fields,
    }
    return evidence.Signer(mark.secrets.key).sign(record)
