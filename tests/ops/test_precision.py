"""The argument `precision`: which operators have it, and what it makes of torch's own settings."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
from fixed_calls import CALLS
from operator_results import same_bits

from engine import ops
from engine.ops._precision import products

NAMES = {
    "affinity",
    "cluster_contrast",
    "cmfp",
    "jaccard",
    "knn_intersection",
    "neighbor_contrast",
    "ot_assign",
    "soft_contrast",
    "topk",
}


@pytest.fixture(params=[torch.backends.cuda.matmul, torch.backends.mkldnn.matmul], ids=["cuda", "cpu"])
def setting(request: pytest.FixtureRequest) -> Iterator[object]:
    """Where torch keeps the precision of products on one kind of device; it is put back after the test."""
    before = request.param.fp32_precision
    yield request.param
    request.param.fp32_precision = before


def test_operators_that_multiply_matrices_take_it_by_keyword():
    with_precision = set()
    for name in CALLS:
        parameter = inspect.signature(getattr(ops, name)).parameters.get("precision")
        if parameter is not None:
            assert parameter.kind == parameter.KEYWORD_ONLY and parameter.default == "ieee"
            with_precision.add(name)
    assert with_precision == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_only_two_are_there(name):
    with pytest.raises(ValueError, match="precision must be one of 'ieee', 'fast', got str 'tf32'"):
        getattr(ops, name)(*CALLS[name][0], precision="tf32")


@pytest.mark.parametrize("name", sorted(NAMES))
def test_is_one_on_the_cpu(name, backend):
    (arguments, options), operator = CALLS[name], getattr(ops, name)
    if ops.backends(name)[backend] is not None:
        pytest.skip(f"{name} has no {backend} back end")
    exact, fast = (operator(*arguments, **options, precision=precision) for precision in ("ieee", "fast"))
    assert same_bits(exact, fast)


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
