"""Small pictures whose neighboring pixels are alike."""

import numpy as np

from lars_keras.data import ArrayData
from lars_keras.data.augment import pad_crop_flip


def pictures(n=40, size=12, seed=0):
    """Return smooth images, whose neighboring pixels are alike as those of photographs, and labels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (n, size // 4 + 1, size // 4 + 1, 3)).repeat(4, 1).repeat(4, 2)[:, :size, :size]
    images = coarse * 0.8 + rng.integers(0, 50, (n, size, size, 3))
    return images.astype("uint8"), rng.integers(0, 4, n)


def small_pictures(augment=None):
    """Return 40 training and 23 test images in four classes."""
    return ArrayData("small", pictures(40), pictures(23, seed=1), 4, crop_flip=pad_crop_flip, augment=augment)
