from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from fixed_calls import CALLS
from operator_results import copied, same_bits

from engine import ops

ROWS = torch.eye(3)


def test_an_unknown_back_end_or_operator_is_named():
    with pytest.raises(ValueError, match="backend must be one of cuda, triton, cpu, reference, got 'gpu'"):
        ops.use_backend("gpu").__enter__()
    with pytest.raises(ValueError, match="op must be an operator of engine.ops, got 'top'"):
        ops.backends("top")


def numbers_of_numpy(values):
    return [np.int64(value) if type(value) is int else value for value in values]


@pytest.mark.parametrize("name", CALLS)
def test_integers_may_be_those_of_numpy(name):
    """As the counts that are made of arrays of labels."""
    arguments, options = CALLS[name]
    given = dict(zip(options, numbers_of_numpy(options.values()), strict=True))
    found = getattr(ops, name)(*numbers_of_numpy(copied(arguments)), **given)
    assert same_bits(found, getattr(ops, name)(*copied(arguments), **options))


def test_a_back_end_that_was_asked_for_runs_or_says_why_not(monkeypatch):
    reason = "back end 'triton' of engine.ops.topk was asked for but cannot run: topk has no triton back end"
    with pytest.raises(RuntimeError, match=reason), ops.use_backend("triton"):
        ops.topk(ROWS, ROWS, 1)
    monkeypatch.setenv("ENGINE_BACKEND", "triton")
    with pytest.raises(RuntimeError, match=reason):
        ops.topk(ROWS, ROWS, 1)
    with ops.use_backend("reference"):  # the block wins over the environment
        ops.topk(ROWS, ROWS, 1)


def test_a_loss_is_asked_for_by_back_end_too():
    with pytest.raises(RuntimeError, match="cluster_contrast has no cuda back end"), ops.use_backend("cuda"):
        ops.cluster_contrast(ROWS, ROWS, torch.arange(3), 0.1)


def test_a_block_ends_with_the_back_end_of_before():
    with ops.use_backend("triton"):
        with ops.use_backend("reference"):
            ops.topk(ROWS, ROWS, 1)
        with pytest.raises(RuntimeError, match="triton"):
            ops.topk(ROWS, ROWS, 1)
    ops.topk(ROWS, ROWS, 1)


def test_a_kernel_file_is_found_by_the_name_of_its_operator(monkeypatch, tmp_path):
    import engine.kernels
    from engine.ops import _backend

    (tmp_path / "topk.py").write_text("def topk(queries, bank, k, **options):\n    return 'from the kernel'\n")
    monkeypatch.setattr(engine.kernels, "__path__", [str(tmp_path)])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(_backend.ORDER, "cpu", ("triton", "reference"))
    caches = (_backend.exists, _backend._find)
    try:
        for cache in caches:
            cache.cache_clear()
        assert ops.backends("topk")["triton"] is None
        assert ops.topk(ROWS, ROWS, 1) == "from the kernel"
    finally:
        sys.modules.pop("engine.kernels.topk", None)
        for cache in caches:
            cache.cache_clear()
