"""The PRF: the published SipHash and splitmix64, and the same bits in numpy and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from polyadapt.watermark.prf import siphash, spread

MASK = (1 << 64) - 1


def signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def array(*words: int) -> np.ndarray:
    return np.array([signed(word) for word in words], dtype=np.int64)


# Key 00 01 ... 0f; the messages 00 01 ... of 8 and 16 bytes of the authors' test vectors.
K0, K1 = array(0x0706050403020100), array(0x0F0E0D0C0B0A0908)
M0, M1 = array(0x0706050403020100), array(0x0F0E0D0C0B0A0908)


@pytest.mark.parametrize(
    ("words", "expected"), [([M0], 0x93F5F5799A932462), ([M0, M1], 0x3F2ACC7F57C29BDB)]
)
def test_siphash_gives_the_authors_vectors(words, expected):
    assert int(siphash(K0, K1, words)[0]) & MASK == expected


def splitmix64(seed: int, count: int) -> list[int]:
    """The published generator, in plain integers."""
    found = []
    for _ in range(count):
        seed = (seed + 0x9E3779B97F4A7C15) & MASK
        z = seed
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append(z ^ (z >> 31))
    return found


def test_spread_gives_the_outputs_of_splitmix64():
    assert splitmix64(1234567, 1) == [6457827717110365317]  # of the generator's usual test
    for seed in (0, 1234567, MASK, 1 << 63):
        found = spread(array(seed), np.arange(50))
        assert [int(word) & MASK for word in found] == splitmix64(seed, 50)


def test_numpy_and_torch_give_the_same_bits():
    rng = np.random.default_rng(0)
    keys, contexts = (rng.integers(-(2**63), 2**63, (20, n)) for n in (2, 4))
    ids = np.arange(1000)[None]

    def words(k, c, i):
        columns = [c[:, n] for n in range(4)]
        return spread(siphash(k[:, 0], k[:, 1], columns)[:, None], i)

    expected = words(keys, contexts, ids)
    found = words(*(torch.from_numpy(a) for a in (keys, contexts, ids)))
    assert found.dtype == torch.int64
    assert (found.numpy() == expected).all()


def test_every_bit_of_a_word_is_a_fair_coin_and_none_is_anothers():
    words = spread(array(*range(40))[:, None], np.arange(1000)[None]).ravel()
    bits = np.stack([(words >> layer) & 1 for layer in range(64)])
    assert np.abs(bits.mean(axis=1) - 0.5).max() < 4.5 * 0.5 / np.sqrt(40_000)
    correlations = np.corrcoef(bits)[np.triu_indices(64, 1)]
    assert np.abs(correlations).max() < 5 / np.sqrt(40_000)


def test_a_context_and_its_key_change_everything():
    base = siphash(K0, K1, [M0])
    for other in (
        siphash(K0 ^ 1, K1, [M0]),
        siphash(K0, K1 ^ 1, [M0]),
        siphash(K0, K1, [M0 ^ 1]),
        siphash(K0, K1, [M0, M0 * 0]),
    ):
        assert 15 < bin((int(base[0]) ^ int(other[0])) & MASK).count("1") < 50
