"""The package list, the native sources and the kernels folder: what would only show after an installation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from engine import _C, ops
from engine.ops import _backend, _native

ROOT = Path(__file__).parents[1]


def listed_packages() -> set[str]:
    listing = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert listing is not None
    return set(re.findall(r'"([\w.]+)"', listing[1]))


def test_every_package_of_the_checkout_is_installed():
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "engine").rglob("__init__.py")}
    assert listed_packages() == found | {"engine.csrc", "engine.kernels", "engine.tools"}


def test_every_native_source_is_compiled():
    listed = set(re.findall(r"csrc/\w+\.(?:cpp|cu)\b", (ROOT / "CMakeLists.txt").read_text()))
    found = [path for pattern in ("*.cpp", "*.cu") for path in (ROOT / "csrc").glob(pattern)]
    assert listed == {f"csrc/{path.name}" for path in found}


def test_kernels_are_found_in_a_checkout_and_are_no_package_of_their_own():
    import engine.kernels

    (folder,) = engine.kernels.__path__
    assert Path(folder) == ROOT / "kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_packaged_kernels_come_first(tmp_path):
    package = tmp_path / "engine"
    (package / "kernels").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "kernels.py").write_text((ROOT / "engine" / "kernels.py").read_text())
    (package / "kernels" / "some_op.py").write_text("NAME = 'packaged'\n")
    code = "from engine.kernels import some_op; print(some_op.NAME)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert printed.stdout == "packaged\n"


def test_the_native_module_does_not_depend_on_torch():
    code = "import engine._C, sys; print('torch' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout == "False\n"


def test_native_code_of_other_sources_is_not_run(tmp_path, monkeypatch):
    """It takes addresses, and would read and write where they no longer point."""
    changed = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", changed)
    (tmp_path / "engine").mkdir()
    monkeypatch.setattr(_native, "PACKAGE", tmp_path / "engine")
    stale = _native.stale.__wrapped__
    assert not stale()
    (changed / "notes.txt").touch()
    assert not stale()
    (changed / "topk.cu").write_text((changed / "topk.cu").read_text() + " ")
    assert stale()
    (tmp_path / "engine" / "csrc").mkdir()  # a package: what lies beside it is somebody else's
    assert not stale()
    (tmp_path / "engine" / "csrc").rmdir()
    monkeypatch.delattr(_C, "sources")  # as in what was built before this was looked at
    assert stale()


def test_operators_say_what_to_do_about_native_code_of_other_sources(monkeypatch):
    monkeypatch.setattr(_native, "stale", lambda: True)
    monkeypatch.setattr(_backend, "_find", _backend._find.__wrapped__)
    monkeypatch.setattr(_backend, "_warn_once", _backend._warn_once.__wrapped__)
    rows = torch.eye(3)
    with pytest.warns(UserWarning, match=r"built from other sources than csrc/ holds now; run: pip install -e \."):
        values, _ = ops.topk(rows, rows, 1)
    assert values.tolist() == [[1], [1], [1]]
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match="asked for but cannot run: .* other sources"):
        ops.topk(rows, rows, 1)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The package as a wheel, without the C++ back end: a compiler that fails is none."""
    pytest.importorskip("pybind11", reason="the build needs pybind11")
    pytest.importorskip("setuptools", minversion="77", reason="the build needs setuptools 77 or newer")
    folder = tmp_path_factory.mktemp("wheel")
    sources = folder / "sources"  # as a build leaves files beside them
    built_before = shutil.ignore_patterns("*.so", "*.fatbin", "__pycache__")
    for name in ("engine", "kernels", "csrc", "tools"):
        shutil.copytree(ROOT / name, sources / name, ignore=built_before)
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt"):
        shutil.copy(ROOT / name, sources)
    code = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=sources, env=os.environ | {"CXX": "false"}, check=True)
    (built,) = folder.glob("*.whl")
    return built


def test_a_wheel_holds_all_that_runs_and_nothing_outside_of_engine(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"engine", "vireid_engine"}
    for folder, pattern, place in (
        ("engine/configs", "*.yaml", "engine/configs"),
        ("kernels", "*.py", "engine/kernels"),
        ("csrc", "*.cu", "engine/csrc"),
        ("csrc", "*.h", "engine/csrc"),
        ("tools", "*.py", "engine/tools"),
    ):
        found = {f"{place}/{path.name}" for path in (ROOT / folder).glob(pattern)}
        assert found and found <= names


def test_tools_of_a_wheel_run_without_the_repository(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}

    def vireid(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "engine", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    assert re.search(r"^  train  +Train by a configuration", vireid().stdout, re.MULTILINE)
    assert vireid("ablate", "--help").stdout.startswith("usage: vireid ablate")
    assert "no such command; known: ablate" in vireid("trian").stderr
    refused = vireid("train", "--cfg", "demo.yaml", "--set", "data.rooot=x")
    assert refused.returncode == 2 and "did you mean 'root'" in refused.stderr
