"""Checks of numbers and switches among arguments."""

import math
import numbers
from typing import Any

import numpy as np


def as_number(value: Any) -> Any:
    """Return a scalar of NumPy, TensorFlow, JAX or torch as a Python number, and any other value unchanged."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    try:
        array = np.asarray(value)
    except Exception:  # a tensor without a value, inside of a function that is being traced
        return value
    if array.ndim == 0 and (array.dtype.kind in "biuf" or array.dtype.name == "bfloat16"):
        return array.item()
    return value


def check_number(argument: str, value: Any, below: float = math.inf, above: float | None = None) -> float:
    """Return `value` as a float.

    Args:
        argument: its name, for the message.
        value: a number of Python, NumPy or a backend.
        below: the number must be less than this.
        above: the number must be more than this; at least 0 by default.

    Raises:
        ValueError: if it is not a number, or out of range.
    """
    number = as_number(value)
    is_number = isinstance(number, numbers.Real) and not isinstance(number, bool)
    if not is_number or not (0.0 <= number if above is None else above < number) or not number < below:
        low = "of at least 0" if above is None else f"above {above:g}"
        high = "" if below == math.inf else f" and below {below:g}"
        raise ValueError(f"`{argument}` must be a number {low}{high}. Received: {argument}={value!r}")
    return float(number)


def check_count(argument: str, value: Any, at_least: int = 0) -> int:
    """Return `value` as an int.

    Args:
        argument: its name, for the message.
        value: a whole number of Python, NumPy or a backend.
        at_least: the least allowed value.

    Raises:
        ValueError: if it is not a whole number, or too small.
    """
    number = as_number(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < at_least:
        raise ValueError(f"`{argument}` must be a whole number of at least {at_least}. Received: {argument}={value!r}")
    return number


def check_flag(argument: str, value: Any) -> bool:
    """Return `value` as a bool.

    Args:
        argument: its name, for the message.
        value: a bool of Python, NumPy or a backend.

    Raises:
        ValueError: if it is not a bool.
    """
    flag = as_number(value)
    if not isinstance(flag, bool):
        raise ValueError(f"`{argument}` must be True or False. Received: {argument}={value!r}")
    return flag
