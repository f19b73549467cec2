"""Random numbers and crops keyed by example, in NumPy."""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(z: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 14.
    """
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(seed: int, epochs: np.ndarray, ids: np.ndarray, count: int) -> np.ndarray:
    """Returns the random numbers of each example: a pure function of (seed, epoch, id).

    They depend on neither the batch size, nor the worker, nor what was drawn before.

    Args:
        seed: non-negative integer.
        epochs, ids: int64 arrays of shape `(n,)`.
        count: how many numbers each example needs.

    Returns:
        A float32 array of shape `(n, count)`, uniform in [0, 1).
    """
    key: np.ndarray = np.full(len(ids), seed, np.uint64)
    for word in (epochs, ids):  # array arithmetic on uint64 wraps, as SplitMix64 wants
        key = _mix(key + _GOLDEN) ^ word.astype(np.uint64)
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    bits = _mix(_mix(key)[:, None] + steps) >> np.uint64(40)
    return bits.astype(np.float32) * np.float32(2.0**-24)  # 24 bits: exact, and below 1, in float32


def pad_crop_flip(images: np.ndarray, draws: np.ndarray, pad: int = 4) -> np.ndarray:
    """Pads with black, crops at random back to the same size, and flips half of the images.

    Source: He, Zhang, Ren and Sun 2015 (arXiv 1512.03385), section 4.2.

    Args:
        images: uint8 array of shape `(n, height, width, channels)`.
        draws: float32 array of shape `(n, 3)`, uniform in [0, 1): row, column, flip.
        pad: pixels of border on each side.

    Returns:
        A new uint8 array of the shape of `images`.
    """
    n, height, width, _ = images.shape
    padded = np.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(1, 2))
    rows, columns = (draws[:, :2] * (2 * pad + 1)).astype(np.int64).T
    cropped = np.moveaxis(windows[np.arange(n), rows, columns], 1, -1)
    flip = draws[:, 2, None, None, None] < 0.5
    return np.where(flip, cropped[:, :, ::-1], cropped)
