"""The argument `precision`: which operators have it, and what it makes of torch's own settings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch

from engine import ops
from engine.ops._precision import products

ROWS = torch.nn.functional.normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)))
CALLS = {
    "affinity": (ROWS, ROWS, 3),
    "cluster_contrast": (ROWS, ROWS, torch.arange(12), 0.1),
    "cmfp": (ROWS, ROWS, 3),
    "jaccard": (ROWS, 4, 2),
    "knn_intersection": (ROWS[None], ROWS, 3),
    "neighbor_contrast": (ROWS, ROWS, torch.arange(12)[:, None], 0.1),
    "ot_assign": (ROWS, ROWS, 0.1),
    "soft_contrast": (ROWS, ROWS, torch.eye(12), 0.1),
    "topk": (ROWS, ROWS, 3),
}


@pytest.fixture(params=[torch.backends.cuda.matmul, torch.backends.mkldnn.matmul], ids=["cuda", "cpu"])
def setting(request: pytest.FixtureRequest) -> Iterator[object]:
    """Where torch keeps the precision of products on one kind of device; it is put back after the test."""
    before = request.param.fp32_precision
    yield request.param
    request.param.fp32_precision = before


def test_operators_that_multiply_matrices_take_it_by_keyword():
    with_precision = set()
    for name in set(ops.__all__) - {"Ranking", "Sinkhorn", "backends", "use_backend"}:
        parameter = inspect.signature(getattr(ops, name)).parameters.get("precision")
        if parameter is not None:
            assert parameter.kind == parameter.KEYWORD_ONLY and parameter.default == "ieee"
            with_precision.add(name)
    assert with_precision == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_only_two_are_there(name):
    with pytest.raises(ValueError, match="precision must be one of 'ieee', 'fast', got str 'tf32'"):
        getattr(ops, name)(*CALLS[name], precision="tf32")


@pytest.mark.parametrize("name", CALLS)
def test_is_one_on_the_cpu(name, backend):
    operator = getattr(ops, name)
    if ops.backends(name)[backend] is not None:
        pytest.skip(f"{name} has no {backend} back end")
    exact, fast = (operator(*CALLS[name], precision=precision) for precision in ("ieee", "fast"))
    if not isinstance(exact, tuple):
        exact, fast = (exact,), (fast,)
    for one, other in zip(exact, fast, strict=True):
        if one.layout == torch.sparse_csr:
            assert torch.equal(one.col_indices(), other.col_indices())
            one, other = one.values(), other.values()
        assert torch.equal(one, other)


@pytest.mark.parametrize("outside", ["none", "ieee", "tf32"])
def test_overrules_the_setting_of_torch_and_gives_it_back(setting, outside):
    setting.fp32_precision = outside
    before = setting.fp32_precision
    device = torch.device("cuda" if setting is torch.backends.cuda.matmul else "cpu")
    for precision, inside in (("ieee", "ieee"), ("fast", "tf32" if device.type == "cuda" else "ieee")):
        with products(device, precision):
            assert setting.fp32_precision == inside
        assert setting.fp32_precision == before
    with pytest.raises(KeyError), products(device, "fast"):
        raise KeyError
    assert setting.fp32_precision == before
