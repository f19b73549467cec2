"""Describe the shapes and dtypes of a batch, without an example of it."""

import dataclasses
from typing import Any

import keras


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """One array of a batch.

    Attributes:
        shape: shape of one example.
        dtype: name, such as `"uint8"`.
    """

    shape: tuple[int, ...]
    dtype: str


def parse_array(text: str) -> ArraySpec:
    """Read `"DTYPE:SIZE,SIZE,..."`, such as `"uint8:224,224,3"`; `"int32"` is one number per example.

    Raises:
        ValueError: if the text has another form.
    """
    dtype, _, sizes = text.partition(":")
    try:
        shape = tuple(int(size) for size in sizes.split(",") if size)
        if any(size < 1 for size in shape):
            raise ValueError
        return ArraySpec(shape, keras.backend.standardize_dtype(dtype))
    except ValueError:
        raise ValueError(
            f"An array of a batch must be DTYPE:SIZE,SIZE,... of one example, such as uint8:224,224,3 or int32. "
            f"Received: {text!r}"
        ) from None


def parse_batch(structure: Any) -> tuple[Any, ...]:
    """Return the `ArraySpec`s of a batch.

    Args:
        structure: `(x, y)` or `(x, y, sample_weight)`, each a nested structure. A leaf is a text for `parse_array`, or
            has `dtype` and `shape`, whose first dimension is the batch: an array, a `keras.KerasTensor`, a
            `tf.TensorSpec` or a `jax.ShapeDtypeStruct`.

    Raises:
        ValueError: if it is not a pair or triple, or a leaf has an unknown size.
    """
    if not isinstance(structure, list | tuple) or len(structure) not in (2, 3):
        raise ValueError(f"`batch_spec` must be (x, y) or (x, y, sample_weight). Received: {structure!r}")
    return tuple(keras.tree.map_structure(_array, part) for part in structure)


def _array(leaf: Any) -> ArraySpec:
    if isinstance(leaf, ArraySpec):
        return leaf
    if isinstance(leaf, str):
        return parse_array(leaf)
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise ValueError(
            "A leaf of `batch_spec` must be a text such as 'uint8:224,224,3', or have `shape` and `dtype`. "
            f"Received: {leaf!r}"
        )
    shape = tuple(leaf.shape)
    if not shape or any(size is None for size in shape[1:]):
        raise ValueError(
            "A leaf of `batch_spec` must have a batch dimension and a known size in every other. "
            f"Received: shape={shape}"
        )
    dtype = getattr(leaf.dtype, "name", None) or leaf.dtype
    return ArraySpec(tuple(int(size) for size in shape[1:]), keras.backend.standardize_dtype(dtype))
