"""A plugin of pytest, loaded by `gpu_check.py`: every outcome is a line of a file as soon as it is known.

So a run that is cut short, or whose process dies, has told all that it found.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

REPORT = "GPU_CHECK_REPORT"
"""The environment variable that names the file."""


def pytest_configure(config: Any) -> None:
    if not hasattr(config, "workerinput"):  # of pytest-xdist's processes only the first one writes
        config.pluginmanager.register(Reporter(Path(os.environ[REPORT])))


class Reporter:
    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.write(report.nodeid, report.outcome, report.duration, report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.write(report.nodeid, "not run", 0.0, report)

    def write(self, name: str, outcome: str, seconds: float, report: Any) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        row = {"name": name, "outcome": outcome, "seconds": round(seconds, 3), "why": reason[-2000:]}
        with self.path.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
