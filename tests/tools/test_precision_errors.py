from __future__ import annotations

import inspect
import json
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import precision_errors
from bench_cases import Maker
from precision_errors import BFLOAT16, ROUNDINGS, TF32, Case, Result, Rounding, Sizes, compared, parts, rounded

from engine import ops

SMALL = Sizes(rows=12, clusters=20, instances=112, images=112, width=64)
THREE, ONE, HALF = ROUNDINGS


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_rounding_is_that_of_the_types():
    """TF32 has the mantissa of float16."""
    values = numbers(1000)
    for bits, dtype in ((24, torch.float32), (TF32, torch.float16), (BFLOAT16, torch.bfloat16)):
        normal = values[values.abs() > 1e-4]
        assert torch.equal(rounded(normal, bits), normal.to(dtype).double())
    assert torch.equal(rounded(torch.zeros(2, dtype=torch.float64), TF32), torch.zeros(2, dtype=torch.float64))


def test_two_parts_are_most_of_a_number():
    values = numbers(1000)
    high, low = parts(values)
    assert ((high + low - values).abs() <= 2**-22 * values.abs()).all()
    assert all(torch.equal(rounded(part, TF32), part) for part in (high, low))


@pytest.mark.parametrize("name", ROUNDINGS)
def test_products_are_rounded_and_nothing_else_is(name):
    left, right, added = numbers(5, 7), numbers(7, 3), numbers(3)
    exact = ROUNDINGS[name](left, right)
    assert not torch.equal(exact, left @ right)
    with Rounding(ROUNDINGS[name]):
        assert torch.equal(left @ right, exact)
        assert torch.equal(torch.bmm(left[None], right[None]), exact[None])
        assert torch.equal(torch.addmm(added, left, right, alpha=-2), added - 2 * exact)
        assert torch.equal(left * left, left.square())
        sparse = left.to_sparse() @ right
    torch.testing.assert_close(sparse, left @ right, rtol=1e-14, atol=1e-14)


def test_errors_are_the_largest_and_rows_those_that_changed():
    case = Case("topk", "2 x 3", lambda: Result(), ())
    exact = Result(torch.zeros(2, 3), chosen=torch.tensor([[1, 2], [3, 4]]))
    found = Result(torch.tensor([[0.0, 0.5, -1.0], [0.0, 0.0, 0.0]]), chosen=torch.tensor([[1, 2], [3, 5]]))
    row = compared(case, "fast", exact, found)
    assert (row.values, row.gradient, row.rows) == (1.0, None, 0.5)
    row = compared(case, "fast", Result(exact.values), Result(torch.tensor([[1e-6, 0, 0], [0, 2e-5, 0]])))
    assert (row.values, row.rows) == (pytest.approx(2e-5), 0.5)
    row = compared(case, "fast", Result(chosen=torch.tensor([1, 2])), Result(chosen=torch.tensor([1, 3])))
    assert (row.values, row.rows) == (None, 0.5)


def test_every_operator_that_takes_a_precision_is_measured():
    expected = {name for name in ops.__all__ if "precision" in inspect.signature(getattr(ops, name)).parameters}
    assert {case.op for case in precision_errors.cases(SMALL, Maker(torch.float32, "cpu"))} == expected


def test_it_writes_a_row_for_every_way_of_computing(tmp_path, capsys):
    written = tmp_path / "rows.json"
    assert precision_errors.main(["--json", str(written)], SMALL) == 0
    found = defaultdict(dict)
    for row in json.loads(written.read_text()):
        found[row["op"]][row["computed"]] = row
    ways = ["reference, float32", "ieee", "fast", *ROUNDINGS]
    for op, rows in found.items():
        assert list(rows) == ways
        assert rows["fast"] == rows["ieee"] | {"computed": "fast"}, "on a CPU both are float32"
        for quantity in ("values", "gradient"):
            if rows["ieee"][quantity] is not None:
                assert rows["ieee"][quantity] < 1e-5
                assert rows[THREE][quantity] < rows[ONE][quantity] < rows[HALF][quantity], op
    printed = capsys.readouterr().out
    assert all(f"| {op} |" in printed for op in found)


def test_without_the_device_asked_for_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precision_errors.main(["--device", "cuda"]) == 2
    assert "no CUDA device" in capsys.readouterr().out
