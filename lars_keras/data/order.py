"""The order of the training examples, a pure function of (seed, position).

The training stream is the endless concatenation of one permutation per epoch. A position in it is
one integer, the number of examples already used, so a run continues exactly from anywhere and at
any batch size.
"""

import functools

import numpy as np


@functools.lru_cache(maxsize=2)  # a batch may lie on both sides of an epoch's end
def permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of one epoch: an int64 permutation of `range(n)`, read-only."""
    order = np.random.default_rng([seed, epoch]).permutation(n)
    order.flags.writeable = False
    return order


def example_ids(positions: np.ndarray, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Maps positions in the training stream to examples.

    Args:
        positions: non-negative int64 array, any shape.
        n: number of training examples.
        seed: non-negative integer.

    Returns:
        Two int64 arrays of the shape of `positions`: the example ids in `range(n)`, and the epochs.
        Every id comes exactly once in each epoch.
    """
    epochs, places = np.divmod(positions, n)
    ids = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        ids[here] = permutation(n, seed, int(epoch))[places[here]]
    return ids, epochs
