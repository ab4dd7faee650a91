"""Training methods: a built-in one by its name, a researcher's own by the dotted path of its module."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def refuse_foreign(content: dict[str, Any], overrides: Sequence[str], source: Path) -> None:
    """Raise a `UserError` where settings that came in a file would have a module run that the user did not ask for.

    Args:
        content: of the settings, unchecked.
        overrides: the user's own changes; "method.name=..." asks for that module.
        source: the file.
    """
    from engine.config import override

    def named(settings: dict[str, Any]) -> Any:
        method = settings.get("method")
        return method.get("name") if isinstance(method, dict) else None

    name = named(content)
    if isinstance(name, str) and name not in BUILT_IN and name != named(override({}, overrides)):
        raise UserError(
            f"{source}: its method is the module '{name}', which would be run; if you know it, say so by "
            f"--set method.name={name}"
        )


def section(name: str) -> str:
    """The YAML section of a method's settings: the last part of its name."""
    return name.rpartition(".")[2]
