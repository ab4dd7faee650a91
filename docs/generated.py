"""A hook of mkdocs.yml: the pages of the operators and of the settings, written from docstrings when the site is built."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from engine import methods, ops
from engine.config import Config
from engine.info import operator_names
from engine.ops._backend import BACKENDS, exists
from engine.pair import Pair

ROOT = Path(__file__).parents[1]
HEADINGS = ("Args", "Attributes", "Returns", "Raises", "Example")
IMPORTS = ">>> import torch\n>>> from engine import ops\n"
BACKEND_SOURCES = {
    "cuda": "csrc/{}.cu",
    "triton": "kernels/{}.py",
    "cpu": "csrc/{}.cpp",
    "reference": "engine/ops/{}.py",
}


# What mkdocs calls


def on_config(config: Any) -> Any:
    """Put the operators into the navigation."""
    operators = next(entry["Operators"] for entry in config.nav if isinstance(entry, dict) and "Operators" in entry)
    operators += [{name: f"operators/{name}.md"} for name in operator_names()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each operator."""
    from mkdocs.structure.files import File

    for name in operator_names():
        files.append(File.generated(config, f"operators/{name}.md", content=operator_page(name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in what pages leave out, and show links to what is in the repository but not on the site as the path alone."""
    for mark, written in PARTS.items():
        if mark in markdown:
            markdown = markdown.replace(mark, written())
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+((?:engine|tools|csrc|kernels|tests)/[^)#]+)[^)]*\)", _outside, markdown)


def _outside(link: re.Match[str]) -> str:
    text, path = link[1].strip("`"), link[2]
    return f"`{path}`" if path.endswith(text) else f"{link[1]} (`{path}`)"


# Docstrings


def sections(text: str) -> dict[str, str]:
    """A docstring by its headings, what stands before the first one under ""; as `inspect.getdoc` gives it."""
    parts = re.split(rf"^({'|'.join(HEADINGS)}):\n", text, flags=re.MULTILINE)
    return {"": parts[0].strip()} | {
        name: inspect.cleandoc(body) for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }


def items(text: str) -> dict[str, str]:
    """The lines "name: what it is" of a section; what is indented goes on with the line before."""
    found: dict[str, str] = {}
    for line in re.sub(r"\n +", " ", text).splitlines():
        name, _, meaning = line.partition(": ")
        found[name] = meaning
    return found


def table(titles: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    rows = [titles, ("---",) * len(titles), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


# Operators


def backends() -> str:
    """All operators, and which back ends each has."""
    lines = []
    for name in operator_names():
        has = ("yes" if exists(name, backend) else "" for backend in BACKENDS)
        lines.append((f"[{name}]({name}.md)", summary(name), *has))
    return table(("operator", "computes", *BACKENDS), lines)


def summary(name: str) -> str:
    """The first sentence of an operator."""
    return " ".join(sections(inspect.getdoc(getattr(ops, name)) or "")[""].partition("\n\n")[0].split())


def operator_page(name: str) -> str:
    """Equation, shapes, errors, example, back ends and speed of one operator."""
    function = getattr(ops, name)
    parts = sections(inspect.getdoc(function) or "")
    content = [f"# {name}", parts[""], f"```python\n{signature(name, function)}\n```"]
    for heading in ("Args", "Returns", "Raises"):
        if heading in parts:
            content += [f"## {heading}", listed(parts[heading]) if heading != "Returns" else parts[heading]]
    for kind in (getattr(ops, other) for other in ops.__all__):
        if inspect.isclass(kind) and kind.__module__ == function.__module__:
            content += class_section(kind)
    content += ["## Example", f"```pycon\n{IMPORTS}{parts['Example']}\n```"]
    sources = [(b, f"`{BACKEND_SOURCES[b].format(name)}`") for b in BACKENDS if exists(name, b)]
    content += ["## Back ends", table(("back end", "source"), sources), "## Speed", speed(name)]
    return linked("\n\n".join(content), name)


def signature(name: str, function: Any) -> str:
    """The call with its types, an argument on each line."""
    call = inspect.signature(function)
    lines = []
    for item in call.parameters.values():
        default = "" if item.default is item.empty else f" = {item.default!r}"
        lines.append(f"{item.name}: {item.annotation}{default}")
    named = [item.kind is item.KEYWORD_ONLY for item in call.parameters.values()]
    if any(named):
        lines.insert(named.index(True), "*")
    return f"ops.{name}(\n" + "".join(f"    {line},\n" for line in lines) + f") -> {call.return_annotation}"


def class_section(kind: type) -> list[str]:
    """What an operator returns, where that is a class."""
    parts = sections(inspect.getdoc(kind) or "")
    own = [value for key, value in vars(kind).items() if inspect.isfunction(value) and not key.startswith("_")]
    called = {f"{each.__name__}()": " ".join((inspect.getdoc(each) or "").split()) for each in own}
    return [f"## {kind.__name__}", parts[""], listed(parts["Attributes"]), *([bullets(called)] if called else [])]


def listed(text: str) -> str:
    return bullets(items(text))


def bullets(lines: dict[str, str]) -> str:
    return "\n".join(f"- **{name}**: {meaning}" for name, meaning in lines.items())


def linked(text: str, own: str) -> str:
    """Names of other operators lead to their pages."""
    others = "|".join(name for name in operator_names() if name != own)
    return re.sub(rf"`({others})`", r"[`\1`](\1.md)", text)


def speed(name: str) -> str:
    """Who was timed with an operator, from docs/benchmarks.json."""
    measured = json.loads((ROOT / "docs" / "benchmarks.json").read_text())
    header = measured["header"]
    lines = []
    for row in measured["rows"]:
        if row["op"] == name and row["missing"] is None:
            memory = f"{row['memory'] / 1e6:.1f}" if row["memory"] is not None else ""
            times = "" if row["ours"] else f"{row['speedup']:.2f}x"
            contender = f"**engine** ({row['contender']})" if row["ours"] else row["contender"]
            lines.append((row["form"], row["size"], contender, f"{row['median']:,.3g}", memory, times))
    if not lines:
        return "Not measured yet."
    conditions = (
        f"Median time of a call on {header['cores']} cores of an {header['machine']} ({header['instructions']}), float32, "
        f"PyTorch {header['torch']}, commit {header['commit']}; [all conditions](../benchmarks.md)."
    )
    titles = ("call", "size", "who", "median ms", "extra MB", "the engine is faster")
    return f"{conditions}\n\n{table(titles, lines)}"


def gpu_records() -> str:
    """Links to what tools/gpu_check.py wrote."""
    found = sorted((ROOT / "docs" / "gpu").glob("*.md"), reverse=True)
    return "\n".join(f"- [{path.stem}](gpu/{path.name})" for path in found) or "There is no record yet."


# Settings


@dataclass(frozen=True)
class Section:
    """The settings of one dataclass.

    Attributes:
        path: its place in the YAML, "" for the top.
        about: what it is.
        rows: name, type, default and meaning of each setting.
    """

    path: str
    about: str
    rows: list[tuple[str, str, str, str]]


def settings() -> str:
    """Every setting there is."""
    content = []
    for section in all_settings():
        content += [f"## {section.path or 'The run'}", section.about]
        if section.rows:
            lines = [
                (f"`{name}`", meaning, kind, given and f"`{given}`") for name, kind, given, meaning in section.rows
            ]
            content.append(table(("setting", "meaning", "type", "default"), lines))
    return "\n\n".join(content)


def all_settings() -> Iterator[Section]:
    """Sections in the order of the YAML, the methods' last."""
    yield from described(Config, "", None)
    for name in methods.BUILT_IN:
        kind = methods.find(name).Settings
        yield from described(kind, name, kind())


def described(kind: type, path: str, value: Any) -> Iterator[Section]:
    """The section of a dataclass, `value` if nothing is set (None: something must be), and then those that stand in it."""
    about, meanings = "", dict[str, str]()
    for each in reversed(kind.__mro__):
        if dataclasses.is_dataclass(each):
            parts = sections(inspect.getdoc(each) or "")
            about = parts[""]
            for names, meaning in items(parts.get("Attributes", "")).items():
                meanings |= dict.fromkeys(names.split(", "), meaning)
    rows, inner = [], []
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint, place = hints[item.name], f"{path}.{item.name}".lstrip(".")
        if hint is Any:  # the method's own section
            continue
        own = getattr(value, item.name) if value is not None else default(item)
        within = next((part for part in (hint, *get_args(hint)) if dataclasses.is_dataclass(part)), None)
        if within is None or get_origin(hint) is Pair:
            rows.append((place, type_name(hint), as_yaml(own), meanings.get(item.name, "")))
        elif within is hint:
            inner.append((within, place, own))
        else:
            inner.append((within, f"{place}.0", None))
    yield Section(path, about, rows)
    for within in inner:
        yield from described(*within)


def default(item: dataclasses.Field[Any]) -> Any:
    """What a setting is if it is not given; None if it must be."""
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return None if item.default is dataclasses.MISSING else item.default


def as_yaml(value: Any) -> str:
    """A value as one would write it; "" for None."""
    if value is None:
        return ""
    if isinstance(value, Pair):
        value = value.vis if value.vis == value.ir else {"vis": value.vis, "ir": value.ir}
    if isinstance(value, float):
        return f"{value:g}"
    if value == "":
        return '""'
    plain = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(plain, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")


def type_name(hint: Any) -> str:
    """An annotation as a user would say it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return type_name(next(part for part in arguments if part is not type(None)))
    if origin is Literal:
        return ", ".join(f"`{as_yaml(part)}`" for part in arguments)
    if origin is Pair:
        return f"{type_name(arguments[0])}, or one each for `vis` and `ir`"
    if origin is tuple:
        count = "any number" if arguments[-1] is Ellipsis else str(len(arguments))
        return f"list, {count} of: {type_name(arguments[0])}"
    return {int: "whole number", float: "number", bool: "`true`, `false`", str: "text"}[hint]


PARTS = {"<!-- settings -->": settings, "<!-- back ends -->": backends, "<!-- gpu records -->": gpu_records}
