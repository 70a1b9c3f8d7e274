"""Signatures of users and who must have one, on the wire."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from polyadapt.api.schemas.base import Body, Reply
from polyadapt_store.signatures import Signature


class SignatureRequest(Body):
    """The bits of a user."""

    signature: str = Field(
        min_length=1,
        max_length=1024,
        description="as characters 0 and 1, or in hexadecimal digits, the first bits first",
    )


class SignatureObject(Reply):
    """One generation of a user's signature; its bits are there for admins alone."""

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
