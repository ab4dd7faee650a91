"""Ablation tables: what is trained, what is kept, what goes on, what is printed."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import pytest
import torch
from small_runs import Inside, interrupted_after, metrics, write_settings

from engine import checkpoint, config
from engine.errors import UserError
from engine.evaluate import Score
from engine.trained import evaluate_checkpoint
from engine.trainer import Trainer

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import ablate
import experiments
import score_table
from ablate_tables import SALCR, TABLES, Row, Table

pytestmark = pytest.mark.filterwarnings("ignore:.*not the complete data set", "ignore:.*labels")
SHORT = [
    "train.warm_up.iterations=0",
    *(f"train.stages.{i}.{name}" for i in (0, 1) for name in ("epochs=1", "iterations=2")),
]
FULL = ("salcr.dagl.enabled=true", "salcr.cmfp.enabled=true")
PLAIN = Row("DAGL", ("salcr.dagl.enabled=true", "salcr.cmfp.enabled=false"))
SMALL = Table(
    "two modules",
    (Row("B", ("method.name=dcl",)), PLAIN, Row("DAGL + CMFP(tr)", FULL)),
    shows=("", "CMFP(te)"),
)
BRANCHES = Table("branches", tuple(Row(b, (*PLAIN.train, f"salcr.dagl.branch={b}")) for b in ("visible", "dual")))
NEIGHBOURS = Table(
    "k_te",
    tuple(Row(f"CMFP(te), k_te = {k}", FULL, f"CMFP(te) k={k}") for k in (2, 20)),
    shows=("CMFP(te)",),
    rerank=("cmfp:2", "cmfp:20"),
)


@pytest.fixture(scope="module")
def own(sysu_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    return write_settings(sysu_tree, folder / "cache", folder / "own.yaml")


@pytest.fixture(scope="module")
def call(own):
    """The tool's exit code for some arguments."""

    def run(*arguments):
        changes = [part for one in SHORT for part in ("--set", one)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["ablate.py", "--cfg", str(own), *changes, *map(str, arguments)])
            for name, table in {"small": SMALL, "branches": BRANCHES, "neighbours": NEIGHBOURS}.items():
                patch.setitem(TABLES, name, table)
            return ablate.main()

    return run


@pytest.fixture
def started(monkeypatch):
    """Names of the folders in which runs were started or gone on with."""
    Inside.started, Inside.failing = [], ()
    monkeypatch.setattr(experiments, "_start", Inside)
    return Inside.started


@pytest.fixture(scope="module")
def finished(call, tmp_path_factory):
    """The small table with one seed."""
    Inside.started, Inside.failing = [], ()
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments, "_start", Inside)
        assert call("--table", "small", "--seeds", 1, "--out", folder) == 0
    runs = ["own-stage1-seed0", "own-method.name=dcl-seed0", "own-cmfp.enabled=false-seed0", "own-seed0"]
    assert sorted(Inside.started) == sorted(runs)
    return folder


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copied")


def test_what_is_finished_is_kept_whichever_table_it_is_of_and_wherever_it_was_moved(copied, started, call, capsys):
    assert call("--table", "small", "--seeds", 1, "--out", copied, "--set", "device=cpu") == 0
    assert not started
    rows = [row.split("|")[1].strip() for row in capsys.readouterr().out.splitlines()[4:]]
    plain = [row.label for row in SMALL.rows]
    assert rows == plain + [f"{label} + CMFP(te)" for label in plain]
    assert call("--table", "branches", "--seeds", 1, "--out", copied) == 0
    assert started == ["own-cmfp.enabled=false-dagl.branch=visible-seed0"]


def test_neighbours_at_test_time_are_scored_on_the_one_run_and_kept(copied, started, call, capsys, monkeypatch):
    assert call("--table", "neighbours", "--seeds", 1, "--out", copied) == 0
    assert not started
    shown = capsys.readouterr().out
    expected = evaluate_checkpoint(copied / "own-seed0" / "last.pt", rerank=NEIGHBOURS.rerank)
    for k in (2, 20):
        row = next(line for line in shown.splitlines() if line.startswith(f"| CMFP(te), k_te = {k} "))
        two = [s for s in expected if s.rerank == f"CMFP(te) k={k}" and "single-shot" in s.protocol]
        numbers = [f"{score.values[name]:.2f}" for score in two for name in score_table.METRICS]
        assert [cell.strip() for cell in row.split("|")[2:-1]] == numbers
    monkeypatch.setattr(experiments, "evaluate_checkpoint", None)
    assert call("--table", "neighbours", "--seeds", 1, "--out", copied) == 0
    assert capsys.readouterr().out == shown


def test_a_cell_is_the_second_stage_of_a_whole_run_and_goes_on_when_interrupted(
    finished, copied, started, call, own, tmp_path
):
    Trainer(config.load(str(own), SHORT), tmp_path / "whole").run()
    cell = copied / "own-seed0"
    shutil.rmtree(cell)
    arguments = ("--table", "small", "--seeds", 1, "--out", copied)
    with interrupted_after(1):
        assert call(*arguments, "--set", "train.checkpoint_steps=1", "--set", "data.workers=1") == 130
    assert checkpoint.load(cell / "last.pt")["step"] == 1
    assert call(*arguments) == 0
    assert started == ["own-seed0", "own-seed0"]
    whole = tmp_path / "whole"
    assert metrics(copied / "own-stage1-seed0") + metrics(cell) == metrics(whole)
    expected = checkpoint.load(whole / "last.pt")["network"]
    for name, value in checkpoint.load(cell / "last.pt")["network"].items():
        assert torch.equal(value, expected[name]), name


def test_a_run_with_other_settings_is_refused_before_anything_starts(finished, started, call):
    with pytest.raises(
        UserError, match=r"-seed0: holds a run with other settings \(optim.lr: 0.001 -> 0.01\); .*--out"
    ):
        call("--table", "small", "--seeds", 2, "--out", finished, "--set", "optim.lr=0.01")
    assert not started


def test_a_cell_that_fails_is_named_and_the_others_go_on(copied, started, call, capsys):
    shutil.rmtree(copied / "own-cmfp.enabled=false-seed0")
    Inside.failing = ("own-stage1-seed1", "own-cmfp.enabled=false-seed0")
    assert call("--table", "small", "--seeds", 2, "--out", copied) == 1
    out, err = capsys.readouterr()
    assert "| B (1 of 2 seeds) " in out and "| DAGL + CMFP(tr) + CMFP(te) (1 of 2 seeds) " in out
    assert out.count("| DAGL (0 of 2 seeds) ") == 1 and out.count("failed |") == 12
    assert f"failed: {copied}/own-stage1-seed1: made to fail (all it printed: " in err
    assert f"failed: {copied}/own-seed1: it starts from {copied}/own-stage1-seed1, which failed" in err
    Inside.failing = ()
    assert call("--table", "small", "--seeds", 1, "--out", copied) == 0


def test_runs_side_by_side_in_processes_of_their_own(finished, call, tmp_path, monkeypatch, capsys):
    broken = Row("broken", (*FULL, "cluster.min_samples=1000"))
    monkeypatch.setitem(globals(), "SMALL", Table("two", (SMALL.rows[2], broken)))
    start = f"train.start_from={finished / 'own-stage1-seed0'}"
    assert call("--table", "small", "--seeds", 1, "--jobs", 2, "--out", tmp_path / "out", "--set", start) == 1
    out, err = capsys.readouterr()
    assert "| DAGL + CMFP(tr) " in out and "| broken (0 of 1 seeds) " in out
    folder = tmp_path / "out" / "own-cluster.min_samples=1000-seed0"
    assert f"failed: {folder}: no cluster among the visible and infrared images" in err
    assert f"(all it printed: {folder}/output.txt)" in err and "Traceback" not in err


def line(label="SALCR", value=50.0, runs=3, paper=()):
    protocols = ("all single-shot", "indoor single-shot")
    values = dict.fromkeys(("R1", "R5", "R10", "R20", "mAP", "mINP"), value)
    spread = dict.fromkeys(values, 1.25)
    return ablate.Line(label, [Score(name, "", values, spread, runs, 10) for name in protocols], paper)


def test_the_papers_numbers_stand_beside_ours():
    protocols = ["all single-shot", "indoor single-shot"]
    lines = [line(paper=SALCR["sysu"]), line("B", runs=1, paper=(40.83, None)), ablate.Line("C", [], ())]
    text = ablate.markdown(lines, protocols)
    heads = [cell.strip() for cell in text.splitlines()[0].split("|")[2:-1]]
    assert heads == ["all single-shot R1", "mAP", "mINP", "indoor single-shot R1", "mAP", "mINP"]
    assert "50.00 ± 1.25 (64.44)" in text and "50.00 ± 1.25 (68.73)" in text
    assert "50.00 (40.83)" in text and text.count("failed") == 6
    tabular = score_table.latex([*lines, line("N_p = 2"), line("+ L^g")], protocols)
    assert r"SALCR & 50.00 $\pm$ 1.25 (64.44) & " in tabular and r"N\_p = 2 & " in tabular and r"+ L\^{}g & " in tabular
    rows = list(csv.DictReader(score_table.comma_separated(lines, protocols).splitlines()))
    assert len(rows) == 12
    assert rows[3] == {
        "row": "SALCR",
        "protocol": "indoor single-shot",
        "metric": "R1",
        "mean": "50.0",
        "std": "1.25",
        "runs": "3",
        "paper": "67.17",
    }


def test_firms_rows_are_whole_runs_of_firm():
    table = TABLES["firm2"]
    rows = ablate.plan(table, "sysu_firm.yaml", [], [7], Path("out"))
    assert all(row[0].after is None and not row[0].config.train.start_from for row in rows)
    folders = {row[0].folder.name for row in rows}
    assert len(folders) == len(rows) == 9
    assert {"sysu_firm-seed7", "sysu_firm-vspf.enabled=false-seed7"} < folders
    assert all(len(numbers) in (2, 6) for row in table.rows for numbers in row.paper.values())


@pytest.mark.parametrize("name", [name for name in TABLES if TABLES[name].method == "salcr"])
def test_every_table_is_settings(name):
    data_set = "regdb" if name in ("10", "12", "14", "fig6") else "sysu"
    rows = ablate.plan(TABLES[name], f"{data_set}.yaml", [], [7], Path("out"))
    assert len({row[0].after.folder for row in rows}) == 1
    folders = {row[0].folder.name for row in rows}
    full = {"4": 0, "13": 5, "14": 5, "fig5": 2, "fig6": 2}.get(name, 1)  # rows that are SALCR as it is configured
    assert [row[0].folder.name for row in rows].count(f"{data_set}-seed7") == full
    assert len(folders) == len(rows) - max(0, full - 1)
    assert all(len(numbers) in (2, 3, 6) for row in TABLES[name].rows for numbers in row.paper.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--table", "8", "--cfg", "demo.yaml"], "invalid choice: '8' (choose from"),
        (["--table", "3", "--cfg", "demo.yaml", "--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--table", "3", "--cfg", "demo.yaml", "--jobs", "-1"], "--jobs: expected at least 1, got -1"),
        (["--table", "3", "--cfg", "dmeo.yaml"], "did you mean 'demo.yaml'?"),
        (["--table", "3", "--cfg", "demo.yaml", "--set", "method.name=dcl"], "method.name: this table varies"),
        (["--table", "firm2", "--cfg", "demo.yaml"], "give a configuration of firm"),
        (["--table", "3", "--cfg", "demo.yaml", "--set", "optim.lrr=1"], "optim.lrr: no such setting"),
        (
            [
                "--table",
                "3",
                "--cfg",
                "demo.yaml",
                "--set",
                "train.stages=[{epochs: 1, iterations: 1, labels: 1, images: 1}]",
            ],
            "train.stages: one stage trains the baseline alone",
        ),
    ],
)
def test_mistakes_are_named_and_leave_nothing(arguments, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ablate.py", *arguments])
    with pytest.raises((SystemExit, UserError)) as caught:
        ablate.main()
    assert message in capsys.readouterr().err + str(caught.value)
    assert not list(tmp_path.iterdir())
