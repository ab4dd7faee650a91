"""Every operator on CUDA tensors, on every back end that it has there. Skipped where there is no GPU.

`test_properties.py` does the same with drawn arguments.
"""

from __future__ import annotations

import importlib
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from fixed_calls import BATCHES, CALLS, integers
from graph_checks import unit_rows
from operator_results import (
    AUTOMATIC,
    GRADIENTS,
    copied,
    doubled,
    on_backend,
    on_cpu,
    outcome,
    placed,
    same_bits,
    tensors,
)
from torch import Tensor
from waiting import no_waiting

from engine import ops
from engine.ops import use_backend
from engine.ops._backend import ORDER, exists

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
FORMS = [(name, backend) for name in sorted(CALLS) for backend in ORDER["cuda"] if exists(name, backend)]
FORMS += [("ot_assign", AUTOMATIC)]
# affinity and jaccard store as much as they find; rank gives numbers; sinkhorn in Triton looks whether it may stop.
WAITING = {("affinity", "cuda"), ("jaccard", "cuda"), ("rank", "cuda"), ("sinkhorn", "triton")}
LOSSES = {(name, backend) for name, backend in FORMS if name.endswith("contrast")}
NEVER_WAITING = [form for form in FORMS if form in LOSSES or (form[1] != "reference" and form not in WAITING)]
TEMPERATURE = 0.05


def arguments_of(name: str) -> tuple[Any, ...]:
    return placed(copied(CALLS[name][0]), "cuda")


def run(name: str, backend: str, arguments: tuple[Any, ...] | None = None, **options: Any) -> Any:
    """On one back end, or nowhere: what exists must run on a machine that has a GPU."""
    with on_backend(name, backend):
        return outcome(name, getattr(ops, name), arguments or arguments_of(name), CALLS[name][1] | options)


@pytest.mark.parametrize(("name", "backend"), FORMS)
def test_agrees_with_the_reference_in_float64(name, backend):
    reference = importlib.import_module(f"engine.ops.{name}").reference
    arguments, options = CALLS[name]
    with use_backend("reference"):
        truth = outcome(name, reference, doubled(copied(arguments)), options)
        exact = tensors(truth)
    for found, expected in zip(tensors(on_cpu(run(name, backend))), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize(("name", "backend"), [form for form in FORMS if form[0] in BATCHES])
def test_takes_a_batch_of_problems(name, backend):
    with use_backend("reference"):
        truth = outcome(name, getattr(ops, name), doubled(copied(BATCHES[name])), CALLS[name][1])
    found = run(name, backend, placed(copied(BATCHES[name]), "cuda"))
    for value, exact in zip(tensors(on_cpu(found)), tensors(truth), strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-5, check_dtype=False)
    arguments = placed(copied(BATCHES[name]), "cuda")
    with no_waiting() if (name, backend) in NEVER_WAITING else nullcontext():
        again = run(name, backend, arguments)
    assert same_bits(again, found)


@pytest.mark.parametrize(("name", "backend"), FORMS)
def test_gives_the_same_bits_every_time(name, backend):
    first = run(name, backend)
    assert all(same_bits(run(name, backend), first) for _ in range(3))


@pytest.mark.parametrize(("name", "backend"), FORMS)
def test_runs_on_the_current_stream(name, backend):
    """The arguments become what they are only after a while, on a stream that no other waits for."""
    expected = run(name, backend)
    late = arguments_of(name)
    filled = [values for value in late if isinstance(value, Tensor) for values in parts(value)]
    kept = [values.clone() for values in filled]
    for values in filled:
        values.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        for values, content in zip(filled, kept, strict=True):
            values.copy_(content)
        found = run(name, backend, late)
        torch.cuda.current_stream().synchronize()
    assert same_bits(found, expected)


def parts(value: Tensor) -> list[Tensor]:
    """What can be filled late: of a sparse matrix its values alone."""
    return [value.values()] if value.layout == torch.sparse_csr else [value]


@pytest.mark.parametrize(("name", "backend"), NEVER_WAITING)
def test_does_not_wait_for_the_device(name, backend):
    run(name, backend)  # the first call may compile
    arguments = arguments_of(name)
    with no_waiting():
        run(name, backend, arguments)


@pytest.mark.parametrize(
    "name", ["cmfp", "dbscan", "knn_intersection", "segment_mean", "set_intersection", "set_union", "sinkhorn", "topk"]
)
def test_is_captured_in_a_graph_and_replayed(name):
    expected = run(name, "cuda")
    arguments = arguments_of(name)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(name, "cuda", arguments)
    graph.replay()
    assert same_bits(captured, expected)


@pytest.mark.parametrize("name", ["affinity", "rank"])
def test_waits_for_the_device_once(name):
    run(name, "cuda")  # the first call may compile
    arguments = arguments_of(name)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run(name, "cuda", arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([warning for warning in said if "synchronizing" in str(warning.message)]) == 1


@pytest.mark.skipif(not exists("memory_update_", "cuda"), reason="memory_update_ has no cuda back end")
def test_a_step_is_captured_in_a_graph_and_replayed_on_new_features():
    features, bank = (rows.cuda() for rows in (unit_rows(64, 128, 1), unit_rows(300, 128, 2)))
    labels = integers(0, 300, 64).cuda()

    def step(features: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
        source = features.detach().requires_grad_()
        loss = ops.cluster_contrast(source, bank, labels, TEMPERATURE)
        (gradient,) = torch.autograd.grad(loss, source)
        ops.memory_update_(bank, features, labels, 0.1)
        return loss.detach(), gradient

    expected_bank = bank.clone()
    step(features, bank.clone())
    given, kept = features.clone(), bank.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(given, kept.clone())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(given, kept)
    kept.copy_(bank)
    for seed in (5, 6):
        given.copy_(unit_rows(64, 128, seed))
        graph.replay()
        assert same_bits(captured, step(given, expected_bank))
        assert same_bits(kept, expected_bank)


@pytest.mark.parametrize(
    ("name", "backend"), [(name, backend) for name, backend in FORMS if name in ("cmfp", "topk", *GRADIENTS)]
)
def test_ieee_is_no_tf32_whatever_torch_is_set_to(name, backend):
    """Values that TF32 would miss by a hundred times as much."""
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "tf32"
    try:
        found = tensors(on_cpu(run(name, backend)))
    finally:
        setting.fp32_precision = before
    reference = importlib.import_module(f"engine.ops.{name}").reference
    arguments, options = CALLS[name]
    exact = tensors(outcome(name, reference, doubled(copied(arguments)), options))
    for value, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(value, truth, rtol=3e-6, atol=3e-6 * float(truth.abs().max()), check_dtype=False)


@pytest.mark.parametrize(
    ("name", "backend"), [(name, backend) for name, backend in FORMS if name in ("neighbor_contrast", "topk")]
)
def test_a_bank_of_more_than_two_billion_entries(name, backend):
    """What lies beyond 2^31 is found: the last rows are the nearest ones."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free memory")
    width, near = 2048, 5
    bank = torch.zeros((1 << 31) // width + 100, width, dtype=torch.bfloat16, device="cuda")
    bank[-near:, :near] = torch.eye(near, device="cuda", dtype=torch.bfloat16)
    features = torch.zeros(2, width, dtype=torch.bfloat16, device="cuda")
    features[:, :near] = torch.tensor([5.0, 4, 3, 2, 1], device="cuda", dtype=torch.bfloat16)
    last = torch.arange(len(bank) - near, len(bank), device="cuda").expand(2, -1).contiguous()
    if name == "topk":
        values, indices = run(name, backend, (features, bank, near))
        assert torch.equal(indices, last) and values[0].tolist() == [5, 4, 3, 2, 1]
        return
    loss, _ = run(name, backend, (features, bank, last, 1.0))
    scores = torch.arange(5, 0, -1, dtype=torch.float64)
    everyone = torch.cat([scores, scores.new_zeros(len(bank) - near)])
    expected = everyone.logsumexp(0) - scores.logsumexp(0)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=0)
