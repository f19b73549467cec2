"""The order of the training examples, a pure function of (seed, position).

The training stream is the endless concatenation of one permutation per epoch. A position in it is
one integer, the number of examples already used, so a run continues exactly from anywhere and at
any batch size, and no permutation is ever held in memory.
"""

import numpy as np

from lars_keras.data.keyed import GOLDEN, Array, keys, splitmix64

_ROUNDS = 32  # two neighbours stay neighbours through all of them once in 2**32


def example_ids(positions: Array, n: int, seed: int) -> tuple[Array, Array]:
    """Maps positions in the training stream to examples.

    Args:
        positions: uint64 array or tensor, any shape.
        n: number of training examples.
        seed: non-negative integer.

    Returns:
        Two uint64 arrays of the shape of `positions`: the example ids in `range(n)`, and the epochs.
        Every id comes exactly once in each epoch.
    """
    epochs = positions // np.uint64(n)
    return permuted(positions % np.uint64(n), keys(seed, epochs), n), epochs


def permuted(places: Array, key: Array, n: int) -> Array:
    """The image of each place under the permutation of `range(n)` that its key names.

    A swap-or-not shuffle: in every round each place has a partner, and a random bit that is the
    same for both says whether the two swap.

    Source: Hoang, Morris and Rogaway 2012, "An enciphering scheme based on a card shuffle", figure 1.

    Args:
        places: uint64 in `range(n)`.
        key: uint64 of the same shape.
        n: size of the permutation, at most 2**32.
    """
    size = np.uint64(n)
    for i in range(_ROUNDS):
        pivot = splitmix64(key + np.uint64((i + 1) * GOLDEN % 2**64))
        partner = (pivot % size + size - places) % size
        # places * partner is the same for the two, and for no other pair of this pivot.
        swap = splitmix64(places * partner ^ pivot) // np.uint64(2**63)
        places = places + swap * (partner - places)
    return places
