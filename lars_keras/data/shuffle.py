"""The order of training examples, as a pure function of seed and position.

The training stream concatenates one permutation per epoch without end. A position in it is one integer: the number of
examples already consumed. So a run resumes from any position, at any batch size, and no permutation is held in memory.
"""

import numpy as np

from lars_keras.data.keyed import GOLDEN, Array, keys, splitmix64

_ROUNDS = 32  # two neighbors stay neighbors through all of them once in 2**32


def example_ids(positions: Array, n: int, seed: int) -> tuple[Array, Array]:
    """Map positions in the training stream to examples.

    Args:
        positions: uint64 array or tensor of any shape.
        n: number of training examples.
        seed: non-negative integer.

    Returns:
        Example ids in `range(n)`, and epochs. Both are uint64 and have the shape of `positions`. Each epoch contains
        every id exactly once.
    """
    epochs = positions // np.uint64(n)
    return permute(positions % np.uint64(n), keys(seed, epochs), n), epochs


def permute(places: Array, key: Array, n: int) -> Array:
    """Apply the permutation of `range(n)` that the key selects.

    This is a swap-or-not shuffle. Each round pairs every place with a partner, and a random bit of the pair decides
    whether the two swap.

    Source: Hoang, Morris and Rogaway 2012, "An enciphering scheme based on a card shuffle", figure 1.

    Args:
        places: uint64 in `range(n)`.
        key: uint64 of the same shape.
        n: size of the permutation, at most 2**32.

    Returns:
        uint64 of the same shape: where each place goes.
    """
    size = np.uint64(n)

    def swap_or_not(places: Array, key: Array) -> tuple[Array, Array]:
        key = key + np.uint64(GOLDEN)
        pivot = splitmix64(key)
        partner = (pivot % size + size - places) % size
        # Both places of a pair have this product, and no other pair of this pivot has it.
        swap = splitmix64(places * partner ^ pivot) // np.uint64(2**63)
        return places + swap * (partner - places), key

    if isinstance(places, np.ndarray | np.uint64):
        for _ in range(_ROUNDS):
            places, key = swap_or_not(places, key)
        return places
    import tensorflow as tf

    # A loop in the graph: unrolled, tracing and optimizing it take a second.
    state = places, key
    return tf.while_loop(lambda *_: True, swap_or_not, state, parallel_iterations=1, maximum_iterations=_ROUNDS)[0]
