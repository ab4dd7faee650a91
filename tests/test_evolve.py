"""The evolving memory: bootstrap, transport, gate, updates, merging, splitting, succession."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from engine import evolve, ops
from engine.evolve import EVENTS, FUSED, IR, VIS, Gate, Merge, Split, Transport
from engine.pair import Pair


def unit(count: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


def turned(degrees: float, width: int = 8) -> torch.Tensor:
    """A unit vector so many degrees off the first axis, towards the second."""
    angle = math.radians(degrees)
    return torch.tensor([math.cos(angle), math.sin(angle)] + [0.0] * (width - 2))


def memory(fused, vis, ir, counts=None) -> evolve.Memory:
    """A memory of clusters with these prototypes (None = lacks the view) and one image of each modality apiece."""
    number = len(fused)
    rows = [torch.stack([torch.zeros(8) if row is None else row for row in view]) for view in (fused, vis, ir)]
    labels = torch.arange(number)
    made = evolve.bootstrap(*(Pair(unit(number), unit(number)),) * 2, Pair(labels, labels))
    made["prototypes"] = torch.stack(rows)
    if counts is not None:
        made["counts"] = torch.tensor(counts)
    return made


def events(found: evolve.Memory) -> dict[str, float]:
    return {name: value for name, value in zip(EVENTS, found["events"].tolist(), strict=True) if value}


def test_prototypes_begin_as_means_in_each_view_and_outliers_stay_out():
    views, fused = Pair(unit(5, seed=1), unit(4, seed=2)), Pair(unit(5, seed=1), unit(4, seed=3))
    labels = Pair(torch.tensor([0, 0, 2, -1, 2]), torch.tensor([1, 0, -1, 1]))
    found = evolve.bootstrap(views, fused, labels)
    torch.testing.assert_close(found["prototypes"][FUSED, 0], torch.stack([*fused.vis[:2], fused.ir[1]]).mean(0))
    torch.testing.assert_close(found["prototypes"][VIS, 2], views.vis[[2, 4]].mean(0))
    torch.testing.assert_close(found["prototypes"][IR, 1], views.ir[[0, 3]].mean(0))
    assert found["counts"].tolist() == [3, 2, 2]
    assert evolve.present(found).tolist() == [[True] * 3, [True, False, True], [True, True, False]]
    assert found["scores"].abs().sum() == 0 and found["groups"].tolist() == [0, 1, 2]


def test_transport_goes_to_softmax_and_to_balanced_transport_as_the_penalty_falls_and_grows():
    features, bank = unit(12, seed=1), unit(4, seed=2)
    counts = torch.tensor([1.0, 2.0, 3.0, 6.0])
    free = evolve.transport(features, bank, counts, Transport(0.1, 5, 1e-7, "counts"))
    softmax = (features @ bank.T / 0.1 + (counts / counts.sum()).log()).softmax(1)
    # Without a penalty the column step gives v = 1 after the start from v = b.
    plain = (features @ bank.T / 0.1).softmax(1)
    torch.testing.assert_close(free, plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(free, softmax, atol=1e-3)
    tight = evolve.transport(features, bank, counts, Transport(0.1, 300, 1e4, "counts"))
    balanced = ops.sinkhorn(1 - features @ bank.T, 0.1, b=counts / counts.sum(), max_iter=300, tol=0).plan() * 12
    torch.testing.assert_close(tight, balanced, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(tight.sum(0), 12 * counts / 12, atol=1e-2, rtol=1e-2)
    for plan in (free, tight):
        torch.testing.assert_close(plan.sum(1), torch.ones(12))


def test_the_printed_transport_never_opens_the_gate_and_the_relaxed_one_does():
    """64 images of 32 of 400 clusters, close to them: held exactly, columns spread every row (decision D)."""
    bank = unit(400, 64, seed=3)
    features = F.normalize(bank[:32].repeat(2, 1) + 0.4 * unit(64, 64, seed=4))
    counts = torch.full((400,), 10.0)
    printed = evolve.transport(features, bank, counts, Transport(0.05, 50, 0.0, "uniform")).amax(1)
    relaxed = evolve.transport(features, bank, counts, Transport(0.05, 5, 0.01, "counts")).amax(1)
    assert printed.mean() < 0.2 and (printed > 0.5).sum() == 0
    assert (relaxed > 0.5).float().mean() > 0.9


@pytest.mark.parametrize(("temperature", "learns"), [(0.05, False), (0.1, True)])
def test_a_plan_at_the_temperature_of_the_contrast_teaches_nothing(temperature, learns):
    """Both are then one softmax, but for the weights of columns: targets are what the features already say."""
    bank = unit(100, 64, seed=3)
    features = F.normalize(bank[:64] + 1.1 * unit(64, 64, seed=4)).requires_grad_()
    plan = evolve.transport(features, bank, torch.full((100,), 10.0), Transport(0.05, 5, 0.01, "counts"))
    own = F.one_hot(torch.arange(64), 100).float()
    pulls = []
    for targets in (plan, own):
        (gradient,) = torch.autograd.grad(ops.soft_contrast(features, bank, targets, temperature), features)
        pulls.append(-(gradient * bank[:64]).sum(1).mean())
    assert (pulls[0] > 0.1 * pulls[1]) == learns


def test_the_gate_opens_above_both_of_its_thresholds():
    fused, own = torch.tensor([0.51, 0.5, 0.9, 0.9]), torch.tensor([0.41, 0.9, 0.4, 0.41])
    assert evolve.gate(fused, own, Gate()).tolist() == [True, False, False, True]


def test_updates_follow_in_batch_order_with_a_step_each_and_are_not_normalised():
    made = memory([turned(0), turned(90)], [turned(0), turned(90)], [turned(0), None])
    before, rows = made["prototypes"].clone(), unit(4, seed=5)
    clusters, steps = torch.tensor([0, -1, 0, 1]), torch.tensor([0.1, 0.2, 0.15, 0.05])
    evolve.update(made, FUSED, rows, clusters, steps)
    first = 0.9 * before[FUSED, 0] + 0.1 * rows[0]
    torch.testing.assert_close(made["prototypes"][FUSED, 0], 0.85 * first + 0.15 * rows[2])
    torch.testing.assert_close(made["prototypes"][FUSED, 1], 0.95 * before[FUSED, 1] + 0.05 * rows[3])
    evolve.update(made, IR, rows, clusters, steps)
    torch.testing.assert_close(made["prototypes"][IR, 1], rows[3])  # the view that was lacking begins with the feature
    torch.testing.assert_close(made["prototypes"][VIS], before[VIS])


def test_counts_grow_by_accepted_updates_alone():
    made = memory([turned(0), turned(90)], [None, None], [None, None], [4.0, 5.0])
    evolve.count(made, torch.tensor([0, 0, -1]), torch.tensor([0.6, 0.8, 0.3]))
    assert made["counts"].tolist() == [6, 5]
    torch.testing.assert_close(made["scores"], torch.tensor([[2.0, 0], [1.4, 0], [1.0, 0]]))
    assert events(made) == {"accepted": 2, "rejected": 1}


@pytest.mark.parametrize(
    ("fused", "vis", "ir", "expected"),
    [
        (30, 40, 40, 1),  # cosines .87, .77, .77
        (33, 40, 40, 2),  # .84 in the fused view
        (30, 42, 40, 2),  # .74 in the visible view
        (30, 40, 42, 2),
        (30, None, 40, 1),  # a view that one lacks is not asked
        (30, None, 42, 2),
        (30, None, None, 1),
    ],
)
def test_merging_needs_all_views_that_both_have(fused, vis, ir, expected):
    other = [None if angle is None else turned(angle) for angle in (vis, ir)]
    made = memory([turned(0), turned(fused)], [turned(0), other[0]], [turned(0), other[1]], [3.0, 4.0])
    found = evolve.merge(made, Merge())
    assert len(found["counts"]) == expected
    if expected == 1:
        assert found["counts"].tolist() == [7] and events(found) == {"merges": 1}
        torch.testing.assert_close(found["prototypes"][FUSED, 0], (turned(0) + turned(fused)) / 2)
        seen = turned(0) if vis is None else (turned(0) + turned(vis)) / 2
        torch.testing.assert_close(found["prototypes"][VIS, 0], seen)
        assert found["labels.vis"].tolist() == found["labels.ir"].tolist() == [0, 0]


def test_merging_goes_on_until_nothing_is_alike_and_keeps_the_rest_in_order():
    angles = [0, 90, 20, 10, 180]
    made = memory([turned(a) for a in angles], [None] * 5, [turned(a) for a in angles], [1.0, 2, 3, 4, 5])
    made["groups"] = torch.tensor([0, 1, 2, 3, 4])
    found = evolve.merge(made, Merge())
    assert found["counts"].tolist() == [8, 2, 5] and events(found) == {"merges": 2}
    assert found["labels.vis"].tolist() == [0, 1, 0, 0, 2]
    assert found["groups"].tolist() == [0, 1, 2]
    assert len(made["counts"]) == 5  # what was given stays


def people(count: int, each: int, seed: int, spread: float = 0.1) -> torch.Tensor:
    """Unit rows around `count` orthogonal directions, one after the other."""
    return F.normalize(torch.eye(8)[:count].repeat_interleave(each, 0) + spread * unit(count * each, seed=seed))


@pytest.mark.parametrize(("persons", "expected"), [(1, 1), (2, 2), (3, 3)])
def test_splitting_cuts_clusters_of_several_people_and_no_tight_one(persons, expected):
    views = Pair(people(persons, 6, 1), people(persons, 6, 2))
    one = Pair(*(torch.zeros(6 * persons, dtype=torch.int64) for _ in range(2)))
    found = evolve.split(evolve.bootstrap(views, views, one), views, views, Split(criterion="dispersion"))
    assert len(found["counts"]) == expected
    assert found["groups"].tolist() == [0] * expected  # children share their parent's label
    assert found["split"].tolist() == [expected > 1] * expected
    for i in range(persons):
        for labels in (found["labels.vis"], found["labels.ir"]):
            assert len(labels[6 * i : 6 * i + 6].unique()) == 1
    if expected > 1:
        assert events(found) == {"births": expected - 1, "splits": 1}
        first = int(found["labels.vis"][0])
        torch.testing.assert_close(found["prototypes"][VIS, first], views.vis[:6].mean(0))
        assert found["counts"].tolist() == [12.0] * expected


def test_no_child_is_smaller_than_the_least():
    views = Pair(torch.cat([people(1, 10, 1), people(2, 4, 2)[4:]]), torch.zeros(0, 8))
    one = Pair(torch.zeros(14, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    made = evolve.bootstrap(views, views, one)
    assert len(evolve.split(made, views, views, Split(criterion="dispersion", threshold=0.05))["counts"]) == 1
    small = Split(criterion="dispersion", threshold=0.05, least=4)
    assert len(evolve.split(made, views, views, small)["counts"]) == 2


@pytest.mark.parametrize(("criterion", "threshold", "cut"), [("conf_var", 0.25, False), ("conf_std", 0.25, True)])
def test_the_printed_criterion_never_fires(criterion, threshold, cut):
    """Confidences of 0 and 1 have the largest variance there is, .25, which is not above .25 (decision E)."""
    views = Pair(people(2, 6, 1), people(2, 6, 2))
    made = evolve.bootstrap(views, views, Pair(*(torch.zeros(12, dtype=torch.int64) for _ in range(2))))
    made["scores"] = torch.tensor([[10.0], [5.0], [5.0]])
    found = evolve.split(made, views, views, Split(criterion=criterion, threshold=threshold))
    assert len(found["counts"]) == 1 + cut


def test_merging_and_splitting_leave_an_empty_memory_as_it_is():
    empty = Pair(torch.zeros(0, 8), torch.zeros(0, 8))
    made = evolve.bootstrap(empty, empty, Pair(*(torch.zeros(0, dtype=torch.int64) for _ in range(2))))
    assert len(evolve.merge(made, Merge())["counts"]) == 0
    assert len(evolve.split(made, empty, empty, Split(criterion="dispersion"))["counts"]) == 0


def test_new_clusters_take_over_from_old_ones_and_the_others_are_born_or_retire():
    rows = unit(8, seed=1)
    views, nothing = Pair(rows, rows[:0]), torch.zeros(0, dtype=torch.int64)
    old = evolve.bootstrap(views, views, Pair(torch.tensor([0, 0, 0, 1, 1, 1, 2, 2]), nothing))
    first = evolve.rebuild(None, old)
    assert events(first) == {"births": 3}
    first["scores"] = torch.arange(9.0).view(3, 3)
    # Cluster 1 becomes 0, cluster 0 falls into 1 and 2, of which 1 has the larger part; cluster 2 becomes noise.
    fresh = evolve.bootstrap(views, views, Pair(torch.tensor([1, 1, 2, 0, 0, 0, -1, -1]), nothing))
    found = evolve.rebuild(first, fresh)
    assert found["scores"].tolist() == [[1, 0, 0], [4, 3, 0], [7, 6, 0]]
    assert events(found) == {"births": 4, "retirements": 1}


def test_images_move_to_their_nearest_prototype_and_empty_clusters_retire():
    made = memory([turned(0), turned(90), turned(180)], [turned(0)] * 3, [None] * 3)
    made["labels.vis"] = torch.tensor([0, 1, 2, -1])
    made["labels.ir"] = torch.zeros(0, dtype=torch.int64)
    rows = Pair(torch.stack([turned(10), turned(20), turned(170), turned(0)]), torch.zeros(0, 8))
    found = evolve.relabel(made, rows)
    assert found["labels.vis"].tolist() == [0, 0, 1, -1]
    assert events(found) == {"retirements": 1}
    torch.testing.assert_close(found["prototypes"][FUSED], torch.stack([turned(0), turned(180)]))
