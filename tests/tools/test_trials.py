"""Several runs of one configuration: RegDB's splits or seeds, kept, averaged, last and best epoch apart."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pytest
from small_runs import Inside, interrupted_after, metrics, write_settings

from engine import config
from engine.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import experiments
import trials

pytestmark = pytest.mark.filterwarnings("ignore:.*not the complete data set", "ignore:.*labels")
SHORT = [
    "train.warm_up.iterations=0",
    *(f"train.stages.{i}.{name}" for i in (0, 1) for name in ("epochs=1", "iterations=2")),
]
REGDB = ("data.name=regdb", "evaluate.rerank.cmfp.k=3")


@pytest.fixture(scope="module")
def own(regdb_tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    return write_settings(regdb_tree, folder / "cache", folder / "own.yaml")


@pytest.fixture(scope="module")
def call(own):
    """The tool's exit code for some arguments."""

    def run(*arguments):
        changes = [part for one in (*SHORT, *REGDB) for part in ("--set", one)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["trials.py", "--cfg", str(own), *changes, *map(str, arguments)])
            patch.setattr(experiments, "_start", Inside)
            return trials.main()

    return run


@pytest.fixture(scope="module")
def finished(call, tmp_path_factory):
    """Two splits, of which the second was interrupted and gone on with."""
    folder = tmp_path_factory.mktemp("finished")
    Inside.started, Inside.failing = [], ()
    with interrupted_after(6):
        assert call("--seeds", 2, "--out", folder) == 130
    assert Inside.started == ["own-split1", "own-split2"]
    Inside.started = []
    assert call("--seeds", 2, "--out", folder) == 0
    assert Inside.started == ["own-split2"]
    return folder


def test_splits_are_averaged_and_the_best_epoch_stands_apart(finished, call, capsys):
    Inside.started = []
    assert call("--seeds", 2, "--out", finished) == 0
    assert Inside.started == []
    out = capsys.readouterr().out
    assert out.startswith("own.yaml: mean ± standard deviation over 2 splits of RegDB, percent; in brackets")
    assert "SALCR, Cheng et al., IJCV 2025" in out
    labels = [row.split("|")[1].strip() for row in out.splitlines()[4:]]
    assert labels == ["last epoch", "last epoch + CMFP(te) k=3", trials.BEST, f"{trials.BEST} + CMFP(te) k=3"]
    assert "(90.58)" in out and "(93.16)" in out
    assert not any(re.search(r"\(\d", row) for row in out.splitlines() if trials.BEST in row)
    assert call("--seeds", 2, "--out", finished, "--csv") == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    runs = [metrics(finished / f"own-split{split}") for split in (1, 2)]
    last = [epochs[-1]["scores"][0]["values"]["mAP"] for epochs in runs]
    best = [max(epoch["scores"][0]["values"]["mAP"] for epoch in epochs) for epochs in runs]
    for label, values in (("last epoch", last), (trials.BEST, best)):
        (row,) = [
            row for row in rows if row["row"] == label and row["metric"] == "mAP" and row["protocol"].startswith("vis")
        ]
        assert float(row["mean"]) == pytest.approx(sum(values) / 2) and row["runs"] == "2"
    assert call("--seeds", 2, "--out", finished, "--latex") == 0
    assert r"\begin{tabular}{lrrrrrr}" in capsys.readouterr().out


def test_a_run_that_fails_is_named_and_the_others_count(call, tmp_path, capsys):
    Inside.started, Inside.failing = [], ("own-split1",)
    assert call("--seeds", 1, "--out", tmp_path) == 1
    out, err = capsys.readouterr()
    assert not out and f"failed: {tmp_path}/own-split1: made to fail" in err


def test_other_data_sets_have_seeds():
    runs = trials.plan(config.load("sysu.yaml", ["seed=5"]), "sysu.yaml", ["seed=5"], 3, Path("out"))
    assert [(run.folder.name, run.config.seed) for run in runs] == [(f"sysu-seed{seed}", seed) for seed in (5, 6, 7)]
    runs = trials.plan(config.load("regdb.yaml"), "regdb.yaml", [], 10, Path("out"))
    assert [run.config.data.trial for run in runs] == list(range(1, 11)) and {run.config.seed for run in runs} == {0}


def test_eleven_splits_are_refused(call):
    with pytest.raises(UserError, match="--seeds: RegDB has 10 splits, got 11"):
        call("--seeds", 11)


def test_numbers_stand_only_where_they_were_measured():
    assert trials._paper(config.load("sysu.yaml"))[1]["sysu"][0] == 64.44
    assert trials._paper(config.load("sysu.yaml", ["data.split=val"]))[1] == {}
    assert trials._paper(config.load("sysu_firm.yaml"))[1]["regdb"][1] == 84.2
