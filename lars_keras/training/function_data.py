"""Hold data that are given as a function, and call it so that looking at the shapes costs no batch."""

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from lars_keras.training.inputs import first_batches


class FunctionData:
    """Calls a function of data. Batches that can be read only once, and were looked at, are given to the next call.

    Args:
        function: of an `InputContext`, for training also of an update; returns batches. Its attributes are visible
            here, too.
        given: what the user gave, if it is not the function.
    """

    def __init__(self, function: Callable[..., Any], given: Any = None):
        self.function = function
        self.given = function if given is None else given
        self._opened: tuple[Any, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "function":  # of copies that are not initialized yet
            raise AttributeError(name)
        return getattr(self.function, name)

    def __call__(self, context: Any, *first_update: int) -> Any:
        opened, self._opened = self._opened, None
        if opened and opened[0] == _place(context, *first_update):
            return opened[1]
        return self.function(context, *first_update)

    def look(self, context: Any, *first_update: int) -> Any:
        """Return the batches to look at the first one; the next call with the same place gives that one again."""
        opened, self._opened = self._opened, None
        known = opened and opened[0] == _place(context, *first_update)
        batches = opened[1] if opened and known else self.function(context, *first_update)
        if not isinstance(batches, Iterator):
            return batches
        first = first_batches(batches, 1)
        self._opened = _place(context, *first_update), itertools.chain(first, batches)
        return first


def _place(context: Any, *first_update: int) -> tuple[int, ...]:
    """Return the place of a reader; TensorFlow makes several contexts of one place, which are not equal."""
    return context.num_input_pipelines, context.input_pipeline_id, context.num_replicas_in_sync, *first_update


def check_called(x: Any, remedy: str, *arguments: Any) -> None:
    """Refuse a generator function that cannot be called with these arguments: its generator was meant.

    Args:
        x: a function.
        remedy: what to do, with `{}` in place of the generator.
        *arguments: what the function will be called with.

    Raises:
        ValueError: for such a function.
    """
    if not inspect.isgeneratorfunction(x):
        return
    try:
        inspect.signature(x).bind(*arguments)
    except TypeError:
        advice = remedy.format(f"{x.__name__}()")
        raise ValueError(f"A generator function is not data. {advice}. Received: {x.__name__}") from None
