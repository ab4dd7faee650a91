"""What the documentation shows is so: code runs, commands have their options and settings, links lead somewhere."""

from __future__ import annotations

import doctest
import inspect
import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from small_runs import metrics, settings, start

from engine import config, ops
from engine.errors import UserError
from engine.info import operator_names
from engine.ops._backend import BACKENDS, exists

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

import generated

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
BLOCK = re.compile(r"(?:^<!-- not run: (.+) -->\n\n?)?^```(?:python|py)\b.*\n((?:.*\n)*?)^```$", re.MULTILINE)
"""A block of code, and the reason if it cannot be run."""
COMMAND = re.compile(r"(?:python (?:-\S+ )*(?=tools/)|vireid )(?:tools/)?(\w+)(?:\.py)?\b((?:\\\n|[^`\n#;|&>])*)")
SETTING = re.compile(r"`(?:--set )?'?([a-z]\w*(?:\.\w+)+=[^`']+)'?`")
pytestmark = pytest.mark.filterwarnings("ignore:.*not the complete data set", "ignore:.*labels")


@pytest.fixture(scope="module")
def run_folder(sysu_tree, tmp_path_factory) -> Path:
    """A finished run of seconds, for code that reads one."""
    folder = tmp_path_factory.mktemp("documented")
    start(settings(sysu_tree, folder / "cache"), folder / "runs" / "demo-seed0").run()
    return folder


def with_code() -> list[str]:
    return [name for name, page in zip(NAMES, PAGES, strict=True) if BLOCK.search(page.read_text())]


@pytest.mark.parametrize("name", with_code())
def test_code_runs(name, request, tmp_path, monkeypatch):
    code = as_code((ROOT / name).read_text())
    script = tmp_path / f"{Path(name).stem}_md.py"
    script.write_text(code)
    monkeypatch.chdir(request.getfixturevalue("run_folder") if "runs/" in code else tmp_path)
    runpy.run_path(str(script), run_name="documented")


def as_code(text: str) -> str:
    """A page's code alone, each block in the lines where it stands."""
    lines = [""] * len(text.splitlines())
    for block in BLOCK.finditer(text):
        if not block[1]:
            first = text.count("\n", 0, block.start(2))
            code = block[2].splitlines()
            lines[first : first + len(code)] = code
    return "\n".join(lines)


def test_the_documented_method_trains(sysu_tree, tmp_path, monkeypatch):
    """docs/method.md's file, as a reader would save it: losses fall, and links across the modalities are learned from."""
    (tmp_path / "research").mkdir()
    (tmp_path / "research" / "mutual.py").write_text(as_code((ROOT / "docs" / "method.md").read_text()))
    monkeypatch.syspath_prepend(tmp_path)
    stages = [f"train.stages.{i}.{change}" for i in (0, 1) for change in ("iterations=12", "epochs=3")]
    chosen = settings(sysu_tree, tmp_path / "cache", "method.name=research.mutual", "mutual.k=3", *stages)
    start(chosen, tmp_path / "run").run()
    rows = metrics(tmp_path / "run")
    first, last = (row["losses"] for row in rows if row["stage"] == 2 and row["epoch"] in (4, 6))
    assert set(first) == {"vis", "aug", "ir", "cross.vis", "cross.ir"}
    assert sum(last.values()) < sum(first.values())
    assert all(row["labels"]["matched.vis"] > 0 and row["scores"] for row in rows if row["stage"] == 2)


@pytest.mark.parametrize("name", operator_names())
def test_an_operators_example_gives_what_it_shows(name):
    text = inspect.getdoc(getattr(ops, name))
    assert text is not None
    example = generated.sections(text)["Example"]
    test = doctest.DocTestParser().get_doctest(generated.IMPORTS + example, {}, name, None, None)
    assert any(part.want for part in test.examples)
    assert doctest.DocTestRunner().run(test).failed == 0


def test_the_readme_names_the_operators_of_each_back_end():
    text = (ROOT / "README.md").read_text()
    for backend in BACKENDS:
        row = re.search(rf"^\| `{backend}`[^|]*\| (.*) \|$", text, re.MULTILINE)
        assert row, backend
        named = set(re.findall(r"`(\w+)`", row[1]))
        missing = {op for op in operator_names() if not exists(op, backend)}
        assert named == (missing if row[1].startswith("all") else set(operator_names()) - missing), backend


def test_every_setting_has_a_meaning():
    rows = [row for section in generated.all_settings() for row in section.rows]
    assert [name for name, _, _, meaning in rows if not meaning] == []
    assert {"seed", "data.root", "train.stages.0.epochs", "salcr.gpcr.k", "firm.split.least"} <= {
        row[0] for row in rows
    }


def test_defaults_are_those_of_a_configuration(tmp_path):
    loaded = config.parse({"data": {"name": "folder", "root": "x"}, "train": {"stages": [dict.fromkeys(STAGE, 1)]}})
    for section in generated.all_settings():
        if section.path.split(".")[0] in ("dcl", "firm") or section.path.endswith(".0"):
            continue
        for name, _, default, _ in section.rows:
            value = loaded.settings if name.startswith("salcr.") else loaded
            for part in name.removeprefix("salcr.").split("."):
                value = getattr(value, part)
            assert default in ("", generated.as_yaml(value)), name


STAGE = ("epochs", "iterations", "labels", "images")


def commands(name: str) -> list[tuple[str, list[str]]]:
    """Tool and arguments of every command that a page shows."""
    text = re.sub(r"\$\w+", "1", (ROOT / name).read_text())
    return [(tool, shlex.split(rest.replace("\\\n", " "))) for tool, rest in COMMAND.findall(text)]


@pytest.mark.parametrize("name", NAMES)
def test_commands_name_tools_and_options_that_exist(name):
    for tool, arguments in commands(name):
        source = ROOT / "tools" / f"{tool}.py"
        assert source.is_file(), f"{name}: there is no tools/{tool}.py"
        text = source.read_text()
        shared = [
            ROOT / "tools" / f"{module}.py" for module in re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE)
        ]
        text += "".join(path.read_text() for path in shared if path.is_file())
        options = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
        missing = [option for option in options if f'"{option}"' not in text and option != "--help"]
        assert not missing, f"{name}: tools/{tool}.py has no {missing}"


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_commands_are_known_and_in_range(name):
    shown = [("unified.yaml", [text]) for text in SETTING.findall((ROOT / name).read_text())]
    for _, arguments in commands(name):
        pairs = list(itertools.pairwise(arguments))
        files = [value for option, value in pairs if option == "--cfg" and value.endswith(".yaml")]
        shown.append((files[0] if files else "unified.yaml", [value for option, value in pairs if option == "--set"]))
    for file, overrides in shown:
        if any(re.match(r"method\.name=\w+\.", text) for text in overrides) or "a.b=c" in overrides:
            continue  # somebody's own method, or no setting at all
        try:
            config.load(file if (config.CONFIGS / file).is_file() else "unified.yaml", overrides)
        except UserError as error:
            raise AssertionError(f"{name}: {overrides}: {error}") from error


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text()
    for path, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", text):
        target = ROOT / path if path else ROOT / name
        assert target.exists(), f"{name}: {path}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{name}: {path}#{anchor}"
