from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import bench_kernels
import bench_report
import readme_part


def test_only_what_stands_between_the_marks_changes():
    text = f"before\n{readme_part.begin('x')}old\n{readme_part.END}after\n{readme_part.END}"
    changed = readme_part.replaced(text, "x", "new\n")
    assert changed == f"before\n{readme_part.begin('x')}\nnew\n\n{readme_part.END}after\n{readme_part.END}"
    assert readme_part.replaced(changed, "x", "new\n") == changed
    with pytest.raises(
        ValueError, match=r"must hold '<!-- written by tools/y.py --readme -->' and then '<!-- end -->'"
    ):
        readme_part.replaced(text, "y", "new\n")


def test_the_readme_says_what_the_benchmarks_measured():
    text = readme_part.README.read_text()
    content = json.loads(bench_kernels.PAGE.read_text())
    expected = readme_part.replaced(text, "bench_kernels", bench_report.summary(content))
    assert text == expected, "run: python tools/bench_kernels.py --readme"
    assert f"on {content['header']['cores']} cores of an {content['header']['machine']}" in text


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0.04, "0.0 ms"), (99.9, "99.9 ms"), (99.96, "100 ms"), (999.6, "1.0 s"), (99960, "100 s")],
)
def test_times_have_two_digits_at_least(milliseconds, text):
    assert bench_report.duration(milliseconds) == text


def test_amounts_are_in_decimal_units():
    assert [bench_report.amount(count) for count in (4.8e6, 999e6, 999.6e6, 6e9)] == [
        "5 MB",
        "999 MB",
        "1.0 GB",
        "6.0 GB",
    ]


def test_contenders_that_were_not_measured_are_left_out():
    content = json.loads(bench_kernels.PAGE.read_text())
    for row in content["rows"]:
        if row["contender"] in ("POT", "GeomLoss"):
            row["median"] = None
    text = bench_report.summary(content)
    assert "POT" not in text and "GeomLoss" not in text and "PyTorch" in text
