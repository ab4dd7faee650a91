"""Growth with the number of images: laws, phases, tables."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from engine.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import scale

COUNTS = (2000, 4000, 8000, 16000)


def test_a_law_is_found_again():
    law = scale.fit([(count, 3 + 2e-3 * count + 5e-8 * count**2) for count in COUNTS], squared=True)
    assert (law.constant, law.linear, law.squared) == pytest.approx((3, 2e-3, 5e-8))
    assert law.million == pytest.approx(3 + 2e3 + 5e4) and law.residual < 1e-9 and law.r2 == pytest.approx(1)
    assert 0 < law.exponent < 2


def test_noise_shows_in_the_residual_and_nothing_shrinks_with_n():
    law = scale.fit([(count, 1e-3 * count * (1.1 if i % 2 else 0.9)) for i, count in enumerate(COUNTS)], squared=True)
    assert law.residual > 0.05 and min(law.constant, law.linear, law.squared) >= 0
    assert scale.fit([(1000, 4.0)], squared=False).million > 0


def test_every_phase_runs_and_has_a_row():
    points = list(scale.phases(scale.LEAST, 16, scale.PHASES[1:]))
    assert [point.phase for point in points] == list(scale.PHASES[1:])
    assert all(point.cpu >= 0 and point.wall >= 0 and point.memory >= 0 for point in points)
    text = scale.tables({"threads": "1"}, points)
    assert "### Features of width 16" in text and all(text.count(f"| {phase} |") == 2 for phase in scale.PHASES[1:])


def test_a_phase_that_is_not_wanted_is_left_out_and_what_needs_it_goes_on():
    found = [point.phase for point in scale.phases(scale.LEAST, 8, ["DBSCAN", "CMFP", "evaluation"])]
    assert found == ["CMFP", "evaluation"]


def test_a_phase_ends_where_it_would_take_too_long(monkeypatch):
    def child(count, width, wanted):
        return [scale.Point(phase, width, count, count / 1000, 0, 1) for phase in wanted]

    monkeypatch.setattr(scale, "_in_child", child)
    points = scale.measure((2000, 4000, 8000), (4,), patience=5)
    assert {point.count for point in points if point.phase == "CMFP"} == {2000}
    assert {point.count for point in points if point.phase == "DBSCAN"} == {2000, 4000}


def test_tables_go_between_the_marks_and_the_rest_stays(tmp_path, monkeypatch, capsys):
    page, numbers = tmp_path / "page.md", tmp_path / "page.json"
    page.write_text(f"# Title\n\n{scale.MARKS[0]}old\n{scale.MARKS[1]}\nprose\n")
    monkeypatch.setattr(scale, "_in_child", lambda count, width, wanted: [scale.Point("CMFP", width, count, 1, 2, 3)])
    scale.main(["--counts", "2000", "4000", "--widths", "4", "--markdown", str(page), "--json", str(numbers)])
    text = page.read_text()
    assert text.startswith("# Title\n") and text.endswith("\nprose\n") and "old" not in text and "| CMFP |" in text
    assert text.split(scale.MARKS[0])[1].split(scale.MARKS[1])[0].strip() == capsys.readouterr().out.strip()
    content = json.loads(numbers.read_text())
    assert content["points"][0]["wall"] == 2 and not math.isnan(content["laws"][0]["cpu"]["million"])
    monkeypatch.setattr(scale, "_in_child", None)
    page.write_text(text.replace("| CMFP |", "| nothing |"))
    scale.main(["--again", str(numbers), "--markdown", str(page)])
    assert page.read_text() == text
    page.write_text("no marks")
    with pytest.raises(UserError, match="--markdown: the file must hold the lines"):
        scale.main(["--markdown", str(page)])


@pytest.mark.parametrize("wrong", [["--counts", "100"], ["--widths", "0"]])
def test_sizes_that_make_no_sense_are_named(wrong, capsys):
    with pytest.raises(SystemExit):
        scale.main(wrong)
    assert "--counts and --widths: at least 1024 images and a width of 1" in capsys.readouterr().err
