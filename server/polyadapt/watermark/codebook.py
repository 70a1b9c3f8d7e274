"""Which bits a user's copy carries: keyed codes, and how their biases are drawn.

A row depends on the key, its version and the user's name alone: the same after a restart and on
every replica, with nothing stored and no order of sign-up to be read from it. Torch-free.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.keys import SecretKey

Kind = Literal["random", "nuida", "tardos"]
MAX_LENGTH = 1 << 14
MAX_COLLUDERS = 32
# Biases and what is compared with them are 32-bit integers: no row hangs on a rounding.
_ONE = 1 << 32


@dataclass(frozen=True, slots=True)
class Design:
    """How the biases of a code's positions are drawn, for coalitions of up to `max_colluders`.

    random  every bias 1/2. One leaker; the shortest code there is for that.
    nuida   Nuida et al., "An Improvement of Discrete Tardos Fingerprinting Codes" (2009): the nodes
            of the Gauss-Legendre quadrature with ceil(c / 2) points on [0, 1], each with its weight
            / sqrt(p (1 - p)). For c = 2 that is 1/2 again, which is 2-secure if long enough.
    tardos  Tardos, "Optimal Probabilistic Fingerprint Codes" (2003): p = sin(r)^2 with r uniform,
            cut off at 1 / (300 c).
    """

    kind: Kind
    max_colluders: int

    def __post_init__(self) -> None:
        least = 1 if self.kind == "random" else 2
        most = 1 if self.kind == "random" else MAX_COLLUDERS
        if self.kind not in get_args(Kind) or not least <= self.max_colluders <= most:
            raise InvalidRequest(
                f"no code {self.kind}{self.max_colluders}, expected {_EXPECTED}", param="codebook"
            )

    @classmethod
    def parse(cls, name: str) -> Design:
        """Return the design that `str` names, such as random, nuida4 or tardos6."""
        match = re.fullmatch(r"(nuida|tardos)([0-9]{1,3})", name)
        if name == "random":
            return cls("random", 1)
        if match is None:
            raise InvalidRequest(f"no code {name!r}, expected {_EXPECTED}", param="codebook")
        return cls("nuida" if match[1] == "nuida" else "tardos", int(match[2]))

    def __str__(self) -> str:
        return self.kind if self.kind == "random" else f"{self.kind}{self.max_colluders}"

    def draw_biases(self, uniform: NDArray[np.uint32]) -> NDArray[np.uint32]:
        """Return one bias per draw, as a share of 2^32: at least 1, never 0."""
        if self.kind == "tardos":
            cut_off = math.asin(math.sqrt(1 / (300 * self.max_colluders)))
            r = cut_off + (uniform / _ONE) * (math.pi / 2 - 2 * cut_off)
            return _fixed(np.sin(r) ** 2)
        nodes, shares = _quadrature(math.ceil(self.max_colluders / 2))
        bounds = np.round(np.cumsum(shares)[:-1] * _ONE).astype(np.uint64)
        return _fixed(nodes)[np.searchsorted(bounds, uniform.astype(np.uint64), side="right")]


_EXPECTED = f"random, nuidaC or tardosC with C from 2 to {MAX_COLLUDERS} colluders"


class Codebook:
    """The rows of all users under one key, and the secret biases that they were drawn with."""

    def __init__(
        self, key: SecretKey, design: Design, length: int, *, key_version: int = 1
    ) -> None:
        """Raise InvalidRequest for a length outside 1 to MAX_LENGTH."""
        if not 1 <= length <= MAX_LENGTH:
            raise InvalidRequest(
                f"a code of {length} bits, expected 1 to {MAX_LENGTH}", param="length"
            )
        self.design, self.length, self.key_version = design, length, key_version
        self._key = key
        drawn = _words(key.stream(4 * length, "code biases", str(design), length, key_version))
        self._fixed_biases = design.draw_biases(drawn)  # [length]

    @property
    def biases(self) -> NDArray[np.float64]:
        """The chance of a 1 at each position, exact: [length], in (0, 1)."""
        return self._fixed_biases / _ONE

    @functools.cached_property
    def commitment(self) -> str:
        """Hexadecimal; says which code it is, and to nobody without the key what its biases are."""
        drawn = hashlib.sha256(self._fixed_biases.astype("<u4").tobytes()).hexdigest()
        named = self._key.derive(
            "code commitment", str(self.design), self.length, self.key_version, drawn
        )
        return named.hex()

    def check(self, commitment: str) -> None:
        """Raise InvalidRequest unless the commitment is this code's: another key, another design,
        length or version, or a machine that draws other biases.
        """
        if not hmac.compare_digest(commitment.encode(), self.commitment.encode()):
            raise InvalidRequest(
                "the codebook does not match its commitment: the key, the design, the length or "
                "the key's version is another one; use those that the mark was made with"
            )

    def row(self, user: str) -> NDArray[np.uint8]:
        """Return the user's bits, [length]."""
        if not user:
            raise InvalidRequest("a user's name is empty; give what the key or tenant is called")
        drawn = _words(
            self._key.stream(4 * self.length, "code row", str(self.design), self.key_version, user)
        )
        return (drawn < self._fixed_biases).astype(np.uint8)

    def rows(self, users: Sequence[str]) -> NDArray[np.uint8]:
        """Return the bits of many users, [users, length]."""
        return np.stack([self.row(user) for user in users]) if users else self._no_rows()

    def __repr__(self) -> str:
        return f"Codebook({self.design}, {self.length} bits, key {self._key.id})"

    def _no_rows(self) -> NDArray[np.uint8]:
        return np.zeros((0, self.length), np.uint8)


def _words(stream: bytes) -> NDArray[np.uint32]:
    return np.frombuffer(stream, "<u4").astype(np.uint32)


def _fixed(biases: NDArray[np.float64]) -> NDArray[np.uint32]:
    return np.clip(np.round(biases * _ONE), 1, _ONE - 1).astype(np.uint32)


def _quadrature(num_points: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the biases of `nuida` and their shares, which add to 1."""
    nodes, weights = np.polynomial.legendre.leggauss(num_points)
    biases = (1 + nodes) / 2
    shares = weights / np.sqrt(biases * (1 - biases))
    return biases, shares / shares.sum()
