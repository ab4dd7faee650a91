"""Scores by protocol, tables and logs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import engine.evaluate
from engine import ops, report
from engine.data.dataset import Dataset, Images, Protocol, Trial
from engine.errors import UserError
from engine.evaluate import Score, evaluate, score, score_features, summary
from engine.pair import Pair
from engine.rerank import Aim, Cmfp


def images(ids, cams):
    ids = np.array(ids)
    return Images(tuple(str(i) for i in range(len(ids))), ids, np.array(cams))


@pytest.fixture
def dataset():
    test = Pair(images([1, 1, 2, 2, 3, 3], [1, 2, 1, 2, 1, 2]), images([1, 2, 3, 1, 2, 3], [3, 3, 3, 6, 6, 6]))
    rows = np.arange(6)
    to_vis = Protocol("all", "ir", (Trial(rows, rows), Trial(rows[3:], rows[::2])), "sysu")
    to_ir = Protocol("back", "vis", (Trial(rows, rows[:3]),), "plain")
    return Dataset("small", Pair(test.vis, test.ir), test, (to_vis, to_ir))


def features(noise: float) -> Pair:
    generator = torch.Generator().manual_seed(0)
    people = torch.randn(4, 8, generator=generator)

    def rows(ids):
        return F.normalize(people[torch.tensor(ids)] + noise * torch.randn(6, 8, generator=generator))

    return Pair(rows([1, 1, 2, 2, 3, 3]), rows([1, 2, 3, 1, 2, 3]))


def test_perfect_features_score_a_hundred(dataset):
    for row in evaluate(dataset, features(0.01), [Cmfp(2)]):
        assert row.values == pytest.approx({name: 100 for name in row.values})
        assert set(row.spread.values()) == {0}


def test_rows_are_plain_first_then_re_ranked_and_say_so(dataset):
    rows = evaluate(dataset, features(1.0), [Cmfp(2), Aim(3, 1)])
    assert [(row.protocol, row.rerank) for row in rows] == [
        ("all", ""),
        ("back", ""),
        ("all", "CMFP(te) k=2"),
        ("back", "CMFP(te) k=2"),
        ("all", "AIM k1=3 k2=1"),
        ("back", "AIM k1=3 k2=1"),
    ]
    assert [row.trials for row in rows] == [2, 1, 2, 1, 2, 1]
    assert rows[0].values != rows[2].values
    assert len(evaluate(dataset, features(1.0))) == 2


def test_only_re_ranking_is_timed_and_only_where_asked(dataset):
    assert all(row.seconds == {} for row in evaluate(dataset, features(1.0), [Cmfp(2)]))
    plain, _, re_ranked, _ = evaluate(dataset, features(1.0), [Cmfp(2)], timed=True)
    assert plain.seconds == {}
    assert list(re_ranked.seconds) == [f"{torch.get_num_threads()}-thread cpu"]
    assert all(seconds > 0 for seconds in re_ranked.seconds.values())


def test_a_row_is_the_mean_of_its_trials(dataset):
    rows = features(1.0)
    (first, second), test = dataset.protocols[0].trials, dataset.test
    results = []
    for trial in (first, second):
        query, gallery = torch.from_numpy(trial.queries.copy()), torch.from_numpy(trial.gallery.copy())
        ids = tuple(torch.from_numpy(part) for part in (test.ir.ids[trial.queries], test.vis.ids[trial.gallery]))
        cams = tuple(torch.from_numpy(part) for part in (test.ir.cams[trial.queries], test.vis.cams[trial.gallery]))
        results.append(score(1 - rows.ir[query] @ rows.vis[gallery].T, ids, cams, "sysu"))
    row = evaluate(dataset, rows)[0]
    assert row.values["mAP"] == pytest.approx(np.mean([values["mAP"] for values, _ in results]))
    assert row.spread["mAP"] == pytest.approx(np.std([values["mAP"] for values, _ in results]))
    assert row.queries == sum(valid for _, valid in results)


def test_re_ranking_sees_one_trial_at_a_time(dataset, monkeypatch):
    seen, cmfp = [], ops.cmfp
    monkeypatch.setattr(
        ops, "cmfp", lambda query, gallery, k: seen.append((len(query), len(gallery), k)) or cmfp(query, gallery, k)
    )
    evaluate(dataset, features(1.0), [Cmfp(2)])
    assert seen == [(6, 6, 2), (3, 3, 2), (6, 3, 2)]


def a_score(trials: int = 2, rerank: str = "") -> Score:
    names = ["R1", "R5", "R10", "R20", "mAP", "mINP"]
    return summary("all", rerank, [({name: 50.0 + i for name in names}, 3) for i in range(trials)])


def test_blocks_of_queries_score_as_all_of_them_do(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    query, gallery = (F.normalize(torch.randn(count, 8, generator=generator)) for count in (23, 11))
    ids = torch.arange(23) % 7, torch.arange(11) % 5  # two of seven have no match
    cams = 3 + 3 * (torch.arange(23) % 2), 1 + torch.arange(11) % 2
    expected, valid = score(1 - query @ gallery.T, ids, cams, "sysu")
    assert 0 < valid < 23
    for entries in (1, 50, 23 * 11):
        monkeypatch.setattr(engine.evaluate, "BLOCK_ENTRIES", entries)
        values, count = score_features(query, gallery, ids, cams, "sysu")
        assert count == valid and values == pytest.approx(expected, abs=1e-10)


def test_a_table_has_a_row_per_score_and_a_spread_where_there_is_one():
    lines = report.table([("one", a_score(1)), ("two", a_score(2))]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "50.00 |" in lines[2] and "±" not in lines[2]
    assert "50.50 ± 0.50" in lines[3] and "seconds" not in lines[0]


def test_a_table_has_the_seconds_where_there_are_any():
    lines = report.table([("one", a_score(1)), ("two", replace(a_score(1), seconds={"cpu": 0.25}))]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "| seconds (cpu) |" in lines[0] and lines[2].endswith(" " * 13 + " |") and lines[3].endswith(" 0.250 |")


ROW = {
    "epoch": 3,
    "epochs": 4,
    "stage": 2,
    "lr": 1e-3,
    "labels": {
        "clusters.vis": 5,
        "outliers.vis": 2,
        "clusters.ir": 4,
        "outliers.ir": 0,
        "cross.precision": 0.5,
        "cross.recall": 0.25,
    },
    "labels_kept": True,
    "losses": {"dagl.vis": 1.5},
    "scores": [],
    "seconds": {"extract": 1.0, "train": 2.0},
    "images_per_second": 100.0,
    "peak_mib": 10.0,
}


def test_an_epoch_reads_well():
    text = report.epoch_block(ROW | {"scores": [{"protocol": "all", "rerank": "", "values": a_score().values}]})
    assert text.splitlines()[0] == "epoch 3/4  ·  stage 2  ·  lr 0.001"
    assert "visible 5 (2 outliers)   infrared 4 (0 outliers)   kept from before" in text
    assert "cross P 50.0 R 25.0" in text and "dagl.vis 1.5000" in text
    assert "all:   R1 50.50   mAP 50.50   mINP 50.50" in text and "100 images/s" in text


def test_a_resumed_log_forgets_the_interrupted_epoch(tmp_path):
    log = report.Log(tmp_path)
    for epoch in (1, 2, 3):
        log.record(ROW | {"epoch": epoch})
    report.Log(tmp_path, keep=2)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_tensorboard_gets_the_numbers_or_says_how_to_install_it(tmp_path, monkeypatch):
    written = {}

    class Writer:
        def __init__(self, folder, purge_step):
            assert (folder, purge_step) == (str(tmp_path), 3)

        def add_scalar(self, name, value, epoch):
            written[name, epoch] = value

        def flush(self):
            written["flushed"] = True

    import sys
    import types

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    log = report.Log(tmp_path, keep=2, tensorboard=True)
    log.record(ROW | {"scores": [{"protocol": "all", "rerank": "CMFP(te)", "values": {"mAP": 7.0}}]})
    assert written["losses/dagl.vis", 3] == 1.5 and written["all CMFP(te)/mAP", 3] == 7.0 and written["flushed"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r'pip install "vireid-engine\[tb\]"'):
        report.Log(tmp_path, tensorboard=True)
