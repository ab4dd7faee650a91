"""The command lines, as a user meets them."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from small_runs import write_settings

from engine.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def tool(name: str, *arguments: object, cwd: Path, wait: bool = True):
    command = [sys.executable, str(ROOT / "tools" / name), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if not wait:
        return process
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def own(sysu_tree, folder):
    return write_settings(sysu_tree, folder / "cache", folder / "own.yaml")


@pytest.fixture(scope="module")
def finished(own, folder):
    code, out, err = tool(
        "train.py", "--cfg", own, "--out", "whole", "--set", "train.stages.0.iterations=25", cwd=folder
    )
    assert code == 0, err
    return folder / "whole", out


def scores(run: Path):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["epoch"], row["losses"], row["scores"]) for row in rows]


def test_training_prints_epochs_and_a_table(finished):
    _, out = finished
    assert "run folder: whole" in out
    assert "epoch 4/4  ·  stage 2" in out
    assert "| after stage 2" in out and "| after stage 2 (last epoch) + CMFP(te)" in out


def test_killed_without_warning_and_resumed_gives_the_same_metrics(own, folder, finished):
    process = tool(
        "train.py", "--cfg", own, "--out", "killed", "--set", "train.stages.0.iterations=25", cwd=folder, wait=False
    )
    metrics = folder / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 100
    while not (metrics.exists() and metrics.read_text().count("\n")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert metrics.read_text().count("\n") < 4, "the run ended before it was killed"
    code, _, err = tool("train.py", "--resume", "killed", cwd=folder)
    assert code == 0, err
    assert scores(folder / "killed") == scores(finished[0])
    assert (folder / "killed" / "results.md").read_text() == (finished[0] / "results.md").read_text()


def test_interrupted_by_ctrl_c_it_says_how_to_go_on(own, folder):
    process = tool(
        "train.py", "--cfg", own, "--out", "stopped", "--set", "train.stages.0.iterations=500", cwd=folder, wait=False
    )
    checkpoint = folder / "stopped" / "last.pt"
    deadline = time.monotonic() + 100
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "go on with: python tools/train.py --resume stopped" in err
    assert "Traceback" not in err


def test_a_second_run_never_writes_over_the_first(own, folder, finished):
    code, _, err = tool("train.py", "--cfg", own, "--out", "whole", cwd=folder)
    assert code == 2
    assert "holds a run already; go on with it by --resume whole" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cfg", "dmeo.yaml"], "did you mean 'demo.yaml'? known ones:"),
        (["--cfg", "own.yaml", "--set", "optim.lrr=1"], "optim.lrr: no such setting; did you mean 'lr'?"),
        (["--cfg", "own.yaml", "--set", "data.root=/nowhere"], "/nowhere"),
        (["--cfg", "own.yaml", "--set", "device=cuda:99"], "device: 'cuda:99' cannot be used"),
        (
            ["--cfg", "own.yaml", "--set", "model.weights=imagenet", "--set", "model.backbone=resnet18"],
            "no ImageNet weights",
        ),
        (["--resume", "nowhere"], "not a run folder"),
        (["--resume", "whole", "--set", "optim.lr=1"], "made with other settings (optim.lr: 0.001 -> 1.0)"),
    ],
)
def test_mistakes_end_with_one_clear_line_and_leave_nothing(own, folder, finished, arguments, message):
    before = sorted(folder.iterdir())
    code, _, err = tool("train.py", *arguments, "--out" if "--cfg" in arguments else "--set", "seed=0", cwd=folder)
    assert code == 2
    assert err.strip().splitlines()[-1].startswith("error: ") and message in err
    assert "Traceback" not in err
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("name", ["train.py", "evaluate.py"])
def test_help_ends_well(name, folder):
    code, out, _ = tool(name, "--help", cwd=folder)
    assert code == 0 and "usage:" in out


def test_evaluate_scores_a_run_as_it_was_scored(finished, folder):
    code, out, err = tool("evaluate.py", "whole", "--json", "scores.json", cwd=folder)
    assert code == 0, err
    rows = json.loads((folder / "scores.json").read_text())
    expected = scores(finished[0])[-1][2]
    assert [row["values"] for row in rows] == [row["values"] for row in expected]
    assert "| last + CMFP(te) k=3 |" in out


def test_evaluate_re_ranks_as_asked(finished, folder):
    arguments = ("--rerank", "cmfp", "cmrr:5", "cmrr:5,1", "aim:4,2", "k-reciprocal", "--json", "reranked.json")
    code, out, err = tool("evaluate.py", "whole", *arguments, cwd=folder)
    assert code == 0, err
    rows = json.loads((folder / "reranked.json").read_text())
    labels = ["", "CMFP(te) k=3", "CMRR k=5 k2=6 weight=0.3", "CMRR k=5 k2=1 weight=0.3", "AIM k1=4 k2=2"]
    labels += ["k-reciprocal k1=20 k2=6 weight=0.3"]
    assert [row["rerank"] for row in rows[::4]] == labels
    assert [bool(row["seconds"]) for row in rows[::4]] == [False] + [True] * 5
    assert "seconds (1-thread cpu)" in out and "| last + AIM k1=4 k2=2 " in out


def test_evaluate_takes_anybodys_arrays(folder):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5, 20)
    means = rng.normal(size=(5, 8))
    query, gallery = (means[ids] + 0.01 * rng.normal(size=(20, 8)) for _ in range(2))
    columns = {"query_ids": ids, "gallery_ids": ids}
    np.savez(folder / "features.npz", query_features=query, gallery_features=gallery, **columns)
    code, out, err = tool("evaluate.py", "--arrays", "features.npz", "--rerank", "cmfp:4", "aim", cwd=folder)
    assert code == 0, err
    rows = [line.split(" | ")[0] for line in out.splitlines() if "100.00" in line]
    assert [row.strip("| ") for row in rows] == ["arrays", "arrays + CMFP(te) k=4", "arrays + AIM k1=30 k2=6"]
    distance = rng.random((20, 20))
    cams = {"query_cams": np.full(20, 3), "gallery_cams": np.full(20, 1)}
    np.savez(folder / "distance.npz", distance=distance, **columns, **cams)
    assert tool("evaluate.py", "--arrays", "distance.npz", "--rule", "sysu", cwd=folder)[0] == 0
    np.savez(folder / "short.npz", distance=distance, query_ids=ids)
    code, _, err = tool("evaluate.py", "--arrays", "short.npz", cwd=folder)
    assert code == 2 and "needs 'gallery_ids'" in err
    np.savez(folder / "wrong.npz", distance=distance[:3], **columns)
    code, _, err = tool("evaluate.py", "--arrays", "wrong.npz", cwd=folder)
    assert code == 2 and "query_ids" in err and "Traceback" not in err
    np.savez(
        folder / "strangers.npz", query_features=query, gallery_features=gallery, query_ids=ids + 5, gallery_ids=ids
    )
    code, _, err = tool("evaluate.py", "--arrays", "strangers.npz", cwd=folder)
    assert code == 2 and "no query has an image of its identity in the gallery" in err
    np.save(folder / "distance.npy", distance)
    code, _, err = tool("evaluate.py", "--arrays", "distance.npy", cwd=folder)
    assert code == 2 and "not an .npz file; numpy.savez writes one" in err
    code, _, err = tool("evaluate.py", "--arrays", "none.npz", cwd=folder)
    assert code == 2 and "no such file" in err


def test_evaluate_says_what_it_needs_to_re_rank(tmp_path):
    score = runpy.run_path(str(ROOT / "tools" / "evaluate.py"))["_score_arrays"]
    columns = {"query_ids": np.arange(4), "gallery_ids": np.arange(4)}
    np.savez(tmp_path / "distance.npz", distance=np.ones((4, 4)), **columns)
    with pytest.raises(UserError, match="needs gallery_features and query_features to re-rank; has"):
        score(tmp_path / "distance.npz", "plain", ["cmfp"])
    np.savez(tmp_path / "narrow.npz", query_features=np.ones((4, 3)), gallery_features=np.ones((4, 2)), **columns)
    with pytest.raises(UserError, match=r"must be \[Q, D\], \[G, D\], got \[4, 3\] and \[4, 2\]"):
        score(tmp_path / "narrow.npz", "plain", [])
    np.savez(tmp_path / "nan.npz", query_features=np.full((4, 3), np.nan), gallery_features=np.ones((4, 3)), **columns)
    with pytest.raises(UserError, match="query must be finite"):
        score(tmp_path / "nan.npz", "plain", ["aim"])
    with pytest.raises(UserError, match="--rerank cmpf: expected one of cmfp"):
        score(tmp_path / "nan.npz", "plain", ["cmpf"])


def test_queries_without_a_match_are_left_out_aloud_and_cameras_asked_for(tmp_path):
    score = runpy.run_path(str(ROOT / "tools" / "evaluate.py"))["_score_arrays"]
    columns = {"query_ids": np.array([0, 1, 9]), "gallery_ids": np.arange(3)}
    np.savez(tmp_path / "some.npz", query_features=np.eye(3), gallery_features=np.eye(3), **columns)
    with pytest.warns(UserWarning, match="1 of 3 queries have no match in the gallery, and are left out of the means"):
        (found,) = score(tmp_path / "some.npz", "plain", [])
    assert found.values["R1"] == 100
    with pytest.raises(UserError, match=r"needs 'query_cams' for --rule sysu; has \['query_features', 'gallery_feat"):
        score(tmp_path / "some.npz", "sysu", [])
