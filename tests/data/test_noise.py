import numpy as np
import pytest

from lmtrain.data import noise as module
from lmtrain.data.noise import Noise

# Pairs: 01 10 02 20 01 13. After 0 come 1 and 2, after 1 come 0 and 3, after 2 comes 0.
IDS = np.array([0, 1, 0, 2, 0, 1, 3], np.uint16)
RATES = [2 / 3, 1, 1, 0, 0]
DRAWN = [0.4, 0.2, 0.2, 0.2, 0]


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_replacements_follow_the_counts_of_pairs(monkeypatch, chunk):
    monkeypatch.setattr(module, "_CHUNK", chunk)
    noise = Noise(IDS, 5, 0.5)
    tokens = np.arange(5).repeat(20_000).reshape(50, 2000)

    noised = noise(tokens, np.random.default_rng(1))

    for token, rate in enumerate(RATES):
        counts = np.bincount(noised[tokens == token], minlength=5) / 20_000
        expected = 0.5 * rate * np.array(DRAWN)
        expected[token] += 1 - 0.5 * rate
        # Six standard deviations of a fraction of 20,000.
        assert np.abs(counts - expected).max() < 6 * (0.25 / 20_000) ** 0.5


def test_the_generator_gives_the_noise():
    noise, tokens = Noise(IDS, 5, 1.0), np.tile(np.arange(5), (9, 9))
    first, second, other = (noise(tokens, np.random.default_rng(seed)) for seed in (1, 1, 2))

    assert (first == second).all()
    assert (first != other).any()
