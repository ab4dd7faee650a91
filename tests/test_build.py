"""The package list, the native sources and the kernels folder: what would only show after an installation."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def listed_packages() -> set[str]:
    listing = re.search(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert listing is not None
    return set(re.findall(r'"([\w.]+)"', listing[1]))


def test_every_package_of_the_checkout_is_installed():
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "engine").rglob("__init__.py")}
    assert listed_packages() == found | {"engine.csrc", "engine.kernels"}


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
