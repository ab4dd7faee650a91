"""Pseudo-labels, their quality, and links between modalities."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch.nn import functional as F

from engine import config
from engine.associate import associate
from engine.cluster import Labels, cluster, quality, relabel_nearest
from engine.memory import cluster_memory, update
from engine.pair import Pair

PEOPLE = 6


def people(count: int, seed: int, spread: float = 0.15) -> tuple[torch.Tensor, np.ndarray]:
    """Unit rows around one direction per person, the same for every seed; and who they are."""
    means = torch.randn(PEOPLE, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(count) % PEOPLE
    return F.normalize(means[ids] + spread * torch.randn(count, 16, generator=generator)), ids.numpy()


@pytest.fixture
def features():
    vis, vis_ids = people(60, 1)
    ir, ir_ids = people(48, 2)
    return Pair(vis, ir), Pair(vis_ids, ir_ids)


SETTINGS = config.Cluster(k1=Pair(8, 6), k2=3, eps=Pair(0.6, 0.6), min_samples=3)


def test_clusters_are_the_people(features):
    labels = cluster(features[0], SETTINGS)
    assert labels.counts == Pair(PEOPLE, PEOPLE)
    assert labels.own == labels.clusters and labels.cross is None
    for found, ids in zip(labels.own, features[1], strict=True):
        assert adjusted_rand_score(ids, found.numpy()) == 1


def test_images_in_clusters_are_counted_once(monkeypatch):
    clusters = Pair(torch.tensor([-1, 2, 0, -1, 1, 1]), torch.tensor([-1, -1]))
    labels = Labels(clusters, clusters)
    assert labels.counts == Pair(3, 0) and labels.clustered == Pair(4, 0)
    assert [rows.tolist() for rows in labels.rows] == [[1, 2, 4, 5], []]
    nothing = clusters.map(lambda found: found[:0])
    assert Labels(nothing, nothing).counts == Labels(nothing, nothing).clustered == Pair(0, 0)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    assert labels.moved(clusters.swap(), clusters).counts == Pair(3, 0)


def test_each_modality_has_its_own_settings(features):
    none = config.Cluster(k1=Pair(8, 6), k2=3, eps=Pair(0.6, 0.001), min_samples=3)
    assert cluster(features[0], none).counts == Pair(PEOPLE, 0)


def test_optimal_transport_links_the_same_people(features):
    rows, ids = features
    labels = cluster(rows, SETTINGS)
    prototypes = rows.map(cluster_memory, labels.own, labels.counts)
    cross = associate(rows, prototypes, 0.2, 1e-3, 500)
    scores = quality(Labels(labels.clusters, labels.own, cross), ids)
    assert scores["cross.precision"] == scores["cross.recall"] == 1
    assert scores["ari.vis"] == scores["ami.ir"] == 1


def test_quality_counts_pairs():
    # Visible images 0, 1 of person 7 and 2 of person 8; infrared 0 of person 7, 1 of person 8, 2 unknown.
    ids = Pair(np.array([7, 7, 8]), np.array([7, 8, -1]))
    own = Pair(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
    cross = Pair(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
    scores = quality(Labels(own, own, cross), ids)
    # Visible space: label 0 has v0, v1 and r0, r1: 4 pairs, 2 right; label 1 has v2 alone among known. True pairs: 3.
    # Infrared space: label 0 has v0 and r0: right; label 1 has v1, v2 and r1: 2 pairs, 1 right.
    assert scores["cross.precision"] == pytest.approx((2 / 4 + 2 / 3) / 2)
    assert scores["cross.recall"] == pytest.approx((2 / 3 + 2 / 3) / 2)


def test_quality_of_unknown_people_is_empty():
    own = Pair(torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    assert quality(Labels(own, own, own), Pair(np.full(3, -1), np.full(2, -1))) == {}


def test_relabel_moves_labelled_rows_to_the_nearest_mean_only():
    features = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.9, 0.1], [1.0, 0.0]])
    means = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert relabel_nearest(features, torch.tensor([0, 0, 1, -1]), means).tolist() == [0, 1, 1, -1]


def test_a_memory_is_the_unit_mean_of_its_cluster():
    features = torch.tensor([[3.0, 0.0], [1.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    bank = cluster_memory(features, torch.tensor([0, 0, 2, -1]), 3)
    assert bank.tolist() == [[1, 0], [0, 0], [0, 1]]


def test_memory_updates_in_batch_order_or_in_a_drawn_one():
    features = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    labels, start = torch.zeros(6, dtype=torch.int64), F.normalize(torch.ones(1, 4))

    def sequential(order):
        row = start[0]
        for i in order:
            row = F.normalize(0.1 * row + 0.9 * features[i], dim=0)
        return row

    ordered, drawn = start.clone(), start.clone()
    update(ordered, features, labels, 0.1, None)
    torch.testing.assert_close(ordered[0], sequential(range(6)))
    update(drawn, features, labels, 0.1, torch.Generator().manual_seed(3))
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3)).tolist()
    torch.testing.assert_close(drawn[0], sequential(order))
    assert not torch.allclose(ordered, drawn)
