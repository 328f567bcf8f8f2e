"""Vectors of recordings: mel energies of sound, movement of the joints of people.

Works on arrays; knows neither files nor data sets.
"""

import functools
from typing import Any

import numpy as np

WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010
MEL_BANDS = 40
# Windows are filled up with zeros: the lowest bands lie closer together than 1 / WINDOW_SECONDS.
FFT_SIZE = 512
# About the energy of a band when the samples are nothing but the rounding to 16 bits.
SILENCE = 1e-8
# Among the joints of a Kinect.
NECK, HIP_CENTRE = 2, 6

Array = np.ndarray[Any, np.dtype[Any]]


def log_mel(samples: Array, rate: int) -> Array:
    """Logarithms of the energies in mel bands, of one window each hop.

    Shapes: samples (n,), result (windows, MEL_BANDS).

    Source: Davis & Mermelstein 1980.
    """
    size, hop = round(WINDOW_SECONDS * rate), round(HOP_SECONDS * rate)
    samples = np.pad(samples, (0, max(0, size - len(samples))))
    windows = np.lib.stride_tricks.sliding_window_view(samples, size)[::hop]
    power = np.abs(np.fft.rfft(windows * np.hanning(size), FFT_SIZE)) ** 2
    return np.log(power @ mel_bands(rate) + SILENCE)


def with_deltas(vectors: Array) -> Array:
    """Vectors beside their slopes, which least squares fit over two steps before and two after.

    Shapes: vectors (steps, F), result (steps, 2F).

    Source: Furui 1986.
    """
    before, earlier, _, later, after = (
        np.pad(vectors, ((2, 2), (0, 0)), mode="edge")[shift : shift + len(vectors)]
        for shift in range(5)
    )
    return np.concatenate((vectors, (later - earlier + 2 * (after - before)) / 10), axis=1)


@functools.cache
def mel_bands(rate: int) -> Array:
    """Weights of the frequencies in each band: (FFT_SIZE // 2 + 1, MEL_BANDS).

    Triangles that overlap by half, of equal widths on the mel scale m = 2595 log10(1 + f / 700).
    """
    highest = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, highest, MEL_BANDS + 2) / 2595) - 1)
    frequencies = np.fft.rfftfreq(FFT_SIZE, 1 / rate)[:, None]
    lowest, centres, highest = edges[:-2], edges[1:-1], edges[2:]
    rising = (frequencies - lowest) / (centres - lowest)
    falling = (highest - frequencies) / (highest - centres)
    return np.maximum(0, np.minimum(rising, falling))


def movement(joints: Array) -> Array:
    """Positions relative to the hip centre, in lengths of the torso, and their changes a frame.

    Shapes: joints (frames, J, 3), result (frames, 2 · 3 · (J - 1)), without the hip centre.
    """
    torso = np.linalg.norm(joints[:, NECK] - joints[:, HIP_CENTRE], axis=1)
    relative = joints - joints[:, HIP_CENTRE, None]
    positions = np.delete(relative, HIP_CENTRE, axis=1).reshape(len(joints), -1)
    positions /= np.median(torso)
    velocities = np.diff(positions, axis=0, prepend=positions[:1])
    return np.concatenate((positions, velocities), axis=1)


def standardized(
    splits: dict[str, list[tuple[Array, str]]],
) -> dict[str, list[tuple[Array, str]]]:
    """Vectors whose features have mean 0 and deviation 1 over the training set."""
    steps = np.concatenate([vectors for vectors, _ in splits["train"]])
    mean, deviation = steps.mean(axis=0), steps.std(axis=0)
    # A feature that never changes stays 0.
    deviation[deviation == 0] = 1
    return {
        split: [((vectors - mean) / deviation, label) for vectors, label in examples]
        for split, examples in splits.items()
    }
