"""Training methods: a built-in one by its name, a researcher's own by the dotted path of its module."""

from __future__ import annotations

import importlib
import inspect

from engine.errors import UserError
from engine.methods.base import Method

BUILT_IN = {"dcl": "engine.methods.base", "salcr": "engine.methods.salcr", "firm": "engine.methods.firm"}


def find(name: str) -> type[Method]:
    """The `Method` class that `method.name` names.

    Raises:
        UserError: no such module, or a module that does not define exactly one `Method`.
    """
    if name not in BUILT_IN and "." not in name:
        raise UserError(
            f"method.name: no method '{name}'; built in: {', '.join(BUILT_IN)}; your own: the dotted path of its module"
        )
    path = BUILT_IN.get(name, name)
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise UserError(f"method.name: cannot import '{path}' ({error}); is its folder on PYTHONPATH?") from error
    found = [item for _, item in inspect.getmembers(module, inspect.isclass) if item.__module__ == path]
    classes: list[type[Method]] = [item for item in found if issubclass(item, Method)]
    if len(classes) != 1:
        raise UserError(f"method.name: {path} must define exactly one Method, found {len(classes)}")
    return classes[0]


def section(name: str) -> str:
    """The YAML section of a method's settings: the last part of its name."""
    return name.rpartition(".")[2]
