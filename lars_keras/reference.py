"""Functions that a command names, such as the model of a user."""

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Reference:
    """A function by name, imported when it is called.

    Attributes:
        name: `"package.module:function"`.
        argument: name of the argument that holds it, for messages.
    """

    name: str
    argument: str

    def resolve(self) -> Callable[..., Any]:
        """Import the function.

        Raises:
            ValueError: if there is no such module or function.
        """
        module, _, function = self.name.partition(":")
        received = f"Received: {self.argument}={self.name}"
        if not (module and function):
            raise ValueError(f"`{self.argument}` must be package.module:function. {received}")
        try:
            found: Any = importlib.import_module(module)
        except ModuleNotFoundError as e:
            if e.name and (module == e.name or module.startswith(e.name + ".")):
                raise ValueError(f"`{self.argument}`: there is no module {e.name} on sys.path. {received}") from None
            raise
        for part in function.split("."):
            if not hasattr(found, part):
                raise ValueError(f"`{self.argument}`: {module} has no function {function}. {received}")
            found = getattr(found, part)
        if not callable(found):
            raise ValueError(f"`{self.argument}`: {function} is a {type(found).__name__}, not a function. {received}")
        return found

    def __call__(self) -> Any:
        """Call the function."""
        return self.resolve()()
