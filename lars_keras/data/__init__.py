"""Data sets: exactly ordered, randomly accessible batches of (images, labels).

Importing this package, and using `ArrayData`, needs neither TensorFlow nor Keras.
"""

from lars_keras.data.arrays import ArrayData
from lars_keras.data.augment import MIXES
from lars_keras.data.base import AUGMENTS, ImageData
from lars_keras.data.image_files import ImageFileData
from lars_keras.data.loading import ANY_SIZE, CACHES, NAMES, load

__all__ = ["ANY_SIZE", "AUGMENTS", "CACHES", "MIXES", "NAMES", "ArrayData", "ImageData", "ImageFileData", "load"]
