"""Replacing a function of a library by one around it."""

import functools
from collections.abc import Callable
from typing import Any


def around(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Has `wrapper(original, *args, **kwargs)` answer calls of `owner.name`; a method's `self` comes with them."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(owner, name, replacement)


def silence(owner: Any, *names: str) -> None:
    """Has functions that write or send something do nothing, as far as this version of their library has them."""
    for name in names:
        if hasattr(owner, name):
            setattr(owner, name, lambda *args, **kwargs: None)
