"""Data sets: batches of (images, labels, mask) in an exact order, with random access to any batch.

`import lars_keras.data` and `ArrayData.train_numpy` need no TensorFlow.
"""

from lars_keras.data.arrays import ArrayData
from lars_keras.data.augment import MIXES, pad_crop_flip
from lars_keras.data.base import AUGMENTS, ImageData
from lars_keras.data.image_files import ImageFileData
from lars_keras.data.loading import ANY_SIZE, CACHES, NAMES, load

__all__ = [
    "ANY_SIZE",
    "AUGMENTS",
    "CACHES",
    "MIXES",
    "NAMES",
    "ArrayData",
    "ImageData",
    "ImageFileData",
    "load",
    "pad_crop_flip",
]
