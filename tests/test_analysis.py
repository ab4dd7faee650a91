"""What there is to see in a run: numbers that can be checked by hand."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch.nn import functional as F

from engine import analysis, checkpoint, ops, runs
from engine.data.dataset import Images
from engine.errors import UserError
from engine.evolve import EVENTS
from engine.model.parts import PartHead
from engine.model.transformer import Attention
from engine.pair import Pair
from engine.runs import Record


def epoch(number, stage=1, labels=(), scores=(), **losses):
    return {
        "epoch": number,
        "epochs": 2,
        "stage": stage,
        "lr": 0.1 / number,
        "labels": dict(labels),
        "losses": losses,
        "scores": list(scores),
        "seconds": {"train": 2.0 * number, "evaluate": 1.0},
    }


def score(protocol, rerank, **values):
    return {"protocol": protocol, "rerank": rerank, "values": values}


def record(*epochs, name="one", folder="nowhere"):
    return Record(Path(folder), name, {"method": {"name": "salcr"}}, {}, list(epochs))


def test_rankings_have_the_order_and_the_hits_of_the_scores():
    generator = torch.Generator().manual_seed(1)
    distance = torch.randint(0, 5, (6, 9), generator=generator).float()  # with ties
    ids = tuple(torch.randint(0, 3, (n,), generator=generator) for n in (6, 9))
    cams = tuple(torch.randint(2, 4, (n,), generator=generator) for n in (6, 9))
    for rule in ("plain", "sysu", "llcm"):
        order, right, seen = analysis.rank(distance, ids, cams, rule)
        valid = right.any(1)
        expected = ops.rank(distance, *ids, *cams, protocol=rule, max_rank=1)
        assert expected.valid_queries == valid.sum()
        assert float(expected.cmc[0]) == pytest.approx(right[valid, 0].mean())
        for row in range(6):
            hidden = {
                "plain": [],
                "sysu": [i for i in range(9) if cams[0][row] == 3 and cams[1][i] == 2],
                "llcm": [i for i in range(9) if cams[0][row] == cams[1][i] and ids[0][row] == ids[1][i]],
            }[rule]
            assert sorted(order[row, ~seen[row]]) == hidden and not right[row, ~seen[row]].any()
            shown = order[row, seen[row]]
            assert [(float(distance[row, i]), i) for i in shown] == sorted((float(distance[row, i]), i) for i in shown)


def test_queries_are_of_several_identities_and_half_of_them_failures():
    ids = np.array([7, 7, 7, 7, 8, 8, 9, 9])
    good, bad = np.array([0, 1, 2, 4, 6]), np.array([3, 5])
    rows = analysis.choose(good, bad, ids, 5, seed=0)
    assert set(ids[rows[:3]]) == {7, 8, 9} and set(rows[3:]) == {3, 5}
    assert rows == analysis.choose(good, bad, ids, 5, seed=0)
    assert len({tuple(analysis.choose(good, bad, ids, 5, seed)) for seed in range(8)}) > 1
    assert analysis.choose(good, bad, ids, 1, seed=0)[0] in good
    assert analysis.choose(good, bad[:0], ids, 4, seed=0) == analysis.choose(good, bad[:0], ids, 5, seed=0)[:4]
    assert sorted(analysis.choose(good[:1], bad, ids, 9, seed=0)) == [0, 3, 5]


def test_distances_of_pairs_by_hand():
    features = Pair(torch.tensor([[1.0, 0], [0, 1], [1, 0]]), torch.tensor([[1.0, 0], [-1, 0], [0.6, 0.8]]))
    found = analysis.pair_distances(features, Pair(torch.tensor([1, 2, -1]), torch.tensor([1, 3, 2])))
    # id 1 - 1: 0; id 2 - 2: .2; others: 1 - 3: 2, 1 - 2: .4, 2 - 1: 1, 2 - 3: 1
    assert found.counts == (2, 4) and found.means == pytest.approx((0.1, 1.1))
    assert found.positive.sum() == pytest.approx(1) and found.negative.sum() == pytest.approx(1)
    assert found.positive[0] == 0.5 and found.negative[-1] == 0.25 and found.overlap == 0
    assert "2 pairs of one identity, mean distance 0.100; 4 of two, mean 1.100" in found.caption
    same = analysis.pair_distances(features.map(lambda rows: rows[:1].repeat(2, 1)), Pair(*[torch.tensor([1, 2])] * 2))
    assert same.overlap == pytest.approx(1)
    with pytest.raises(UserError, match="one identity only"):
        analysis.pair_distances(features, Pair(torch.tensor([1, 1, 1]), torch.tensor([1, 1, 1])))


def test_an_embedding_shows_both_modalities_of_some_identities():
    ids = np.repeat(np.arange(-1, 6), 5)
    rng = np.random.default_rng(0)
    rows = F.normalize(torch.from_numpy(np.eye(7)[ids + 1] + 0.1 * rng.normal(size=(35, 7))).float())
    images = Images(("",) * 35, ids, ids)
    subject = SimpleNamespace(test=Pair(images, images), features=Pair(rows, rows))
    found = analysis.embedding(subject, identities=4, seed=0)
    assert found.points.shape == (40, 2) and found.infrared.sum() == 20 and np.isfinite(found.points).all()
    numbers, counts = np.unique(found.identities, return_counts=True)
    assert len(numbers) == 4 and (counts == 10).all() and -1 not in numbers
    assert np.array_equal(found.points, analysis.embedding(subject, identities=4, seed=0).points)
    alone = SimpleNamespace(test=Pair(images, Images((), ids[:0], ids[:0])), features=None)
    with pytest.raises(UserError, match="fewer than two identities"):
        analysis.embedding(alone)


@pytest.mark.parametrize("uneven", [False, True])
def test_the_attention_of_parts_is_what_their_features_are_made_by(uneven):
    torch.manual_seed(0)
    head, maps = PartHead(6, 3, uneven).eval(), torch.rand(2, 6, 4, 2)
    seen = head.attention(maps)
    assert seen.shape == (2, 3, 4, 2)
    length = 3 if uneven else 2
    for part in range(3):
        row = seen[:, part].flatten(1)
        inside = row[:, part * length : (part + 1) * length]
        assert torch.allclose(inside.sum(1), torch.ones(2)) and (inside > 0).all()
        assert torch.equal(row.sum(1), inside.sum(1))
    raw = torch.einsum("sphw,sdhw->psd", seen, maps)
    expected = head._normalise(raw.unsqueeze(1))[:, 0]
    assert torch.allclose(head(maps, 1)[:, 0, 0], expected, atol=1e-6)


def test_the_weights_of_attention_are_those_that_it_applies():
    torch.manual_seed(0)
    layer, x = Attention(8, 2), torch.randn(3, 5, 8)
    weights = layer.weights(x)
    assert weights.shape == (3, 2, 5, 5) and torch.allclose(weights.sum(3), torch.ones(3, 2, 5))
    value = layer.v_proj(x).unflatten(2, (2, -1)).transpose(1, 2)
    assert torch.allclose(layer.out_proj((weights @ value).transpose(1, 2).flatten(2)), layer(x, False), atol=1e-6)


def test_curves_of_one_run_share_charts_and_those_of_several_are_told_apart():
    plain, other = score("all", "", R1=50.0, mAP=40.0, mINP=30.0), score("indoor", "", R1=1.0, mAP=1.0, mINP=1.0)
    again = score("all", "CMFP(te) k=7", R1=60.0, mAP=45.0, mINP=35.0)
    first = record(epoch(1, vis=2.0), epoch(2, 2, scores=[plain, other, again], dagl=1.0))
    charts = {chart.title: chart for chart in analysis.curves([first])}
    assert list(charts) == ["all", "all, CMFP(te) k=7", "loss terms", "learning rate"]
    assert [(line.label, line.x, line.y) for line in charts["all"].lines] == [
        ("R1", [2], [50.0]),
        ("mAP", [2], [40.0]),
        ("mINP", [2], [30.0]),
    ]
    assert [(line.label, line.x) for line in charts["loss terms"].lines] == [("vis", [1]), ("dagl", [2])]
    assert charts["all"].borders == (1,) and charts["learning rate"].log and not charts["all"].log
    assert charts["all"].caption == "all (percent), at the end: R1 50; mAP 40; mINP 30"
    charts = {chart.title: chart for chart in analysis.curves([first, record(epoch(1, vis=3.0), name="two")])}
    assert {"R1, all", "mAP, all", "R1, all, CMFP(te) k=7", "loss vis", "loss dagl", "learning rate"} <= charts.keys()
    assert [(line.run, line.y) for line in charts["loss vis"].lines] == [(0, [2.0]), (1, [3.0])]
    assert charts["loss vis"].caption == "loss vis (mean over steps), at the end: one vis 2; two vis 3"


def test_charts_of_labels_show_what_was_logged_and_no_more():
    charts = analysis.labels([record(epoch(1, labels={"ari.vis": 0.5, "cross.recall": 0.25, "clusters.ir": 4}))])
    assert [(chart.title, chart.lines[0].label, chart.lines[0].y) for chart in charts] == [
        ("ARI of clusters and identities", "visible", [0.5]),
        ("visible-infrared pairs", "recall", [25.0]),
        ("clusters", "infrared", [4]),
    ]
    with pytest.raises(UserError, match="no epoch is finished"):
        analysis.labels([record()])


def test_sizes_of_clusters_are_those_of_the_last_checkpoint(tmp_path):
    labels = [torch.tensor([0, 0, 0, 1, 1, -1]), torch.tensor([2, 2, 0, -1])]
    checkpoint.save(tmp_path / "last.pt", {"network": {}, "config": {}, "labels": [labels, labels, None]})
    chart = analysis.sizes([record(folder=tmp_path), record(name="gone")])
    assert [line.x for line in chart.lines] == [[0.5, 1.5, 2.5, 3.5]] * 2
    assert [(line.label, line.y) for line in chart.lines] == [("visible", [0, 1, 1]), ("infrared", [1, 1, 0])]
    with pytest.raises(UserError, match="no such checkpoint"):
        analysis.sizes([record()])
    torch.save({"network": {}, "config": {}, "labels": None}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="no epoch has begun"):
        analysis.sizes([record(folder=tmp_path)])
    large = [torch.arange(1000).clamp(max=500)]  # 500 clusters of 1, one of 500
    checkpoint.save(tmp_path / "last.pt", {"network": {}, "config": {}, "labels": [large * 2] * 2 + [None]})
    line = analysis.sizes([record(folder=tmp_path)]).lines[0]
    assert len(line.y) <= 22 and line.y[0] == 500 and sum(line.y) == 501 and line.x[-1] > 500


def test_events_and_phases_are_stacked_by_epoch():
    rows = [epoch(n, labels=dict(zip(EVENTS, (n, 10 * n, n, 0, 1, 0), strict=True))) for n in (1, 2)]
    clusters, updates = analysis.events(record(*rows))
    assert {line.label: line.y for line in clusters.lines} == {
        "births": [1, 2],
        "merges": [0, 0],
        "splits": [1, 1],
        "retirements": [0, 0],
    }
    assert updates.parts == {"accepted": [10, 20], "rejected": [1, 2]} and updates.epochs == [1, 2]
    rows[0]["seconds"] = {"train": 1.0}
    bars = analysis.phases(record(*rows))
    assert bars.parts == {"train": [1.0, 4.0], "evaluate": [0.0, 1.0]}
    assert bars.caption == "time (seconds) by epoch; sums: train 5, evaluate 1"
    with pytest.raises(UserError, match=r"its method \(salcr\) has no memory that evolves"):
        analysis.events(record(epoch(1)))


def write_run(folder, *lines):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 0}))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    return folder


def test_records_are_read_as_far_as_they_go(tmp_path):
    good = json.dumps(epoch(1))
    first = write_run(tmp_path / "a" / "seed0", good, '{"epoch": 2, "lo')  # being written
    second, third = write_run(tmp_path / "b" / "seed0"), write_run(tmp_path / "seed1", good)
    found = runs.read([first, second, third])
    assert [one.name for one in found] == ["a/seed0", "b/seed0", "seed1"]
    assert [len(one.epochs) for one in found] == [1, 0, 1]
    assert found[0].settings == {"seed": 0} and found[0].environment == {}
    with pytest.raises(UserError, match="given 2 times"):
        runs.read([first, tmp_path / "b" / ".." / "a" / "seed0"])
    with pytest.raises(UserError, match=r"not a run folder \(it has no config.yaml\)"):
        runs.read([tmp_path])
    with pytest.raises(UserError, match="metrics.jsonl, line 1: not JSON"):
        runs.read([write_run(tmp_path / "bad", "{", good)])
    with pytest.raises(UserError, match="line 1: not an epoch of this engine .it has no epochs, stage"):
        runs.read([write_run(tmp_path / "foreign", '{"epoch": 1}')])
    (third / "config.yaml").write_text("- 1")
    with pytest.raises(UserError, match="config.yaml: expected settings .*, got list"):
        runs.read([third])
    (third / "config.yaml").write_text("a: [")
    with pytest.raises(UserError, match="config.yaml: not valid YAML"):
        runs.read([third])
    for content, reason in (("[1]", "expected names and values, got list"), ("{", "not JSON")):
        (second / "environment.json").write_text(content)
        with pytest.raises(UserError, match=f"environment.json: {reason}"):
            runs.read([second])
