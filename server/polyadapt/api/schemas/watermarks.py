"""Marks, signatures of users, who must have one, readings and traces, on the wire."""

from __future__ import annotations

import json
import math
from typing import Any, Literal

from pydantic import Field

from polyadapt.api.schemas.base import Body, Reply
from polyadapt.tasks.marks import StoredMark, Traced
from polyadapt.watermark.trace import Suspicion
from polyadapt_store.signatures import Signature


class SignatureRequest(Body):
    """The bits of a user, or nothing: those of the mark's codebook."""

    signature: str | None = Field(
        None,
        min_length=1,
        max_length=1024,
        description="as characters 0 and 1, or in hexadecimal digits, the first bits first; "
        "without it the user's row of the codebook",
    )


class SignatureBatchRequest(Body):
    """Whose keys get their rows of the codebook."""

    tenant: str | None = Field(
        None, min_length=1, max_length=200, description="the caller's own; another's for admins"
    )


class SignatureObject(Reply):
    """One generation of a user's signature; its bits are there for admins alone, and not where
    they do not open.
    """

    object: Literal["watermark.signature"] = "watermark.signature"
    watermark: str = Field(description="the mark's adapter")
    digest: str = Field(description="its files, which the bits belong to")
    user: str = Field(description="an API key's id")
    generation: int = Field(description="counted from 1; the last one acts")
    issued_at: int
    revoked_at: int | None
    signature: str | None

    @classmethod
    def of(cls, watermark: str, found: Signature, *, has_bits: bool) -> SignatureObject:
        """Return the wire form."""
        return cls(
            watermark=watermark,
            digest=found.digest,
            user=found.user,
            generation=found.generation,
            issued_at=found.issued_at,
            revoked_at=found.revoked_at,
            signature=found.bits if has_bits else None,
        )


class SignatureList(Reply):
    """All that were ever issued, by user and generation."""

    object: Literal["list"] = "list"
    data: list[SignatureObject]


class WatermarkPolicyRequest(Body):
    """Whether every answer of a tenant has to be marked."""

    tenant: str = Field(min_length=1, max_length=200)
    required: bool


class WatermarkPolicyObject(Reply):
    """What holds from the tenant's next request on."""

    object: Literal["watermark.policy"] = "watermark.policy"
    watermark: str
    tenant: str
    required: bool


class WatermarkObject(Reply):
    """A mark: the adapter that serves its branches, and whether its secrets are here."""

    object: Literal["watermark"] = "watermark"
    id: str = Field(description="the mark's adapter")
    version: int
    digest: str
    base_model: str
    n_bits: int
    has_secrets: bool = Field(
        description="signatures come from the codebook, and bits can be read and traced"
    )
    mark_id: str | None
    codebook: str | None
    evidence_public_key: str | None = Field(description="what its signed records are checked with")
    created: int

    @classmethod
    def of(cls, stored: StoredMark) -> WatermarkObject:
        """Return the wire form."""
        adapter, record = stored.adapter, stored.record
        text = None if record is None else record.config
        config: dict[str, Any] = {} if text is None else json.loads(text)
        return cls(
            id=adapter.name,
            version=adapter.version,
            digest=adapter.digest,
            base_model=adapter.base_model,
            n_bits=stored.num_bits,
            has_secrets=stored.has_secrets,
            mark_id=config.get("mark_id"),
            codebook=config.get("codebook", {}).get("kind"),
            evidence_public_key=config.get("evidence_public_key"),
            created=adapter.created,
        )


class WatermarkList(Reply):
    """All marks that the caller sees, by name."""

    object: Literal["list"] = "list"
    data: list[WatermarkObject]


class DeletedWatermark(Reply):
    """A mark that is gone, in all its versions."""

    id: str
    object: Literal["watermark"] = "watermark"
    deleted: Literal[True] = True
    versions: list[int]


class QueriesRequest(Body):
    """How many questions are wanted for a suspect that only others can ask."""

    per_bit: int = Field(16, ge=4, le=256)


class Queries(Reply):
    """Questions to be asked as chats of one message at temperature 0; keep them secret."""

    object: Literal["watermark.queries"] = "watermark.queries"
    messages: list[str]


class SampleBody(Body):
    """One question and how the reply began."""

    message: str = Field(min_length=1, max_length=4096)
    reply: str | None = Field(max_length=4096, description="null: there was none")


class VerifyRequest(Body):
    """Whom to ask, or what was answered: `endpoint` and `model`, or `samples`."""

    endpoint: str | None = Field(None, max_length=2000, description="https://HOST[:PORT]/v1")
    api_key: str | None = Field(None, max_length=512, description="the endpoint's; never stored")
    model: str | None = Field(None, min_length=1, max_length=400)
    samples: list[SampleBody] | None = Field(None, min_length=1, max_length=65536)
    alpha: float = Field(1e-4, gt=0, lt=0.5, description="of deciding a bit of an unmarked model")
    max_queries: int = Field(4096, ge=1, le=65536)
    timeout_s: float = Field(300.0, gt=0, le=3600.0, description="of the whole reading")


class BitObject(Reply):
    """What one bit's questions were answered."""

    value: int | None = Field(description="0, 1, or null: erased")
    hits: list[int] = Field(description="answers that say 0, and that say 1")
    queries: int
    p_value: float = Field(description="of an unmarked model answering so")


class ReadingObject(Reply):
    """What was read, and the signed record of it."""

    object: Literal["watermark.reading"] = "watermark.reading"
    watermark: str
    bits: list[BitObject]
    num_decided: int
    record: dict[str, Any] = Field(description="signed; POST .../trace takes it as `reading`")

    @classmethod
    def of(cls, watermark: str, signed: str) -> ReadingObject:
        """Return the wire form of a signed reading."""
        record = json.loads(signed)
        bits = [
            BitObject(**{**bit, "p_value": float(bit["p_value"])})
            for bit in record["record"]["bits"]
        ]
        decided = sum(bit.value is not None for bit in bits)
        return cls(watermark=watermark, bits=bits, num_decided=decided, record=record)


class TraceRequest(Body):
    """What was read: `bits`, or `reading`, a signed record."""

    bits: list[Literal[0, 1] | None] | None = Field(None, min_length=1, max_length=1 << 14)
    reading: dict[str, Any] | None = None
    alpha: float = Field(1e-3, gt=0, lt=0.5, description="of naming any innocent at all")


class SuspicionObject(Reply):
    """How well one user's signature agrees with what was read."""

    user: str
    score: float
    matches: int = Field(description="of the bits that were read")
    p_value: float
    family_p_value: float = Field(description="of any innocent of all that were compared")

    @classmethod
    def of(cls, found: Suspicion) -> SuspicionObject:
        """Return the wire form."""
        return cls(
            user=found.user,
            score=found.score,
            matches=found.num_matches,
            p_value=found.p_value,
            family_p_value=found.family_p_value,
        )


class TraceObject(Reply):
    """Who leaked; "nobody" is an answer and no acquittal."""

    object: Literal["watermark.trace"] = "watermark.trace"
    watermark: str
    verdict: Literal["named", "nobody"]
    accused: list[SuspicionObject]
    ranked: list[SuspicionObject] = Field(description="the best of all, accused or not")
    num_users: int = Field(description="who ever had a signature from the codebook")
    num_bits: int
    num_decided: int
    alpha: float
    threshold: float | None = Field(description="null: no score would do")
    note: str
    not_compared: list[str] = Field(
        description="who also had bits that are not the codebook's, or do not open"
    )
    record: dict[str, Any] = Field(description="signed")

    @classmethod
    def of(cls, watermark: str, traced: Traced) -> TraceObject:
        """Return the wire form."""
        found = traced.trace
        return cls(
            watermark=watermark,
            verdict="nobody" if found.is_nobody else "named",
            accused=[SuspicionObject.of(one) for one in found.accused],
            ranked=[SuspicionObject.of(one) for one in found.ranked],
            num_users=found.num_users,
            num_bits=found.num_bits,
            num_decided=found.num_decided,
            alpha=found.alpha,
            threshold=found.threshold if math.isfinite(found.threshold) else None,
            note=found.note,
            not_compared=list(traced.by_hand),
            record=json.loads(traced.record),
        )
