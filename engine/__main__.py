"""The tools as commands, which need no checkout: `vireid train --cfg demo.yaml`, or `python -m engine train ...`."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

_packaged = Path(__file__).with_name("tools")
TOOLS = _packaged if _packaged.is_dir() else Path(__file__).parents[1] / "tools"
CHECKOUT_ONLY = {"gpu_check", "precision_errors"}
"""Tools of the engine's own development, which build or test it."""


def commands() -> dict[str, str]:
    """What each tool does, by its name; the other files of the folder are what tools share."""
    found = {}
    for path in sorted(TOOLS.glob("*.py")):
        source = path.read_text()
        if path.stem not in CHECKOUT_ONLY and '__name__ == "__main__"' in source:
            found[path.stem] = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return found


def main() -> None:
    """Run the tool that the first argument names."""
    given, known = sys.argv[1:], commands()
    if not given or given[0] in ("-h", "--help"):
        print("vireid COMMAND [options]; options are shown by vireid COMMAND --help\n")
        print("\n".join(f"  {name:<15}{about}" for name, about in known.items()))
    elif given[0] not in known:
        print(f"error: vireid {given[0]}: no such command; known: {', '.join(known)}", file=sys.stderr)
        sys.exit(2)
    else:
        try:
            run(given[0], given[1:])
        except KeyboardInterrupt:  # while the tool was imported: later on it sees to that itself
            print("\nstopped", file=sys.stderr)
            sys.exit(130)


def run(name: str, arguments: list[str]) -> None:
    """What `python tools/<name>.py` does, but for the name by which the tool speaks of itself."""
    sys.argv = [f"vireid {name}", *arguments]
    sys.path.insert(0, str(TOOLS))  # where tools find what they share
    spec = importlib.util.spec_from_file_location("__main__", TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["__main__"] = importlib.util.module_from_spec(spec)
    module.__spec__ = None  # as of a script: processes that the tool starts find it by its file
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main()
