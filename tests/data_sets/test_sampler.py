"""Batches hold what the stages ask for, and stage 1 draws in the order of the SALCR release."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.sampler import independent_batches, joint_batches, paired_batches
from engine.errors import UserError
from engine.pair import Pair

FIXTURE = Path(__file__).parents[1] / "data" / "s1_sampler_stage1.npz"
LABELS = st.lists(st.integers(-1, 6), min_size=1, max_size=60).map(np.array).filter(lambda labels: labels.max() >= 0)


def rng(seed: int = 0) -> np.random.RandomState:
    return np.random.RandomState(seed)


def test_stage_one_reproduces_the_release():
    expected = np.load(FIXTURE)
    batches = list(
        independent_batches(
            Pair(expected["label_rgb"], expected["label_ir"]),
            label_count=int(expected["num_ids"]),
            image_count=int(expected["num_pos"]),
            iterations=int(expected["iters"]),
            rng=rng(int(expected["np_seed"])),
        )
    )
    assert np.array_equal(np.concatenate([batch.vis for batch in batches]), expected["index1"])
    assert np.array_equal(np.concatenate([batch.ir for batch in batches]), expected["index2"])


@pytest.mark.filterwarnings("ignore:.*labels repeat")
@settings(deadline=None)
@given(vis=LABELS, ir=LABELS, label_count=st.integers(1, 5), image_count=st.integers(1, 5), seed=st.integers(0, 99))
def test_stage_one_batches_hold_labels_times_images(vis, ir, label_count, image_count, seed):
    labels = Pair(vis, ir)
    shape = {"label_count": label_count, "image_count": image_count, "iterations": 3}
    batches = list(independent_batches(labels, **shape, rng=rng(seed)))
    assert len(batches) == 3
    for batch in batches:
        for rows, of in zip(batch, labels, strict=True):
            assert rows.dtype == np.int64 and len(rows) == label_count * image_count
            groups = rows.reshape(label_count, image_count)
            drawn = of[groups]
            assert (drawn == drawn[:, :1]).all() and (drawn >= 0).all()
            distinct = min(label_count, len(set(of[of >= 0])))
            assert len(set(drawn[:, 0])) == distinct
            for group, label in zip(groups, drawn[:, 0], strict=True):
                if (of == label).sum() >= image_count:
                    assert len(set(group)) == image_count


@pytest.mark.filterwarnings("ignore:.*labels repeat")
@settings(deadline=None)
@given(data=st.data(), label_count=st.integers(1, 6), image_count=st.integers(1, 4), seed=st.integers(0, 99))
def test_stage_two_pairs_share_a_label_of_their_space(data, label_count, image_count, seed):
    own, cross = (Pair(data.draw(LABELS), data.draw(LABELS)) for _ in range(2))
    size = Pair(min(len(own.vis), len(cross.vis)), min(len(own.ir), len(cross.ir)))
    own, cross = (labels.map(lambda values, count: values[:count], size) for labels in (own, cross))
    carried = [set(vis[vis >= 0]) & set(ir[ir >= 0]) for vis, ir in ((own.vis, cross.ir), (cross.vis, own.ir))]
    shape = {"label_count": label_count, "image_count": image_count, "iterations": 2}
    if not any(carried):
        with pytest.raises(UserError, match="no labels that both modalities carry"):
            paired_batches(own, cross, **shape, rng=rng(seed))
        return
    half = (label_count + 1) // 2 if all(carried) else label_count if carried[0] else 0
    cut = half * image_count
    for batch in paired_batches(own, cross, **shape, rng=rng(seed)):
        assert len(batch.vis) == len(batch.ir) == label_count * image_count
        assert np.array_equal(own.vis[batch.vis[:cut]], cross.ir[batch.ir[:cut]])
        assert np.array_equal(cross.vis[batch.vis[cut:]], own.ir[batch.ir[cut:]])
        parts = [(own.vis[batch.vis[:cut]], carried[0], half), (own.ir[batch.ir[cut:]], carried[1], label_count - half)]
        for drawn, labels, count in parts:
            assert set(drawn) <= labels and len(set(drawn)) == min(count, len(labels))


def test_every_label_is_drawn_sooner_or_later():
    labels = Pair(np.repeat(np.arange(9), 3), np.repeat(np.arange(7), 3))
    batches = list(independent_batches(labels, label_count=2, image_count=2, iterations=60, rng=rng()))
    for modality in ("vis", "ir"):
        assert set(np.concatenate([batch[modality] for batch in batches])) == set(range(len(labels[modality])))


def test_the_same_seed_draws_the_same_batches_and_another_seed_others():
    labels = Pair(np.arange(40) % 8, np.arange(40) % 7)
    first, again, other = (
        list(paired_batches(labels, labels, label_count=4, image_count=2, iterations=4, rng=rng(seed)))
        for seed in (1, 1, 2)
    )
    assert all(np.array_equal(a.vis, b.vis) and np.array_equal(a.ir, b.ir) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a.vis, b.vis) for a, b in zip(first, other, strict=True))


def test_few_clusters_are_warned_of_and_enough_are_not():
    labels = Pair(np.repeat(np.arange(3), 4), np.repeat(np.arange(5), 4))
    with pytest.warns(UserWarning, match="3 visible clusters for 4 places in a batch: labels repeat") as caught:
        independent_batches(labels, label_count=4, image_count=2, iterations=1, rng=rng())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        independent_batches(labels, label_count=3, image_count=2, iterations=1, rng=rng())


def test_no_cluster_is_an_error_before_the_first_batch():
    none = np.full(5, -1)
    with pytest.raises(UserError, match="no infrared clusters"):
        independent_batches(Pair(np.zeros(5, int), none), label_count=1, image_count=2, iterations=1, rng=rng())
    with pytest.raises(UserError, match="no visible clusters"):
        independent_batches(Pair(np.empty(0, int), none), label_count=2, image_count=2, iterations=1, rng=rng())


@pytest.mark.parametrize("shape", [{"label_count": 0, "image_count": 2}, {"label_count": 2, "image_count": 0}])
def test_empty_batches_are_refused(shape):
    labels = Pair(np.zeros(4, int), np.zeros(4, int))
    with pytest.raises(ValueError, match="_count must be at least 1, got 0"):
        independent_batches(labels, **shape, iterations=1, rng=rng())
    with pytest.raises(ValueError, match="_count must be at least 1, got 0"):
        paired_batches(labels, labels, **shape, iterations=1, rng=rng())


JOINT = Pair(np.array([0] * 5 + [1] * 5 + [2] * 5 + [-1]), np.array([0] * 5 + [3] * 5 + [1] * 5 + [4] * 2 + [-1]))


def test_joint_batches_pair_images_of_a_label_and_let_lonely_labels_stand_in_for_each_other():
    seen = Pair(set(), set())
    for batch in joint_batches(JOINT, label_count=4, image_count=3, iterations=40, rng=rng()):
        drawn = Pair(JOINT.vis[batch.vis], JOINT.ir[batch.ir])
        for labels, every in zip(drawn, seen, strict=True):
            assert len(labels) == 12 and (labels.reshape(4, 3) == labels[::3, None]).all() and (labels >= 0).all()
            every.update(labels)
        for vis, ir in zip(drawn.vis, drawn.ir, strict=True):
            assert vis == ir or (vis == 2 and ir in (3, 4))
        assert len(set(drawn.ir)) >= 3
    assert seen == Pair({0, 1, 2}, {0, 1, 3, 4})


def test_joint_batches_without_any_shared_or_any_lonely_label():
    for vis, ir in (([0, 0, 1], [2, 3, 3]), ([0, 1, 1], [1, 0, 0])):
        labels = Pair(np.array(vis), np.array(ir))
        for batch in joint_batches(labels, label_count=2, image_count=2, iterations=5, rng=rng()):
            assert len(batch.vis) == len(batch.ir) == 4
    with pytest.raises(UserError, match="no clusters with infrared images"):
        joint_batches(Pair(np.array([0]), np.array([-1])), label_count=1, image_count=1, iterations=1, rng=rng())
