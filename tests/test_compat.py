from __future__ import annotations

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import DBSCAN
from torch import nn
from torch.nn import functional as F

from engine import compat, ops, rerank

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("ClusterMemory", "num_features, num_samples, temp=0.05, momentum=0.2, use_hard=False"),
        (
            "compute_jaccard_distance",
            "target_features, k1=20, k2=6, print_flag=True, search_option=0, use_float16=False",
        ),
        ("re_ranking", "q_g_dist, q_q_dist, g_g_dist, k1=20, k2=6, lambda_value=0.3"),
        ("eval_sysu", "distmat, q_pids, g_pids, q_camids, g_camids, max_rank=20"),
        ("eval_regdb", "distmat, q_pids, g_pids, max_rank=20"),
        ("eval_llcm", "distmat, q_pids, g_pids, q_camids, g_camids, max_rank=20"),
    ],
)
def test_takes_the_arguments_of_what_it_replaces(name, parameters):
    found = inspect.signature(getattr(compat, name)).parameters.values()
    assert ", ".join(str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in found) == parameters


class UpdatedInBackward(torch.autograd.Function):
    """Logits whose backward updates the bank row after row, as the code does that ClusterMemory replaces."""

    @staticmethod
    def forward(ctx, inputs, targets, bank, momentum, use_hard):
        ctx.save_for_backward(inputs, targets)
        ctx.rest = bank, momentum, use_hard
        return inputs @ bank.T

    @staticmethod
    def backward(ctx, gradient):
        inputs, targets = ctx.saved_tensors
        bank, momentum, use_hard = ctx.rest
        result = gradient @ bank
        chosen = range(len(targets))
        if use_hard:
            groups = [(targets == label).nonzero().flatten().tolist() for label in targets.unique()]
            chosen = [min(group, key=lambda row: float(inputs[row] @ bank[targets[row]])) for group in groups]
        for row in chosen:
            blended = momentum * bank[targets[row]] + (1 - momentum) * inputs[row]
            bank[targets[row]] = blended / blended.norm()
        return result, None, None, None, None


class LoopedMemory(nn.Module):
    def __init__(self, num_features, num_samples, temp=0.05, momentum=0.2, use_hard=False):
        super().__init__()
        self.rest, self.temp = (momentum, use_hard), temp
        self.register_buffer("features", torch.zeros(num_samples, num_features))

    def forward(self, inputs, targets):
        logits = UpdatedInBackward.apply(F.normalize(inputs, dim=1), targets, self.features, *self.rest)
        return F.cross_entropy(logits / self.temp, targets)


def unit_rows(count, width, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64)).to(dtype)


def memory_of(kind, *, use_hard=False, momentum=0.2, count=5, width=16):
    memory = kind(width, count, temp=0.1, momentum=momentum, use_hard=use_hard).double()
    memory.features = unit_rows(count, width, 1)
    return memory


@pytest.mark.parametrize("use_hard", [False, True])
def test_trains_as_the_memory_with_loops_does(use_hard):
    memories = [memory_of(kind, use_hard=use_hard) for kind in (LoopedMemory, compat.ClusterMemory)]
    encoders = [nn.Linear(8, 16).double() for _ in memories]
    encoders[1].load_state_dict(encoders[0].state_dict())
    optimizers = [torch.optim.Adam(encoder.parameters(), lr=0.01) for encoder in encoders]
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        images = torch.randn(32, 8, generator=generator, dtype=torch.float64)
        targets = torch.randint(5, (32,), generator=generator)
        before = memories[1].features.clone()
        losses = []
        for memory, encoder, optimizer in zip(memories, encoders, optimizers, strict=True):
            optimizer.zero_grad()
            loss = memory(encoder(images), targets)
            (2 * loss).backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0])
        torch.testing.assert_close(encoders[1].weight.grad, encoders[0].weight.grad)
        torch.testing.assert_close(encoders[1].weight, encoders[0].weight)
        torch.testing.assert_close(memories[1].features, memories[0].features)
        assert not torch.equal(memories[1].features, before)


def test_gives_loss_gradient_and_memory_of_the_release():
    data = np.load(DATA / "e2_memory_cross_true.npz")
    order = data["perm"]  # in which this release updates; it is the order of the batch here
    memory = compat.ClusterMemory(32, 7, float(data["temp"]), float(data["momentum"]))
    memory.features = torch.from_numpy(data["memory_before"])
    inputs = torch.from_numpy(data["x"][order]).requires_grad_()
    loss = memory(inputs, torch.from_numpy(data["labels"][order]))
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.from_numpy(data["loss"])[()], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(inputs.grad, torch.from_numpy(data["grad_x"][order]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(memory.features, torch.from_numpy(data["memory_after"]), rtol=1e-5, atol=1e-6)


def test_losses_that_share_a_backward_keep_their_gradients_and_the_order_of_their_updates():
    looped, memory = memory_of(LoopedMemory), memory_of(compat.ClusterMemory)
    bank, targets = memory.features.clone(), torch.tensor([0, 1, 1, 4])
    first, second = (unit_rows(4, 16, seed).requires_grad_() for seed in (2, 3))
    expected = sum(F.cross_entropy(F.normalize(rows) @ bank.T / 0.1, targets) for rows in (first, second))
    gradients = torch.autograd.grad(expected, (first, second))
    sum(memory(rows, targets) for rows in (first, second)).backward()
    torch.testing.assert_close((first.grad, second.grad), gradients)
    sum(looped(rows, targets) for rows in (first, second)).backward()
    torch.testing.assert_close(memory.features, looped.features)


def test_updates_once_for_every_backward_and_never_without_one():
    memory = memory_of(compat.ClusterMemory)
    bank, inputs, targets = memory.features.clone(), unit_rows(3, 16, 2).requires_grad_(), torch.tensor([2, 2, 0])
    memory(inputs.detach(), targets)
    with torch.no_grad():
        memory(inputs, targets)
    loss = memory(inputs, targets)
    assert torch.equal(memory.features, bank)
    for _ in range(2):
        loss.backward(retain_graph=True)
        ops.memory_update_(bank, inputs.detach(), targets, 0.2)
        torch.testing.assert_close(memory.features, bank)


def test_the_hardest_feature_is_the_first_of_the_least_similar():
    memory = memory_of(compat.ClusterMemory, use_hard=True, momentum=0.0)
    bank = memory.features.clone()
    away, near = -bank, bank + 0.1 * unit_rows(5, 16, 4)
    inputs = torch.stack([near[3], near[1], away[3], away[3] * 2, away[0]]).requires_grad_()
    memory(inputs, torch.tensor([3, 1, 3, 3, -1])).backward()
    expected = bank.clone()
    expected[3], expected[1] = away[3], F.normalize(near[1], dim=0)
    torch.testing.assert_close(memory.features, expected)


@pytest.mark.parametrize("use_hard", [False, True])
def test_a_memory_without_work_stays_as_it_is(use_hard):
    memory = memory_of(compat.ClusterMemory, use_hard=use_hard)
    bank = memory.features.clone()
    for inputs, targets in ((torch.zeros(0, 16), torch.zeros(0).long()), (torch.ones(2, 16), torch.tensor([-1, -1]))):
        inputs.requires_grad_()
        memory(inputs, targets).backward()
        assert torch.equal(memory.features, bank) and not inputs.grad.any()


def test_takes_half_inputs():
    memory = memory_of(compat.ClusterMemory).float()
    inputs, targets = unit_rows(4, 16, 2, torch.bfloat16).requires_grad_(), torch.tensor([0, 1, 1, 4])
    loss = memory(inputs, targets)
    loss.backward()
    assert (loss.dtype, inputs.grad.dtype, memory.features.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    exact = memory_of(LoopedMemory)
    exact(inputs.detach().double().requires_grad_(), targets).backward()
    torch.testing.assert_close(memory.features.double(), exact.features, rtol=0, atol=1e-2)


def test_the_memory_names_wrong_arguments():
    memory = compat.ClusterMemory(4, 3)
    assert memory.features.shape == (3, 4) and list(memory.state_dict()) == ["features"]
    with pytest.raises(ValueError, match=r"momentum must be a number in \[0, 1\], got float 1.2"):
        compat.ClusterMemory(4, 3, momentum=1.2)
    with pytest.raises(ValueError, match="temp must be a finite number above 0"):
        compat.ClusterMemory(4, 3, temp=0.0)
    with pytest.raises(TypeError, match="inputs must be a tensor"):
        memory([1.0], torch.tensor([0]))
    with pytest.raises(ValueError, match="targets must be of dtype int64"):
        memory(torch.ones(1, 4), torch.tensor([0.0]))
    with pytest.raises(ValueError, match="inputs must be of size 4 in dimension 1"):
        memory(torch.ones(1, 5), torch.tensor([0]))
    memory.features = torch.ones(3, 4, requires_grad=True)
    with pytest.raises(ValueError, match="features must be a constant"):
        memory(torch.ones(1, 4), torch.tensor([0]))


def people(count, width, seed):
    """Unit rows in groups, as features of identities are."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(count // 8 + 1, width))[generator.integers(count // 8 + 1, size=count)]
    rows += 0.5 * generator.normal(size=rows.shape)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def reciprocal_jaccard(order, distance, near_count, half_count, k2):
    """Row by row: k-reciprocal sets of `order` `[N, N]`, softmax of -`distance`, query expansion, Jaccard distance."""
    row_count = len(order)
    weights = np.zeros((row_count, row_count))

    def reciprocal(row, count):
        return {other for other in order[row, :count] if row in order[other, :count]}

    for row in range(row_count):
        near = reciprocal(row, near_count)
        members = set(near)
        for other in near:
            half = reciprocal(other, half_count)
            members |= half if len(half & near) > 2 / 3 * len(half) else set()
        for other in members:
            weights[row, other] = np.exp(-distance[row, other])
        weights[row] /= weights[row].sum() or 1
    if k2 > 1:
        weights = np.stack([weights[order[row, :k2]].mean(axis=0) for row in range(row_count)])
    shared = np.array([[np.minimum(first, second).sum() for second in weights] for first in weights])
    return np.maximum(1 - shared / (2 - shared), 0)


@pytest.mark.parametrize(("k1", "k2"), [(20, 6), (9, 1), (6, 3), (1, 1)])
def test_jaccard_is_that_of_the_loops(k1, k2):
    features = people(60, 16, k1)
    distance = 2 - 2 * features @ features.T
    order = distance.argsort(axis=1, kind="stable")[:, :k1]
    expected = reciprocal_jaccard(order, distance, k1, round(k1 / 2) + 1, k2)
    result = compat.compute_jaccard_distance(torch.from_numpy(features), k1, k2, print_flag=False, search_option=3)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("use_float16", "dtype", "tolerance"), [(False, np.float32, 1e-5), (True, np.float16, 1e-3)])
def test_jaccard_is_that_of_the_field(use_float16, dtype, tolerance, capsys):
    data = np.load(DATA / "g1_jaccard_k20.npz")
    result = compat.compute_jaccard_distance(torch.from_numpy(data["X"]), use_float16=use_float16)
    assert isinstance(result, np.ndarray) and result.dtype == dtype and capsys.readouterr().out == ""
    np.testing.assert_allclose(result, data["jaccard"], rtol=0, atol=tolerance)
    for name in ("03", "05", "06"):
        labels = DBSCAN(eps=int(name) / 10, min_samples=4, metric="precomputed").fit_predict(result)
        assert np.array_equal(labels, data[f"dbscan_eps{name}"])


def test_jaccard_of_few_rows_and_wrong_ones():
    assert compat.compute_jaccard_distance(torch.ones(0, 3)).shape == (0, 0)
    assert compat.compute_jaccard_distance(torch.ones(1, 3)).tolist() == [[0.0]]
    with pytest.raises(TypeError, match="target_features must be a tensor"):
        compat.compute_jaccard_distance(np.ones((2, 3)))
    with pytest.raises(ValueError, match="k1 must be an integer of at least 1"):
        compat.compute_jaccard_distance(torch.ones(2, 3), k1=0)


def distances(query_count, gallery_count, seed, dtype=np.float64):
    """Euclidean distances: query to gallery, query to query, gallery to gallery."""
    features = people(query_count + gallery_count, 16, seed)
    joint = np.sqrt(np.maximum(2 - 2 * features @ features.T, 0)).astype(dtype)
    queries, gallery = slice(query_count), slice(query_count, None)
    return joint[queries, gallery], joint[queries, queries], joint[gallery, gallery]


def re_ranked(q_g, q_q, g_g, k1, k2, lambda_value):
    """The distance matrices as the original joins them, then row by row."""
    joint = np.vstack([np.hstack([q_q, q_g]), np.hstack([q_g.T, g_g])])
    squared = np.square(joint).astype(np.float32)
    scaled = np.array([squared[:, row] / (squared[:, row].max() or 1) for row in range(len(joint))])
    order = scaled.argsort(axis=1, kind="stable")
    jaccard = reciprocal_jaccard(order, scaled.astype(np.float64), k1 + 1, round(k1 / 2) + 1, k2)
    return ((1 - lambda_value) * jaccard + lambda_value * scaled)[: len(q_q), len(q_q) :]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("k1", "k2", "lambda_value"), [(20, 6, 0.3), (6, 1, 0.0), (5, 12, 1.0), (1, 2, 0.5), (200, 300, 0.3)]
)
def test_re_ranking_is_that_of_the_loops(k1, k2, lambda_value, dtype):
    matrices = distances(17, 43, k1, dtype)
    result = compat.re_ranking(*matrices, k1, k2, lambda_value)
    assert result.dtype == np.float32 and result.shape == (17, 43)
    np.testing.assert_allclose(result, re_ranked(*matrices, k1, k2, lambda_value), rtol=0, atol=2e-6)


@settings(max_examples=50, deadline=None)
@given(
    queries=st.integers(1, 5),
    gallery=st.integers(1, 9),
    k1=st.integers(1, 12),
    k2=st.integers(1, 7),
    seed=st.integers(0, 1000),
)
def test_re_ranking_orders_equal_distances_by_index(queries, gallery, k1, k2, seed):
    generator = np.random.default_rng(seed)
    points = generator.integers(0, 3, size=queries + gallery)  # few places: many ties, columns of zeros
    joint = abs(points[:, None] - points).astype(np.float64)
    matrices = joint[:queries, queries:], joint[:queries, :queries], joint[queries:, queries:]
    result = compat.re_ranking(*matrices, k1, k2)
    np.testing.assert_allclose(result, re_ranked(*matrices, k1, k2, 0.3), rtol=0, atol=2e-6)


def test_re_ranking_in_blocks_and_of_any_layout_is_the_same(monkeypatch):
    matrices = distances(12, 31, 0)
    expected = compat.re_ranking(*matrices, 7, 3)
    monkeypatch.setattr(rerank, "BLOCK_ROWS", 5)
    strided = [np.asfortranarray(matrix)[::-1][::-1] for matrix in matrices]
    assert np.array_equal(compat.re_ranking(*strided, 7, 3), expected)


def test_re_ranking_without_queries_or_gallery_is_empty():
    assert compat.re_ranking(np.ones((0, 2)), np.ones((0, 0)), np.ones((2, 2))).shape == (0, 2)
    assert compat.re_ranking(np.ones((3, 0)), np.ones((3, 3)), np.ones((0, 0))).shape == (3, 0)


def test_re_ranking_names_wrong_arguments():
    q_g, q_q, g_g = distances(3, 4, 0)
    with pytest.raises(ValueError, match=r"q_g_dist must be of shape \[Q, G\], got \[4\]"):
        compat.re_ranking(q_g[0], q_q, g_g)
    with pytest.raises(ValueError, match=r"q_q_dist must be of shape \[3, 3\], as q_g_dist is \[3, 4\], got \[4, 4\]"):
        compat.re_ranking(q_g, g_g, q_q)
    with pytest.raises(ValueError, match="k2 must be an integer of at least 1, got int 0"):
        compat.re_ranking(q_g, q_q, g_g, k2=0)
    with pytest.raises(ValueError, match=r"lambda_value must be a number in \[0, 1\], got float 1.5"):
        compat.re_ranking(q_g, q_q, g_g, lambda_value=1.5)
    with pytest.raises(ValueError, match="must be finite"):
        compat.re_ranking(q_g * np.nan, q_q, g_g)


def scored(distmat, q_pids, g_pids, q_camids, g_camids, max_rank, protocol):
    """Query by query, as the evaluation scripts do it."""
    curves, precisions, penalties = [], [], []
    for query, order in enumerate(np.argsort(distmat, axis=1, kind="stable")):
        hidden = {
            "sysu": (q_camids[query] == 3) & (g_camids[order] == 2),
            "llcm": (g_pids[order] == q_pids[query]) & (g_camids[order] == q_camids[query]),
            "regdb": np.zeros(len(order), dtype=bool),
        }[protocol]
        pids = g_pids[order][~hidden]
        hits = pids == q_pids[query]
        if not hits.any():
            continue
        listed = hits if protocol == "regdb" else np.array(list(dict.fromkeys(pids.tolist()))) == q_pids[query]
        curves.append(listed.cumsum()[:max_rank].clip(max=1))
        places = hits.nonzero()[0] + 1
        precisions.append(np.mean(np.arange(1, len(places) + 1) / places))
        penalties.append(len(places) / places[-1])
    return np.mean(curves, axis=0), np.mean(precisions), np.mean(penalties)


def evaluate(protocol, arrays, **options):
    distmat, q_pids, g_pids, *cams = arrays
    return getattr(compat, f"eval_{protocol}")(
        distmat, q_pids, g_pids, *([] if protocol == "regdb" else cams), **options
    )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("protocol", ["sysu", "regdb", "llcm"])
def test_scores_are_those_of_the_evaluation_scripts(protocol):
    data = np.load(DATA / "f1_eval.npz")
    arrays = [data[key] for key in ("dist", "q_ids", "g_ids", "q_cams", "g_cams")]
    arrays[0].setflags(write=False)  # as of a memory map
    cmc, mean_precision, penalty = evaluate(protocol, arrays)
    assert cmc.dtype == np.float32
    np.testing.assert_allclose(cmc, data[f"{protocol}_cmc"], rtol=0, atol=1e-7)
    assert mean_precision == pytest.approx(float(data[f"{protocol}_mAP"]), abs=1e-12)
    assert penalty == pytest.approx(float(data[f"{protocol}_mINP"]), abs=1e-12)


@pytest.mark.parametrize("protocol", ["sysu", "regdb", "llcm"])
@pytest.mark.parametrize("max_rank", [3, 20, 500])
def test_scores_are_those_of_the_loops(protocol, max_rank):
    """Ids of any integer type, distances of any layout, ties, and a gallery smaller than `max_rank`."""
    generator = np.random.default_rng(max_rank)
    distmat = (generator.integers(0, 40, size=(70, 50)) / 8).T[::-1]
    pids = [generator.integers(9, size=count).astype(np.int32) for count in (50, 70)]
    cams = [generator.integers(1, 5, size=count).astype(np.uint8) for count in (50, 70)]
    arrays = distmat, *pids, *cams
    cmc, mean_precision, penalty = evaluate(protocol, arrays, max_rank=max_rank)
    expected = scored(*arrays, max_rank, protocol)
    np.testing.assert_allclose(cmc, expected[0], rtol=0, atol=1e-6)
    assert (mean_precision, penalty) == pytest.approx(expected[1:], abs=1e-12)


def test_a_query_that_sees_fewer_identities_is_no_error():
    arrays = (
        np.array([[1, 2, 3], [1, 2, 3]]),
        np.array([8, 8]),
        np.array([7, 8, 9]),
        np.array([3, 6]),
        np.array([2, 1, 1]),
    )
    cmc, mean_precision, _ = compat.eval_sysu(*arrays)
    assert cmc.tolist() == [0.5, 1.0, 1.0] and mean_precision == 0.75


def test_evaluation_names_wrong_arguments():
    distmat, q_pids, g_pids = np.ones((2, 3)), np.array([1, 2]), np.array([1, 2, 3])
    with pytest.raises(ValueError, match=r"distmat must be numbers \[Q, G\], got float64 \[3\]"):
        compat.eval_regdb(distmat[0], q_pids, g_pids)
    with pytest.raises(ValueError, match=r"g_pids must be 3 integers like distmat, got int64 \[2\]"):
        compat.eval_regdb(distmat, q_pids, q_pids)
    with pytest.raises(ValueError, match=r"q_camids must be 2 integers like distmat, got float64 \[2\]"):
        compat.eval_sysu(distmat, q_pids, g_pids, q_pids / 2, g_pids)
    with pytest.raises(ValueError, match="max_rank must be an integer of at least 1"):
        compat.eval_regdb(distmat, q_pids, g_pids, max_rank=0)


@pytest.mark.parametrize(("query_count", "gallery_count"), [(2, 3), (0, 3), (2, 0)])
def test_evaluation_without_a_match_is_an_error(query_count, gallery_count):
    queries, gallery = np.ones(query_count, dtype=int), np.ones(gallery_count, dtype=int)
    with pytest.raises(ValueError, match="q_pids must hold an identity that its query can see"):
        compat.eval_llcm(np.ones((query_count, gallery_count)), queries, gallery, queries, gallery)
