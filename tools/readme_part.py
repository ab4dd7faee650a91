"""Parts of the README that tools write, from files of measurements and nothing else."""

from __future__ import annotations

from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
END = "<!-- end -->\n"


def begin(tool: str) -> str:
    return f"<!-- written by tools/{tool}.py --readme -->\n"


def replaced(text: str, tool: str, content: str) -> str:
    """`text` with `content` between the marks of a tool.

    Raises:
        ValueError: it has no such marks.
    """
    before, mark, rest = text.partition(begin(tool))
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"README.md must hold {begin(tool).strip()!r} and then {END.strip()!r}")
    return f"{before}{mark}\n{content}\n{END}{after}"


def write(tool: str, content: str) -> None:
    README.write_text(replaced(README.read_text(), tool, content))
