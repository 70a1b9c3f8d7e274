"""A record of what was asked, found and concluded, signed so that nobody can change it unseen.

Signed is canonical JSON: sorted keys, no spaces, UTF-8, no floats. On such values it is what
RFC 8785 prescribes, so that any language can check a record. Torch-free.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from polyadapt.errors import EvidenceRejected
from polyadapt.watermark.keys import SecretKey
from polyadapt.watermark.statistics import BitReading
from polyadapt.watermark.trace import Trace
from polyadapt_store.strict_json import StrictJsonError, parse_object

_VERSION = 1  # of the records' form
_ALGORITHM = "ed25519"
_MAX_BYTES = 16 << 20
_LARGEST = 2**53 - 1  # the largest integer that every JSON reader keeps


class Signer:
    """The signing key of one mark, derived from its secret."""

    def __init__(self, key: SecretKey) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(key.derive("evidence"))

    @property
    def public_key(self) -> str:
        """Base64 of the 32 bytes that check a signature (RFC 8032). To be published beforehand."""
        return base64.b64encode(self._private.public_key().public_bytes_raw()).decode("ascii")

    def sign(self, record: Mapping[str, Any]) -> str:
        """Return the signed record as JSON for a file; raises ValueError for a record that
        `canonical` does not take.
        """
        signature = base64.b64encode(self._private.sign(canonical(record))).decode("ascii")
        signed = {
            "record": record,
            "signature": {
                "algorithm": _ALGORITHM,
                "public_key": self.public_key,
                "value": signature,
            },
        }
        return json.dumps(signed, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def __repr__(self) -> str:
        return f"Signer({self.public_key})"


def head(kind: str) -> dict[str, Any]:
    """Return what every record begins with: its form's version, its kind, and when it was made."""
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"version": _VERSION, "kind": kind, "created": created}


def verify(signed: bytes, public_key: str) -> dict[str, Any]:
    """Return the record of a signed file; raises EvidenceRejected unless that key signed just it.

    `public_key` must come from elsewhere than the file: who forges a record also writes a key.
    """
    if len(signed) > _MAX_BYTES:
        raise EvidenceRejected(f"the record has {len(signed)} bytes, at most {_MAX_BYTES}")
    try:
        fields = parse_object(signed, where="the record", max_depth=16)
    except StrictJsonError as error:
        raise EvidenceRejected(str(error)) from None
    record, signature = fields.get("record"), fields.get("signature")
    if set(fields) != {"record", "signature"} or not isinstance(record, dict):
        raise EvidenceRejected("the file holds no signed record; expected `record`, `signature`")
    known = {"algorithm", "public_key", "value"}
    if not isinstance(signature, dict) or set(signature) != known:
        raise EvidenceRejected(f"the signature has other fields than {', '.join(sorted(known))}")
    if signature["algorithm"] != _ALGORITHM:
        raise EvidenceRejected(f"the signature's algorithm is not {_ALGORITHM}")
    if signature["public_key"] != public_key:
        raise EvidenceRejected(
            "the record is signed by another key than the one that is trusted; ask the mark's "
            "owner for the public key and how it was published"
        )
    try:
        key = Ed25519PublicKey.from_public_bytes(_decode(public_key))
        key.verify(_decode(signature["value"]), canonical(record))
    except (InvalidSignature, ValueError):
        raise EvidenceRejected(
            "the signature does not fit the record: it was changed after it was signed"
        ) from None
    return record


def canonical(value: Any) -> bytes:
    """Return the one text of a value of objects, lists, strings, whole numbers, booleans and null.

    Raises ValueError for anything else, floats included: probabilities are strings in a record, as
    readers of JSON disagree about how a float is written.
    """
    _check(value, "record")
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8")


def number(value: float) -> str:
    """Return a probability or a rate as a record holds it: the shortest text that is it."""
    return repr(float(value))


def without_floats(value: Any) -> Any:
    """Return the value with every float in it as `number` writes it."""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        return {key: without_floats(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_floats(item) for item in value]
    return value


def digest(data: bytes) -> str:
    """Return sha256:<hex>, by which a record names what it must not show."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def describe_readings(readings: tuple[BitReading, ...]) -> list[dict[str, Any]]:
    """Return what each bit's triggers were answered, as a record holds it."""
    return [
        {
            "value": reading.value,
            "hits": list(reading.num_hits),
            "queries": reading.num_queries,
            "p_value": number(reading.p_value),
        }
        for reading in readings
    ]


def describe_trace(found: Trace) -> dict[str, Any]:
    """Return who was named and at what error, as a record holds it."""
    fields = asdict(found)
    fields["verdict"] = "nobody" if found.is_nobody else "named"
    return without_floats(fields)  # type: ignore[no-any-return]


def _check(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or not key.isascii():
                # RFC 8785 sorts keys by UTF-16 units, which for ASCII is every order there is.
                raise ValueError(f"a key of {where} is no ASCII string")
            _check(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    elif isinstance(value, float):
        raise ValueError(f"{where} is a float; write it as a string, with number()")
    elif isinstance(value, int):
        if abs(value) > _LARGEST:
            raise ValueError(f"{where} is beyond 2^53; write it as a string")
    elif value is not None and not isinstance(value, str):
        raise ValueError(f"{where} is a {type(value).__name__}, which a record cannot hold")


def _decode(text: Any) -> bytes:
    if not isinstance(text, str):
        raise ValueError("not a string")
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
