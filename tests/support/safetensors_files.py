"""Safetensors files written byte by byte, honest or lying."""

from __future__ import annotations

import json
import struct
from typing import Any


def file_bytes(
    header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None
) -> bytes:
    """A file with this header (text is taken as it is), this announced header length and
    this data.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    """A header entry."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# name -> (file, code of a problem that must be found). Each lies about something.
LYING_FILES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated_file"),
    "seven bytes": (b"\0" * 7, "truncated_file"),
    "length only": (struct.pack("<Q", 0), "invalid_header"),
    "header longer than the file": (file_bytes(b"{}", length=1000), "truncated_file"),
    "header of 2^63 bytes": (file_bytes(b"{}", length=1 << 63), "truncated_file"),
    "header over the limit": (file_bytes(b"{" + b" " * (5 << 20) + b"}"), "header_too_large"),
    "header is no JSON": (file_bytes(b"{nonsense}"), "invalid_json"),
    "header begins with a space": (file_bytes(b" {}"), "invalid_header"),
    "header is a list": (file_bytes(b"[]"), "invalid_header"),
    "header is not UTF-8": (file_bytes(b'{"\xff": 1}'), "invalid_json"),
    "header nested without end": (file_bytes(b'{"a":' * 100_000), "json_too_deep"),
    "header cut in the middle": (file_bytes(b'{"a": {"dtype": "F32"'), "invalid_json"),
    "duplicate tensor": (
        file_bytes(
            b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
            b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
            b"\0" * 4,
        ),
        "duplicate_key",
    ),
    "duplicate key in an entry": (
        file_bytes(b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}'),
        "duplicate_key",
    ),
    "NaN in the header": (
        file_bytes(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'),
        "non_finite_number",
    ),
    "metadata of numbers": (file_bytes({"__metadata__": {"format": 3}}), "invalid_header"),
    "entry is a list": (file_bytes({"a": []}), "invalid_header"),
    "entry without a shape": (
        file_bytes({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, b"\0" * 4),
        "invalid_header",
    ),
    "entry with more": (
        file_bytes({"a": entry([1], 0, 4) | {"scale": 2}}, b"\0" * 4),
        "invalid_header",
    ),
    "unknown dtype": (file_bytes({"a": entry([1], 0, 4, "F33")}, b"\0" * 4), "unsupported_dtype"),
    "integer dtype": (file_bytes({"a": entry([4], 0, 4, "I8")}, b"\0" * 4), "unsupported_dtype"),
    "boolean dtype": (file_bytes({"a": entry([1], 0, 1, "BOOL")}, b"\x07"), "unsupported_dtype"),
    "eight-bit dtype": (
        file_bytes({"a": entry([4], 0, 4, "F8_E4M3")}, b"\0" * 4),
        "unsupported_dtype",
    ),
    "dtype is a number": (
        file_bytes({"a": {"dtype": 1, "shape": [1], "data_offsets": [0, 4]}}, b"\0" * 4),
        "unsupported_dtype",
    ),
    "negative size": (file_bytes({"a": entry([-1], 0, 4)}, b"\0" * 4), "invalid_shape"),
    "fractional size": (file_bytes({"a": entry([1.0], 0, 4)}, b"\0" * 4), "invalid_shape"),
    "boolean size": (file_bytes({"a": entry([True], 0, 4)}, b"\0" * 4), "invalid_shape"),
    "shape is a number": (
        file_bytes({"a": {"dtype": "F32", "shape": 1, "data_offsets": [0, 4]}}, b"\0" * 4),
        "invalid_shape",
    ),
    "overflowing shape": (file_bytes({"a": entry([1 << 40, 1 << 40], 0, 4)}), "invalid_shape"),
    "overflow hidden by a zero": (file_bytes({"a": entry([0, 1 << 62], 0, 0)}), "invalid_shape"),
    "five thousand dimensions": (file_bytes({"a": entry([1] * 5000, 0, 4)}), "invalid_shape"),
    "range smaller than the shape": (
        file_bytes({"a": entry([2], 0, 4)}, b"\0" * 4),
        "invalid_offsets",
    ),
    "range larger than the shape": (
        file_bytes({"a": entry([1], 0, 8)}, b"\0" * 8),
        "invalid_offsets",
    ),
    "range backwards": (file_bytes({"a": entry([1], 4, 0)}, b"\0" * 4), "invalid_offsets"),
    "range below zero": (file_bytes({"a": entry([1], -4, 0)}, b"\0" * 4), "invalid_offsets"),
    "range beyond the file": (file_bytes({"a": entry([1], 0, 4)}), "truncated_file"),
    "range with a gap": (
        file_bytes({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12),
        "invalid_offsets",
    ),
    "overlapping ranges": (
        file_bytes({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12),
        "invalid_offsets",
    ),
    "two names for one range": (
        file_bytes({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, b"\0" * 4),
        "invalid_offsets",
    ),
    "bytes behind the last tensor": (
        file_bytes({"a": entry([1], 0, 4)}, b"\0" * 5),
        "invalid_offsets",
    ),
    "first tensor not at zero": (
        file_bytes({"a": entry([1], 4, 8)}, b"\0" * 8),
        "invalid_offsets",
    ),
    "name climbs out": (
        file_bytes({"../../etc/passwd": entry([1], 0, 4)}, b"\0" * 4),
        "invalid_tensor_name",
    ),
    "name with NUL": (
        file_bytes({"a\0b": entry([1], 0, 4)}, b"\0" * 4),
        "invalid_tensor_name",
    ),
    "name with a newline": (
        file_bytes({"a\nb": entry([1], 0, 4)}, b"\0" * 4),
        "invalid_tensor_name",
    ),
    "name with a lone surrogate": (
        file_bytes(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        "invalid_tensor_name",
    ),
    "empty name": (file_bytes({"": entry([1], 0, 4)}, b"\0" * 4), "invalid_tensor_name"),
    "name of 10,000 characters": (
        file_bytes({"a" * 10_000: entry([1], 0, 4)}, b"\0" * 4),
        "invalid_tensor_name",
    ),
    "too many tensors": (
        file_bytes({f"t{i}": entry([0], 0, 0) for i in range(40_000)}),
        "too_many_tensors",
    ),
    "pickle": (b"\x80\x04\x95\x20\x00\x00\x00\x00" + b"\0" * 64, "pickle_refused"),
    "torch archive": (b"PK\x03\x04" + b"\0" * 2 + b"\x08\x08" + b"\0" * 64, "pickle_refused"),
}
