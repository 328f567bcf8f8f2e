"""Vectors of recordings: mel energies of sound, movement of the joints of people.

Works on arrays; knows neither files nor data sets.
"""

import functools
import itertools
from typing import Any

import numpy as np

WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010
MEL_BANDS = 40
# Windows are filled up with zeros: the lowest bands lie closer together than 1 / WINDOW_SECONDS.
FFT_SIZE = 512
# About the energy of a band when the samples are nothing but the rounding to 16 bits.
SILENCE = 1e-8
# Joints of a Kinect.
NECK, HIP_CENTRE, SHOULDERS, HIPS = 2, 6, (0, 1), (4, 5)
# Hands, ankles, head, elbows, neck and hip centre.
MOVING = (11, 12, 17, 18, 19, 9, 10, 2, 6)
# Groups of features of `movement`: vectors, changes over four frames, changes over eight.
MOVEMENT_GROUPS = 3

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
    """Vectors between MOVING joints, and their changes over four and eight frames.

    Lengths are in torsos. The person is turned about the vertical axis so that hips and shoulders
    face the camera on average; coordinates are smoothed over three frames.

    Shapes: joints (frames, J, 3), result (frames, MOVEMENT_GROUPS · 3 · P), P pairs of joints.
    """
    torso = np.median(np.linalg.norm(joints[:, NECK] - joints[:, HIP_CENTRE], axis=1))
    turned = facing_camera(_smoothed(joints)) / torso
    pairs = np.array(list(itertools.combinations(MOVING, 2)))
    vectors = (turned[:, pairs[:, 0]] - turned[:, pairs[:, 1]]).reshape(len(joints), -1)
    return np.concatenate((vectors, _change(vectors, 2), _change(vectors, 4)), axis=1)


def facing_camera(joints: Array) -> Array:
    """Joints turned about the vertical axis y, with hips and shoulders along x on average.

    Shapes: joints and result (frames, J, 3).
    """
    across = joints[:, HIPS[1]] - joints[:, HIPS[0]] + joints[:, SHOULDERS[1]]
    x, _, z = (across - joints[:, SHOULDERS[0]]).mean(axis=0)
    cosine, sine = np.array((x, z)) / (np.hypot(x, z) or 1)
    return joints @ np.array(((cosine, 0, -sine), (0, 1, 0), (sine, 0, cosine)))


def _smoothed(joints: Array) -> Array:
    padded = np.pad(joints, ((1, 1), (0, 0), (0, 0)), mode="edge")
    return (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4


def _change(vectors: Array, frames: int) -> Array:
    """Differences between `frames` after a frame and `frames` before it; the ends are repeated."""
    padded = np.pad(vectors, ((frames, frames), (0, 0)), mode="edge")
    return padded[2 * frames :] - padded[: -2 * frames]


def standardized(
    splits: dict[str, list[tuple[Array, str]]], groups: int | None = None
) -> dict[str, list[tuple[Array, str]]]:
    """Vectors whose features have mean 0 and deviation 1 over the training set.

    Args:
        splits: vectors (steps, F) and labels of each split.
        groups: number of groups of F / groups features that share one deviation, so that the noise
            of what hardly moves stays small; without it, each feature has its own.
    """
    steps = np.concatenate([vectors for vectors, _ in splits["train"]])
    mean, variance = steps.mean(axis=0), steps.var(axis=0)
    shared = variance.reshape(groups or len(variance), -1).mean(axis=1)
    # Features that never change stay 0.
    shared[shared == 0] = 1
    deviation = np.sqrt(np.repeat(shared, len(variance) // len(shared)))
    return {
        split: [((vectors - mean) / deviation, label) for vectors, label in examples]
        for split, examples in splits.items()
    }
