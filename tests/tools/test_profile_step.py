from __future__ import annotations

import itertools
import json
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import profile_step
from profile_step import Clock

from engine.errors import UserError

TINY = """
data: {name: sysu, root: nowhere, size: [32, 16]}
model: {backbone: small, weights: none}
train:
  stages:
    - {epochs: 1, iterations: 1, labels: 2, images: 2}
    - {epochs: 1, iterations: 1, labels: 2, images: 4}
method: {name: salcr}
salcr: {gpcr: {k: 5}}
"""
SIZES = ("--images", "60", "50", "--clusters", "4", "3", "--steps", "2")


def measure(folder: Path, *overrides: str):
    """What the tool writes and prints of steps of a tiny network."""
    (folder / "tiny.yaml").write_text(TINY)
    given = [word for override in overrides for word in ("--set", override)]
    with redirect_stdout(StringIO()) as printed:
        command = ["--cfg", str(folder / "tiny.yaml"), *SIZES, *given, "--json", str(folder / "all.json")]
        assert profile_step.main(command) == 0
    content = json.loads((folder / "all.json").read_text())
    return content, {tuple(row["path"]): row for row in content["rows"]}, printed.getvalue()


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return measure(tmp_path_factory.mktemp("whole"))


def ticks() -> Clock:
    """A clock that moves on by a second whenever it is looked at."""
    return Clock(torch.device("cpu"), itertools.count().__next__)


def test_every_part_of_a_step_has_its_row(measured):
    _, rows, printed = measured
    names = {path[-1] for path in rows if path}
    assert set(profile_step.MODULES.values()) | set(profile_step.TERMS.values()) | {"optimiser"} < names
    assert {("GPCR", "topk"), ("GPCR", "parts", "topk"), ("GPCR", "parts", "neighbor_contrast")} < set(rows)
    assert ("memory update", "memory_update_") in rows
    learn = {"backbone", "pooling", "neck", "part head", "DAGL", "FGSAL", "GPCR"}
    assert all((rows[(name,)]["backward"] > 0) == (name in learn) for name in learn | {"optimiser", "memory update"})
    assert "| - - neighbor_contrast |" in printed


def times(row):
    return row["forward"], row["backward"]


def test_the_parts_make_up_the_step(measured):
    """The median of two steps is their mean, so that sums agree."""
    _, rows, _ = measured
    for outer in [(), ("GPCR",)]:
        parts = sum(sum(times(row)) for path, row in rows.items() if path and path[:-1] == outer)
        assert parts == pytest.approx(sum(times(rows[()]))) if outer == () else parts <= sum(times(rows[outer]))
    assert sum(row["share"] for path, row in rows.items() if len(path) == 1) == pytest.approx(1)
    assert sum(row["rest"] or 0 for path, row in rows.items() if len(path) == 1) == pytest.approx(1)


def test_rows_have_neighbours_as_those_of_data_have(measured):
    content, *_ = measured
    assert float(content["facts"]["rows with a positive"].rstrip("%")) > 50


def test_modules_that_are_off_have_no_row(tmp_path):
    content, rows, _ = measure(tmp_path, "salcr.fgsal.enabled=false")
    assert not {("part head",), ("FGSAL",), ("GPCR", "parts")} & set(rows)
    assert [cost["what"] for cost in content["costs"]] == ["an image, whole"]
    _, rows, _ = measure(tmp_path, "method.name=dcl", "train.accumulate=2", "model.bn_group=6")
    assert {("cluster_contrast",), ("memory update",), ("backbone",)} < set(rows)
    _, rows, _ = measure(tmp_path, "salcr.dagl.enabled=false")
    assert ("cluster_contrast",) in rows and ("GPCR",) not in rows


def test_costs_are_those_counted_by_hand(measured):
    content, *_ = measured
    whole, parts, triplet, all_maps = content["costs"]
    # Prototypes, and weights and biases of the BatchNorm: three parts of 128 channels each.
    assert parts["parameters"] - whole["parameters"] == 3 * 3 * 128
    assert all_maps["parameters"] == parts["parameters"]
    positions = (32 // 8) * (16 // 8) // 3 * 3  # of the map; two are left over
    # Each position is weighted and summed for the query of its image, then compared and summed for that of each map's.
    assert parts["macs"] - whole["macs"] == 4 * positions * 128
    assert triplet["macs"] == 3 * whole["macs"]
    assert all_maps["macs"] - triplet["macs"] == 3 * (2 + 3 * 2) * positions * 128


def test_the_clock_gives_each_moment_to_the_part_that_runs():
    clock = ticks()
    inner = clock.watch("inner", torch.square)
    outer = clock.watch("outer", lambda x: inner(x) + 1)
    leaf = torch.ones(2, requires_grad=True)
    clock.read()
    outer(leaf * 2).sum().backward()
    seconds = {place: milliseconds / 1000 for place, milliseconds in clock.read().items()}
    # Forward: a second up to the outer call, then before, in and after the inner one, and one until the backward enters.
    # Backward: from the outer call's result to the inner one's, inside that, out of it, and one until the reading.
    assert seconds == {
        ((), "forward"): 5,
        (("outer",), "forward"): 3,
        (("outer", "inner"), "forward"): 1,
        ((), "backward"): 4,
        (("outer",), "backward"): 3,
        (("outer", "inner"), "backward"): 1,
    }
    torch.testing.assert_close(leaf.grad, torch.full((2,), 8.0))


def test_what_follows_a_backward_is_no_part_of_it():
    clock = ticks()
    first, second = clock.watch("first", F.relu), clock.watch("second", lambda: None)
    first(torch.ones(2, requires_grad=True).detach().requires_grad_() * 1).sum().backward()
    second()
    assert ("second",) in {path for path, _ in clock.read()}


def test_bad_settings_are_refused(tmp_path, capsys):
    with pytest.raises(UserError, match=r"train\.compile: .* use train\.compile=false"):
        measure(tmp_path, "train.compile=true")
    with pytest.raises(SystemExit):
        profile_step.main(["--cfg", "demo.yaml", "--images", "3", "50"])
    assert "--clusters: every cluster must have an image" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        profile_step.main(["--cfg", "demo.yaml", "--steps", "0"])
