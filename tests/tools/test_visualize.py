"""Pictures of small runs: which files are written, what they hold, and why some are left out."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import visualize

from engine import analysis, pictures
from engine.analysis import RankingList, Rankings, Shot, Subject
from engine.errors import UserError
from engine.evaluate import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:.*not the complete data set", "ignore:.*labels")
ALL = {"curves", "labels", "sizes", "rankings", "embedding", "distances", "attention", "phases"}


def tool(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    return module.main()


def test_a_run_gives_all_pictures_that_it_can(salcr, tmp_path, monkeypatch, capsys):
    assert tool(visualize, monkeypatch, salcr, "--out", tmp_path, "--dpi", 60, "--queries", 2) == 0
    bounds = {  # inches wide and high, more or less; smallest file, as empty pictures are small
        "curves": (8, 5.8, 15_000),
        "labels": (12, 5.8, 20_000),
        "sizes": (4, 2.9, 3_000),
        "rankings": (10, 4.4, 30_000),
        "embedding": (5, 4.5, 6_000),
        "distances": (5, 3.2, 4_000),
        "attention": (8.5, 7.5, 30_000),
        "phases": (4, 2.9, 3_000),
    }
    assert {path.stem for path in tmp_path.iterdir()} == ALL
    for name, (width, height, least) in bounds.items():
        file = tmp_path / f"{name}.png"
        with Image.open(file) as image:
            assert image.size == pytest.approx((60 * width, 60 * height), rel=0.15), name
            assert len(np.unique(np.asarray(image.convert("L")))) > 20, name
        assert least < file.stat().st_size < 40 * least, (name, file.stat().st_size)
    out = capsys.readouterr().out
    assert "left out: events of salcr: its method (salcr) has no memory that evolves" in out
    assert out.count(str(tmp_path)) == len(ALL)


def test_the_memory_of_firm_and_its_attention_are_shown(firm, tmp_path, monkeypatch):
    assert tool(visualize, monkeypatch, firm, "--out", tmp_path, "--only", "events,attention,rankings,labels") == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{n}.png" for n in ("events", "attention", "rankings", "labels")
    }
    subject = Subject(firm)
    found, grid = analysis.attention(subject, count=2), subject.trained.network.vision.grid
    assert found.titles == ("class token",)
    for shots, maps in found.rows:
        assert shots.vis.identity == shots.ir.identity
        assert all(seen.shape == (1, *grid) and seen.min() == 0 and seen.max() == 1 for seen in maps)


def test_attention_of_salcr_has_a_map_of_the_image_and_one_of_every_part(salcr):
    found = analysis.attention(Subject(salcr), count=2)
    assert found.titles == ("whole image", "part 1", "part 2", "part 3") and len(found.rows) == 2
    for _, maps in found.rows:
        for whole, *parts in maps:
            assert whole.min() == 0 and whole.max() == 1 and all(part.max() == 1 for part in parts)
            assert not (np.prod([part > 0 for part in parts], axis=0)).any()


def test_rankings_tell_the_score_of_their_trial(salcr):
    subject = Subject(salcr)
    found = analysis.rankings(subject, count=4, top=3)
    protocol = subject.dataset.protocols[0]
    first = replace(subject.dataset, protocols=(replace(protocol, trials=protocol.trials[:1]),))
    row = evaluate(first, subject.features)[0]
    assert (found.protocol, found.total) == (row.protocol, row.queries)
    assert 100 * found.found / found.total == pytest.approx(row.values["R1"])
    assert all(len(one.answers) == 3 and one.query.camera in (3, 6) for one in found.lists)
    for one in found.lists:
        assert one.right == tuple(shot.identity == one.query.identity for shot in one.answers)
        assert 2 not in [shot.camera for shot in one.answers] or one.query.camera != 3
        assert f"/cam{one.query.camera}/{one.query.identity:04d}/" in one.query.path
    again = analysis.rankings(subject, "cmfp:3", "indoor multi-shot")
    assert again.rerank == "CMFP(te) k=3" and again.caption.startswith("indoor multi-shot, re-ranked by CMFP(te) k=3: ")
    with pytest.raises(UserError, match="--protocol outdoors: expected one of all single-shot"):
        analysis.rankings(subject, protocol="outdoors")


def test_right_and_wrong_differ_in_more_than_colour(tmp_path):
    Image.new("RGB", (8, 16)).save(tmp_path / "x.png")
    shot = Shot(str(tmp_path / "x.png"), 3, -1)
    one = RankingList(shot, (shot,) * 3, (True, False, False), 1)
    figure = pictures.rankings(Rankings((one,), "all", "ir", 1, 2, "", 0))
    frames = [patch.get_linestyle() for patch in figure.axes[0].patches]
    assert frames[:2] == ["solid", "solid"] and frames[2] == frames[3] and frames[2][1] is not None
    words = [text.get_text() for text in figure.axes[0].texts]
    assert {"query, infrared", "1 ✓", "2 ✗", "3 ✗", "id 3, 1 to find", "id 3"} == set(words)


@pytest.mark.parametrize(("kind", "start_of_file"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("webp", b"RIFF")])
def test_pictures_come_in_other_formats_and_always_the_same(kind, start_of_file, salcr, tmp_path, monkeypatch):
    for folder in (tmp_path / "one", tmp_path / "two"):
        tool(visualize, monkeypatch, salcr, "--only", "phases", "--format", kind, "--out", folder)
    one, two = ((tmp_path / folder / f"phases.{kind}").read_bytes() for folder in ("one", "two"))
    assert one.startswith(start_of_file) and one == two and len(one) > 4000


def test_several_runs_share_curves_and_have_rankings_of_their_own(salcr, firm, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        tool(visualize, monkeypatch, salcr, firm)
    assert "--out: name a folder for the pictures of several runs" in capsys.readouterr().err
    only = ("--only", "labels,phases", "--out", tmp_path)
    assert tool(visualize, monkeypatch, salcr, firm, *only) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"labels.png", "salcr-phases.png", "firm-phases.png"}


def test_what_cannot_be_shown_is_said(footage, salcr, tmp_path, monkeypatch, capsys):
    assert tool(visualize, monkeypatch, footage) == 0
    assert {path.stem for path in (footage / "pictures").iterdir()} == {"curves", "labels", "sizes", "phases"}
    assert "left out: rankings of unscored: footage: has no test images" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no test images with identities"):
        tool(visualize, monkeypatch, footage, "--only", "distances")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.yaml").write_text((salcr / "config.yaml").read_text())
    with pytest.raises(UserError, match="no picture could be made"):
        tool(visualize, monkeypatch, bare)
    assert "left out: rankings of bare: " in (out := capsys.readouterr().out) and "last.pt: no such checkpoint" in out
    (bare / "metrics.jsonl").write_text((salcr / "metrics.jsonl").read_text())
    assert tool(visualize, monkeypatch, bare, "--checkpoint", "best") == 0
    assert {path.stem for path in (bare / "pictures").iterdir()} == {"curves", "labels", "phases"}
    for wrong in (("--only", "x"), ("--queries", 0), ("--identities", 1), ("--seed", -1), ("--dpi", 0)):
        with pytest.raises(SystemExit):
            tool(visualize, monkeypatch, salcr, *wrong)
        assert f"{wrong[0]}: expected " in capsys.readouterr().err


def test_without_matplotlib_the_remedy_is_named(salcr, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "vireid-engine\[viz\]"'):
        tool(visualize, monkeypatch, salcr)
