"""The `digits` data set: scikit-learn's handwritten digits, as a tensorflow-datasets builder.

It needs no network. The test split holds real digits. The training split holds warps of the other digits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

SIZE = 16
NUM_TRAIN = 6 * 8192
NUM_SOURCES = 1347  # training image i is a warp of training digit i % NUM_SOURCES
_SEED = 1797
_FINE = 8  # the warps sample a copy of each 8x8 digit enlarged this many times


def split_sources(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split the original digits: a quarter of each class for the test.

    Args:
        labels: integer labels of the originals.

    Returns:
        Indices of the training digits and of the test digits, both sorted.
    """
    random = np.random.default_rng(_SEED)
    test = []
    for digit in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == digit))
        test.append(members[: round(len(members) / 4)])
    chosen = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen


def warp(digits: np.ndarray, which: np.ndarray, random: np.random.Generator | None = None) -> np.ndarray:
    """Enlarge 8x8 digits to 16x16 by cubic splines, each under its own random warp if `random` is given.

    A warp consists of a rotation (up to 15 degrees), a scale (15 % along each axis), a shear (0.2), a shift (0.8 of an
    original pixel) and a smooth displacement (standard deviation 0.35 of an original pixel on a 4x4 grid).

    Args:
        digits: float `(m, 8, 8)`, values 0 to 16.
        which: int `(n,)`, the indices of the digits to enlarge.
        random: source of the warps; None enlarges without a warp.

    Returns:
        uint8 `(n, 16, 16, 1)`, values 0 to 255.
    """
    from scipy import ndimage

    n = len(which)
    # Coordinates of the new pixels relative to the center, in original pixels: (2, 16 * 16).
    axis = (np.arange(SIZE, dtype=np.float32) + 0.5) / 2 - 4
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij")).reshape(2, -1)
    if random is None:
        points = np.broadcast_to(grid, (n, 2, SIZE * SIZE))
    else:

        def uniform(limit, *shape):
            return random.uniform(-limit, limit, shape).astype(np.float32)

        angle, shear = uniform(np.radians(15), n), uniform(0.2, n)
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.stack([cos, -sin, sin, cos], axis=-1).reshape(n, 2, 2)
        turn[:, :, 1] += shear[:, None] * turn[:, :, 0]
        matrix = turn * np.exp(uniform(0.15, n, 1, 2))
        smooth = _enlarge(random.normal(0, 0.35, (n, 2, 4, 4)).astype(np.float32), 4)
        points = matrix @ grid + uniform(0.8, n, 2, 1) + smooth.reshape(n, 2, -1)
    rows, columns = np.moveaxis((points + 4) * _FINE - 0.5, 1, 0)
    layers = np.broadcast_to(which.astype(np.float32)[:, None], rows.shape)
    fine = _enlarge(digits, _FINE)
    pixels = ndimage.map_coordinates(fine, [layers, rows, columns], order=1)
    return np.clip(np.rint(pixels * (255 / 16)), 0, 255).astype(np.uint8).reshape(n, SIZE, SIZE, 1)


def _enlarge(images: np.ndarray, factor: int) -> np.ndarray:
    """Enlarge the last two (equal) axes by cubic splines, as two matrix products."""
    from scipy import ndimage

    unit = np.eye(images.shape[-1], dtype=np.float32)
    along = ndimage.zoom(unit, (factor, 1), order=3, mode="nearest", grid_mode=True)
    return along @ images @ along.T


class Digits(tfds.core.GeneratorBasedBuilder):
    """Real handwritten digits, enlarged to 16x16.

    - test: 450 digits, a quarter of each class, enlarged and otherwise untouched.
    - train: 49,152 random warps of the other 1,347 digits. No warp of a test digit is among them.

    The feature `source` is the index of the original in `sklearn.datasets.load_digits`. The split
    is by digit, not by writer: a writer's digits are in both.
    """

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    # Raw bytes: encoding PNGs one by one would take most of the preparation.
                    "image": tfds.features.Tensor(
                        shape=(SIZE, SIZE, 1),
                        dtype=np.uint8,
                        encoding=tfds.features.Encoding.BYTES,
                    ),
                    "label": tfds.features.ClassLabel(num_classes=10),
                    "source": np.int64,
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            citation=(
                "Alpaydin, E. and Kaynak, C. (1998). Optical Recognition of Handwritten Digits. "
                "UCI Machine Learning Repository."
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        train, test = split_sources(digits.target)
        sources = train[np.arange(NUM_TRAIN) % NUM_SOURCES]
        random = np.random.default_rng(_SEED)
        return {
            "train": self._generate_examples(digits, sources, random),
            "test": self._generate_examples(digits, test, None),
        }

    def _generate_examples(self, digits, sources: np.ndarray, random) -> Iterator[tuple[int, dict]]:
        for start in range(0, len(sources), 8192):
            block = sources[start : start + 8192]
            images = warp(digits.images.astype(np.float32), block, random)
            for i, (source, image) in enumerate(zip(block, images, strict=True)):
                yield start + i, {"image": image, "label": digits.target[source], "source": source}
