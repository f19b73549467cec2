"""Counter-based random numbers: pure functions of a key, with the same bits in NumPy and in a TensorFlow graph.

The functions use operators only, so they accept a uint64 NumPy array or a uint64 tensor.
"""

from typing import Any

import numpy as np

Array = Any  # np.ndarray or tf.Tensor

GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(z: Array) -> Array:
    """Apply the finaliser of SplitMix64: a bijection of uint64 that scatters its input.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 14.
    """
    z = (z ^ (z // np.uint64(2**30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z // np.uint64(2**27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z // np.uint64(2**31))


def keys(seed: int, *words: Array) -> Array:
    """Return one uint64 key for each tuple of words. The words are uint64 arrays of one shape."""
    key = words[0] * np.uint64(0) + np.uint64(seed)
    for word in words:
        key = splitmix64(key + np.uint64(GOLDEN)) ^ word
    return splitmix64(key)


def uniforms(key: Array, count: int) -> Array:
    """Draw `count` uniform numbers for each key.

    Args:
        key: uint64 of shape `(n,)`.
        count: number of draws per key.

    Returns:
        float32 of shape `(n, count)`, uniform in [0, 1). Each is a multiple of 2^-24, so that float32 holds it exactly.
    """
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    bits = splitmix64(key[:, None] + steps) // np.uint64(2**40)
    return to_float32(bits) * np.float32(2.0**-24)


def to_float32(x: Array) -> Array:
    """Cast an array or tensor to float32."""
    if isinstance(x, np.ndarray):
        return x.astype(np.float32)
    import tensorflow as tf

    return tf.cast(x, tf.float32)
