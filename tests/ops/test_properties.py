"""What holds for every operator on every back end, whatever the arguments.

The truth is the reference in float64 on contiguous inputs without bad indices. Numbers err at most twice as much as
those of the reference in the type given, plus a floor; choices between candidates are the same where they tie exactly,
and as good within the error of their scores where not.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from emulated import cuda_backend
from graph_checks import stored
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_inputs import INPUTS, Call
from operator_results import (
    copied,
    doubled,
    doubled_options,
    is_csr,
    on_backend,
    on_cpu,
    outcome,
    placed,
    same_bits,
    tensors,
)
from test_one_op_one_name import OPERATORS
from torch import Tensor
from torch.nn import functional

from engine import ops
from engine.ops._backend import ORDER, exists
from engine.ops._precision import accumulation_dtype

BACKENDS = ("cpu", "reference")


def instruction_sets() -> list[str]:
    native = importlib.import_module("engine._C")
    names = ["portable", "avx2", "avx512"]
    return names[: names.index(native.isa()) + 1]


@contextmanager
def running_on(backend: str, threads: int = 1, instructions: str = "") -> Iterator[None]:
    """Native code finds NaN or the largest integer in memory that it is to write to.

    On the "emulator" CUDA kernels run, their threads in another order for another number of `threads`.
    """
    threads_before, instructions_before = torch.get_num_threads(), os.environ.get("ENGINE_ISA", "")
    torch.set_num_threads(threads)
    os.environ["ENGINE_ISA"] = instructions
    torch.use_deterministic_algorithms(backend != "reference")
    try:
        with cuda_backend(descending=threads > 1) if backend == "emulator" else ops.use_backend(backend):
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads_before)
        os.environ["ENGINE_ISA"] = instructions_before


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name in OPERATORS for backend in BACKENDS if ops.backends(name)[backend] is None],
)
@settings(deadline=None)
@given(data=st.data())
def test_is_the_reference_whatever_the_arguments(name, backend, data):
    check(name, backend, data)


@pytest.mark.parametrize("name", [name for name in OPERATORS if exists(name, "cuda")])
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_on_the_emulator_too(name, data):
    check(name, "emulator", data)


def check(name: str, backend: str, data: st.DataObject) -> None:
    call = data.draw(INPUTS[name], label="call")
    if backend == "emulator" and in_float64(call.arguments):
        backend = "reference"  # alone computes in it
    instructions = data.draw(st.sampled_from(instruction_sets()), label="instructions")
    with running_on(backend, 1, instructions):
        result = result_of(name, backend, call, call.arguments)
    if backend != "reference":  # those of the reference are torch's own, of which each start costs more than all else
        with running_on(backend, 2, instructions):
            again = outcome(name, getattr(ops, name), copied(call.arguments), call.options)
        assert same_bits(result, again), "the number of threads shows"
    judge(name, call, result)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name in OPERATORS for backend in ORDER["cuda"] if exists(name, backend)],
)
@settings(deadline=None, max_examples=30)  # as every type, and every size of 1, is a kernel of its own to compile
@given(data=st.data())
def test_is_the_reference_on_a_gpu_too(name, backend, data):
    call = data.draw(INPUTS[name], label="call")
    arguments = placed(call.arguments, "cuda")
    if in_float64(arguments):
        backend = "reference"  # alone computes in it
    call.options = dict(zip(call.options, placed(tuple(call.options.values()), "cuda"), strict=True))
    with running_on_a_gpu(name, backend):
        result = result_of(name, backend, call, arguments)
        again = outcome(name, getattr(ops, name), copied(placed(call.arguments, "cuda")), call.options)
    assert same_bits(result, again)
    call.options = dict(zip(call.options, placed(tuple(call.options.values()), "cpu"), strict=True))
    judge(name, call, on_cpu(result))


def in_float64(arguments: tuple[Any, ...]) -> bool:
    return any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in arguments)


@contextmanager
def running_on_a_gpu(name: str, backend: str) -> Iterator[None]:
    """As `running_on`; torch only warns where its own products, which are, need a setting to be deterministic."""
    torch.use_deterministic_algorithms(backend != "reference", warn_only=True)
    try:
        with on_backend(name, backend):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def result_of(name: str, backend: str, call: Call, given: tuple[Any, ...]) -> Any:
    """What the operator makes of arguments that it leaves as they are, but for what its name says it changes."""
    before = copied(given)
    in_place = name.endswith("_")
    arguments = copied(given) if in_place else given
    result = outcome(name, getattr(ops, name), arguments, call.options)
    assert not any(value.isnan().any() for value in tensors(result))
    assert not in_place or result is arguments[0]
    for value, old in list(zip(arguments, before, strict=True))[in_place:]:
        if isinstance(value, Tensor):
            assert all(map(torch.equal, tensors(value), tensors(old))), "an input was changed"
    return result


def judge(name: str, call: Call, result: Any) -> None:
    """Compare with the reference in the types given and in float64."""
    # What a loss runs on the back end "reference" is not yet the definition, see engine/ops/_contrast.py.
    module = importlib.import_module(f"engine.ops.{name}")
    reference = module.reference if name.endswith("contrast") else getattr(ops, name)
    with running_on("reference"):
        plain = outcome(name, reference, copied(call.tame), call.options)
        truth = outcome(name, reference, doubled(copied(call.tame)), doubled_options(call.options))
        JUDGES[name](call, result, plain, truth)


def test_every_operator_has_inputs_and_a_judge():
    assert set(INPUTS) == set(JUDGES) == set(OPERATORS)


# What a right answer is, operator by operator: judge(call, result, reference in the same type, truth).


def epsilon(*values: Tensor) -> float:
    return torch.finfo(accumulation_dtype(*values)).eps


def largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.numel() else 0.0


def longest(rows: Tensor) -> float:
    return largest(rows.double().norm(dim=-1))


def in_budget(result: Tensor, plain: Tensor, truth: Tensor, floor: float) -> None:
    """`floor`: what rounding may add to an operand of the size of those that were summed."""
    assert result.dtype == plain.dtype and result.shape == plain.shape == truth.shape
    finite = result.isfinite() & plain.isfinite() & truth.isfinite()
    if floor < torch.finfo(result.dtype).max:
        assert torch.equal(result[~finite], plain[~finite])  # too large for the type, for both
    error, allowed = (largest((value.double() - truth)[finite]) for value in (result, plain))
    assert error <= 2 * allowed + floor


def judge_contrast(call: Call, result: Any, plain: Any, truth: Any) -> None:
    features, bank, target, temperature = call.tame
    most = longest(features) * longest(bank) / temperature  # logits and their logarithms of sums are of this size
    weight = float(target.double().sum(-1).max()) if target.is_floating_point() and target.numel() else 1.0
    rows = features.shape[-2] if call.options["reduction"] == "sum" else 1
    floor = 16 * epsilon(features, bank) * (1 + weight) * (4 + most)
    in_budget(result[0], plain[0], truth[0], floor * rows)
    in_budget(result[1], plain[1], truth[1], floor * 3 * longest(bank) / temperature)


def judge_sum(call: Call, result: Any, plain: Any, truth: Any) -> None:
    """Of segment_mean and propagate: weighted sums of the entries of the features."""
    if is_csr(call.tame[0]):
        weights = stored(call.tame[0]).abs().double()
        features = call.tame[1]
        row_sum, column_sum = (largest(weights.sum(dim)) if weights.numel() else 0.0 for dim in (1, 0))
        precision = epsilon(features, call.tame[0])
    else:
        features, row_sum, column_sum = call.tame[0], 1.0, 1.0
        precision = epsilon(features)
    in_budget(result[0], plain[0], truth[0], 16 * precision * row_sum * largest(features.double()))
    in_budget(result[1], plain[1], truth[1], 16 * precision * column_sum * 3)


def judge_memory_update_(call: Call, result: Tensor, plain: Tensor, truth: Tensor) -> None:
    bank, features, labels, _ = call.tame
    named = labels.expand(features.shape[:-1]).unsqueeze(-1) == torch.arange(bank.shape[-2])
    untouched = ~named.any(-2)
    assert torch.equal(result[untouched], bank[untouched])
    in_budget(result, plain, truth, 16 * epsilon(bank, features) * max(1.0, longest(truth)))


def similarity_error(queries: Tensor, bank: Tensor) -> float:
    """How far a product of two rows may be off, for any order of summation that one would choose."""
    return 16 * epsilon(queries, bank) * longest(queries) * longest(bank)


def judge_topk(call: Call, result: Any, plain: Any, truth: Any) -> None:
    (queries, bank, _), (values, indices) = call.tame, result
    assert values.dtype == plain[0].dtype and indices.dtype == torch.int64 and values.shape == truth[0].shape
    found = truth[1] >= 0
    assert torch.equal(indices >= 0, found) and (values[~found] == -torch.inf).all() and (indices[~found] == -1).all()
    if call.exact:
        assert torch.equal(indices, truth[1]) and torch.equal(values, truth[0].to(values.dtype))
        return
    assert all(len(set(row)) == len(row) for row in (row[row >= 0].tolist() for row in indices.flatten(0, -2)))
    if call.options["exclude_self"]:
        assert not (indices == torch.arange(queries.shape[-2])[:, None]).any()
    if found.any():
        floor = similarity_error(queries, bank)
        claimed = (queries.double() @ bank.double().mT).gather(-1, indices.clamp(min=0))
        assert largest((claimed - truth[0])[found]) <= 2 * floor  # each place is taken by one that deserves it
        in_budget(values[found], plain[0][found], claimed[found], floor)


def settled(similarity: Tensor, k: int, band: float) -> Tensor:
    """The rows, bool, whose k largest entries are so by more than `band`."""
    if not 0 < k < similarity.shape[-1]:
        return torch.ones(similarity.shape[:-1], dtype=torch.bool)
    ordered = similarity.sort(dim=-1, descending=True).values
    return ordered[..., k - 1] - ordered[..., k] > 2 * band


def well_weighted(similarity: Tensor, k: int, most: float, band: float) -> Tensor:
    """The rows, bool, whose k largest entries sum to no small part of `most`, or that clearly have no positive one."""
    if similarity.shape[1] == 0 or k == 0 or most == 0:
        return torch.ones(len(similarity), dtype=torch.bool)
    total = similarity.topk(min(k, similarity.shape[1]), dim=1).values.clamp(min=0).sum(1)
    return (total > 0.05 * most) | (similarity.amax(1) < -band)


def judge_affinity(call: Call, result: Tensor, plain: Tensor, truth: Tensor) -> None:
    queries, bank, k = call.tame
    dense = [stored(graph) for graph in (result, plain, truth)]
    precision = epsilon(queries, bank)
    if call.exact:
        assert all(map(torch.equal, tensors(result)[:2], tensors(truth)[:2]))
        in_budget(*dense, 4 * precision)
        return
    similarity, error = queries.double() @ bank.double().T, similarity_error(queries, bank)
    rows = settled(similarity, k, error) & well_weighted(similarity, k, longest(queries) * longest(bank), error)
    in_budget(*(matrix[rows] for matrix in dense), 640 * precision)


def judge_cmfp(call: Call, result: Any, plain: Any, truth: Any) -> None:
    vis, ir, k = call.tame
    precision = epsilon(vis, ir)
    unit = [functional.normalize(rows.double()) for rows in (vis, ir)]
    for index, rows in enumerate(unit):
        clear = torch.ones(len(rows), dtype=torch.bool)
        for bank in () if call.exact else unit:
            similarity, most = rows @ bank.T, longest(rows) * longest(bank)
            error = 16 * precision * most
            clear &= settled(similarity, k, error) & well_weighted(similarity, k, most, error)
        if call.options["normalize"]:  # of sums that cancel, directions are anything
            sums = ops.cmfp(vis.double(), ir.double(), k, normalize=False)[index].norm(dim=1)
            clear &= (sums == 0) | (sums > 0.05)
        in_budget(result[index][clear], plain[index][clear], truth[index][clear], 640 * precision)


def judge_knn_intersection(call: Call, result: Tensor, plain: Tensor, truth: Tensor) -> None:
    views, bank, k = call.tame
    assert result.dtype == torch.int64 and result.shape == truth.shape
    rows = torch.ones(len(result), dtype=torch.bool)
    if not call.exact:
        rows = settled(views.double() @ bank.double().T, k, similarity_error(views, bank)).all(0)
    assert torch.equal(result[rows], truth[rows])


def judge_jaccard(call: Call, result: Tensor, plain: Tensor, truth: Tensor) -> None:
    features, k1, k2 = call.tame
    matrix = stored(result, otherwise=1.0)
    assert torch.equal(matrix, matrix.T) and not matrix.diagonal().any()
    assert ((result.values() >= 0) & (result.values() < 1)).all()
    if not call.exact:
        rows = features.double()
        similarity = rows @ rows.T - rows.square().sum(1) / 2
        band = similarity_error(features, features)
        if not all(settled(similarity, k, band).all() for k in (k1, k2, min(k1, round(k1 / 2) + 1))):
            return
    # A weight is the exponential of a squared distance, which is of the size of those of the rows.
    floor = 16 * epsilon(features) * (1 + 4 * longest(features) ** 2)
    in_budget(matrix, *(stored(other, otherwise=1.0) for other in (plain, truth)), floor)


def judge_dbscan(call: Call, result: Tensor, plain: Tensor, truth: Tensor) -> None:
    assert torch.equal(result, plain)  # distances and eps are compared in the type given


def judge_sets(call: Call, result: Tensor, plain: Tensor, truth: Tensor) -> None:
    assert torch.equal(result, plain)


def judge_rank(call: Call, result: ops.Ranking, plain: ops.Ranking, truth: ops.Ranking) -> None:
    for ours, exact in zip(tensors(result), tensors(truth), strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=1e-12)


def labels_deserved(labels: Tensor, scores: Tensor, floor: float) -> None:
    """Every label has the largest score of its row, or one as large within `floor`."""
    assert labels.dtype == torch.int64 and labels.shape == scores.shape[:-1]
    if scores.shape[-1] == 0:
        assert (labels == -1).all()
    elif labels.numel():
        best = scores.amax(-1)
        assert (scores.gather(-1, labels.unsqueeze(-1)).squeeze(-1) >= best - floor).all()


def judge_sinkhorn(call: Call, result: ops.Sinkhorn, plain: ops.Sinkhorn, truth: ops.Sinkhorn) -> None:
    cost, reg = call.tame
    scaled = cost.double() / reg
    size = 1 + max(largest(value) for value in (scaled, truth.log_u, truth.log_v))
    floor = 32 * epsilon(cost) * size
    stopped = (result.error == 0) | (truth.error == 0)  # at a tolerance of 0, where rounding decides when that is met
    assert torch.equal(result.iterations[~stopped], truth.iterations[~stopped])
    for name in ("log_u", "log_v"):
        in_budget(*(getattr(solution, name) for solution in (result, plain, truth)), floor)
    in_budget(result.error, plain.error, truth.error, floor * max(1.0, largest(truth.error)))
    in_budget(result.plan(), plain.plan(), truth.plan(), floor)
    in_budget(result.confidence(), plain.confidence(), truth.confidence(), floor)
    labels_deserved(result.labels(), truth.log_v.unsqueeze(-2) - scaled, 2 * floor)


def judge_ot_assign(call: Call, result: Tensor, plain: Tensor, truth: Tensor) -> None:
    features, prototypes, reg = call.tame
    cost = (features.double()[:, None] - prototypes.double()[None]).square().sum(-1)
    exact = ops.sinkhorn(cost, reg, **doubled_options(call.options))
    size = longest(features) ** 2 + 4 * longest(prototypes) ** 2
    floor = 32 * epsilon(features, prototypes) * (1 + size / reg + largest(exact.log_v))
    labels_deserved(result, exact.log_v.unsqueeze(-2) - cost / reg, 2 * floor)


JUDGES: dict[str, Callable[[Call, Any, Any, Any], None]] = {
    "affinity": judge_affinity,
    "cluster_contrast": judge_contrast,
    "cmfp": judge_cmfp,
    "dbscan": judge_dbscan,
    "jaccard": judge_jaccard,
    "knn_intersection": judge_knn_intersection,
    "memory_update_": judge_memory_update_,
    "neighbor_contrast": judge_contrast,
    "ot_assign": judge_ot_assign,
    "propagate": judge_sum,
    "rank": judge_rank,
    "segment_mean": judge_sum,
    "set_intersection": judge_sets,
    "set_union": judge_sets,
    "sinkhorn": judge_sinkhorn,
    "soft_contrast": judge_contrast,
    "topk": judge_topk,
}
