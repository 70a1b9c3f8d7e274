"""Codes: the same everywhere, distributed as their design says."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from polyadapt.errors import InvalidRequest
from polyadapt.watermark.codebook import MAX_LENGTH, Codebook, Design
from polyadapt.watermark.keys import SecretKey

KEY = SecretKey(bytes(range(32)))


@pytest.mark.parametrize("name", ["random", "nuida2", "nuida4", "nuida6", "nuida9", "tardos5"])
def test_a_design_is_named_by_its_text(name):
    assert str(Design.parse(name)) == name


@pytest.mark.parametrize(
    "name", ["", "Random", "random1", "nuida", "nuida1", "tardos33", "nuida-2"]
)
def test_another_name_is_refused_with_those_there_are(name):
    with pytest.raises(InvalidRequest, match="random, nuidaC or tardosC"):
        Design.parse(name)


# Nuida et al. (2009), table of the distributions for c up to 8.
PUBLISHED = {
    "nuida2": {0.5: 1.0},
    "nuida4": {0.21132: 0.5, 0.78868: 0.5},
    "nuida6": {0.11270: 0.33201, 0.5: 0.33598, 0.88730: 0.33201},
    "nuida8": {0.06943: 0.24833, 0.33001: 0.25167, 0.66999: 0.25167, 0.93057: 0.24833},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_nuidas_biases_and_their_shares_are_the_published_ones(name):
    every = np.linspace(0, 2**32 - 1, 200_001).astype(np.uint32)
    biases = Design.parse(name).draw_biases(every) / 2**32
    values, counts = np.unique(biases, return_counts=True)
    assert values == pytest.approx(sorted(PUBLISHED[name]), abs=1e-5)
    expected = [PUBLISHED[name][key] for key in sorted(PUBLISHED[name])]
    assert counts / len(every) == pytest.approx(expected, abs=2e-5)


def test_tardos_biases_follow_the_arcsine_law_within_the_cut_off():
    uniform = np.random.default_rng(1).integers(0, 2**32, 50_000, dtype=np.uint32)
    biases = Design.parse("tardos5").draw_biases(uniform) / 2**32
    assert biases.min() >= 1 / 1500 - 1e-9
    assert biases.max() <= 1 - 1 / 1500 + 1e-9
    for at in (0.1, 0.5, 0.7):
        assert (biases < at).mean() == pytest.approx(
            2 / math.pi * math.asin(math.sqrt(at)), abs=0.02
        )


def test_a_row_hangs_on_the_key_its_version_the_design_and_the_user_alone():
    book = Codebook(KEY, Design.parse("nuida4"), 128)
    row = book.row("alice")
    assert (row == Codebook(KEY, Design.parse("nuida4"), 128).row("alice")).all()
    assert (book.rows(["bob", "alice"])[1] == row).all()
    others = [
        Codebook(SecretKey(bytes(32)), Design.parse("nuida4"), 128).row("alice"),
        Codebook(KEY, Design.parse("nuida4"), 128, key_version=2).row("alice"),
        Codebook(KEY, Design.parse("nuida5"), 128).row("alice"),
        book.row("alicf"),
    ]
    for other in others:
        assert 20 < (row != other).sum() < 100


def test_rows_are_the_same_in_another_process():
    """Golden: what was issued once must be found again by every later release."""
    code = (
        "from polyadapt.watermark.codebook import *; from polyadapt.watermark.keys import *;"
        "book = Codebook(SecretKey(bytes(range(32))), Design.parse('nuida6'), 48);"
        "print(''.join(map(str, book.row('alice'))), book.commitment[:16])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [GOLDEN_ROW, GOLDEN_COMMITMENT]


GOLDEN_ROW = "101111011001010100101110000110111111101110110000"
GOLDEN_COMMITMENT = "86469c6bf7a36aa2"


@pytest.mark.parametrize("name", ["random", "nuida4", "nuida6", "tardos3"])
def test_bits_are_drawn_with_their_positions_biases_independently_of_each_other(name):
    book = Codebook(KEY, Design.parse(name), 64)
    rows = book.rows([f"user-{i}" for i in range(4000)])
    biases = book.biases
    spread = np.sqrt(biases * (1 - biases) / len(rows))
    assert np.abs((rows.mean(axis=0) - biases) / spread).max() < 4.5
    centred = (rows - biases) / np.sqrt(biases * (1 - biases))
    correlations = (centred.T @ centred / len(rows))[np.triu_indices(64, 1)]
    assert np.abs(correlations).max() < 0.15 if name == "tardos3" else 0.08


def test_the_commitment_finds_another_key_design_length_or_version():
    book = Codebook(KEY, Design.parse("nuida4"), 64)
    book.check(book.commitment)
    for other in (
        Codebook(SecretKey(bytes(32)), Design.parse("nuida4"), 64),
        Codebook(KEY, Design.parse("nuida6"), 64),
        Codebook(KEY, Design.parse("nuida4"), 65),
        Codebook(KEY, Design.parse("nuida4"), 64, key_version=2),
    ):
        with pytest.raises(InvalidRequest, match="does not match its commitment"):
            other.check(book.commitment)


def test_neither_repr_nor_commitment_shows_biases_or_rows():
    book = Codebook(KEY, Design.parse("random"), 16)
    assert repr(book) == f"Codebook(random, 16 bits, key {KEY.id})"


@pytest.mark.parametrize("length", [0, -1, MAX_LENGTH + 1])
def test_a_length_out_of_bounds_is_refused(length):
    with pytest.raises(InvalidRequest, match="expected 1 to"):
        Codebook(KEY, Design.parse("random"), length)


def test_a_nameless_user_is_refused():
    with pytest.raises(InvalidRequest, match="empty"):
        Codebook(KEY, Design.parse("random"), 8).row("")
    assert Codebook(KEY, Design.parse("random"), 8).rows([]).shape == (0, 8)
