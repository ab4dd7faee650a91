from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated import cuda_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.ops import backends, memory_update_, use_backend

BACKENDS = ("cpu", "reference")


def one_after_the_other(bank: Tensor, features: Tensor, labels: Tensor, momentum: float | Tensor, normalize: bool):
    """The definition, row by row."""
    bank = bank.clone()
    for i, label in enumerate(labels.tolist()):
        if label != -1:
            weight = momentum[i] if isinstance(momentum, Tensor) else momentum
            row = weight * bank[label] + (1 - weight) * features[i]
            bank[label] = row / row.norm() if normalize and row.norm() > 0 else row
    return bank


def problem(
    bank_rows: int, batch: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(bank_rows, width, generator=generator).to(dtype),
        torch.randn(batch, width, generator=generator).to(dtype),
        torch.randint(-1, bank_rows, (batch,), generator=generator),
        torch.rand(batch, generator=generator).to(dtype),
    )


@pytest.fixture(params=[*BACKENDS, "emulator"])
def backend(request):
    with cuda_backend() if request.param == "emulator" else use_backend(request.param):
        yield request.param


def test_the_native_back_end_is_built():
    assert backends("memory_update_") == {
        "cuda": "no CUDA device",
        "triton": "memory_update_ has no triton back end",
        "cpu": None,
        "reference": None,
    }


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    bank_rows=st.integers(0, 6),
    batch=st.integers(0, 12),
    width=st.sampled_from([0, 1, 15, 16, 17, 50]),
    normalize=st.booleans(),
    per_row=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_follows_the_batch_order_of_every_label(name, bank_rows, batch, width, normalize, per_row, seed):
    bank, features, labels, weights = problem(bank_rows, batch, width, seed)
    momentum = weights if per_row else 0.1
    expected = one_after_the_other(bank, features, labels, momentum, normalize)
    with use_backend(name):
        assert memory_update_(bank, features, labels, momentum, normalize=normalize) is bank
    torch.testing.assert_close(bank, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("width", [1, 131, 256])
def test_native_stays_in_the_error_budget(isa, width, dtype, normalize):
    bank, features, labels, momentum = problem(7, 200, width, dtype=dtype)
    exact = one_after_the_other(bank.double(), features.double(), labels, momentum.double(), normalize)
    with use_backend("reference"):
        plain = memory_update_(bank.clone(), features, labels, momentum, normalize=normalize)
    with use_backend("cpu"):
        native = memory_update_(bank.clone(), features, labels, momentum, normalize=normalize)
    assert native.dtype == dtype
    budget = 2 * (plain.double() - exact).abs().max() + 1e-6
    assert (native.double() - exact).abs().max() <= budget


@pytest.mark.parametrize("searched", [0, 4096])
@pytest.mark.parametrize("width", [2047, 2049, 5000])
def test_wide_rows_and_sorted_batches_on_the_emulator(width, searched, monkeypatch):
    """Columns beyond a block's registers, and a batch whose features are found by search or by sorting them."""
    monkeypatch.setattr(importlib.import_module("engine.ops.memory_update_"), "SEARCHED", searched)
    bank, features, labels, momentum = problem(7, 300, width, dtype=torch.float32)
    expected = one_after_the_other(bank.double(), features.double(), labels, momentum.double(), True)
    banks = bank.clone(), bank.clone()
    for one, descending in zip(banks, (False, True), strict=True):
        with cuda_backend(descending=descending):
            memory_update_(one, features, labels, momentum)
    torch.testing.assert_close(banks[0], expected.float())
    assert torch.equal(*banks)


def test_gives_the_bank_of_the_release(backend):
    data = np.load(Path(__file__).parents[1] / "data" / "e2_memory_cross_true.npz")
    order = torch.from_numpy(data["perm"])
    features = torch.nn.functional.normalize(torch.from_numpy(data["x"]))[order]
    labels = torch.from_numpy(data["labels"])[order]
    bank = memory_update_(torch.from_numpy(data["memory_before"]), features, labels, float(data["momentum"]))
    torch.testing.assert_close(bank, torch.from_numpy(data["memory_after"]), rtol=1e-5, atol=1e-6)


def test_thread_count_does_not_show():
    bank, features, labels, momentum = problem(31, 1500, 2048, dtype=torch.float32)  # enough work for three threads
    thread_count = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(memory_update_(bank.clone(), features, labels, momentum))
    finally:
        torch.set_num_threads(thread_count)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("feature_dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("per_row", [True, False])
def test_types_of_bank_and_features_may_differ(backend, dtype, feature_dtype, per_row):
    bank, features, labels, weights = problem(9, 12, 20)
    bank, features, weights = bank.to(dtype), features.to(feature_dtype), weights.bfloat16()
    momentum = weights if per_row else 0.25
    exact_momentum = weights.double() if per_row else 0.25
    expected = one_after_the_other(bank.double(), features.double(), labels, exact_momentum, True).to(dtype)
    assert memory_update_(bank, features, labels, momentum) is bank
    torch.testing.assert_close(bank, expected)


class LargestMade(TorchDispatchMode):
    """Entries of the largest tensor that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        if isinstance(made, Tensor) and not any(made is argument for argument in arguments):
            self.entries = max(self.entries, made.numel())
        return made


def test_of_a_half_bank_only_the_rows_named_are_converted(backend):
    bank, features, _, _ = problem(1000, 3, 16, dtype=torch.bfloat16)
    bank[7] = torch.nan
    before = bank.clone()
    with LargestMade() as mode:
        memory_update_(bank, features, torch.tensor([998, -1, 3]), 0.1)
    assert mode.entries <= 3 * 16
    changed = (bank.view(torch.int16) != before.view(torch.int16)).any(1)
    assert changed.nonzero().flatten().tolist() == [3, 998]


def test_nan_stays_where_it_is_put_in(backend):
    bank = torch.eye(3)
    features = torch.tensor([[0.0, torch.nan, 0.0], [torch.inf, 1.0, 1.0]])
    memory_update_(bank, features, torch.tensor([0, 1]), 0.5)
    assert bank[0].isnan().tolist() == [False, True, False]
    assert bank[1].isnan().tolist() == [True, False, False]
    assert bank[2].tolist() == [0, 0, 1]


def test_updates_a_strided_bank_in_place(backend):
    bank, features, labels, _ = problem(5, 9, 20)
    expected = one_after_the_other(bank, features, labels, 0.3, True)
    storage = torch.zeros(20, 10, dtype=torch.float64)
    view = storage[:, ::2].T
    view.copy_(bank)
    result = memory_update_(view, features.T.contiguous().T, labels.repeat_interleave(2)[::2], 0.3)
    assert result is view
    torch.testing.assert_close(view, expected)
    assert not storage[:, 1::2].any()


def batch_of_problems(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of leading dimensions [3, 2], with labels beyond each bank."""
    parts = zip(*(problem(5, 9, 20, seed, dtype) for seed in range(6)), strict=True)
    bank, features, labels, momentum = (torch.stack(part).unflatten(0, (3, 2)) for part in parts)
    labels[0, 0, :4] = torch.tensor([5, 6, -(2**63), 2**63 - 1])
    return bank, features, labels, momentum


LAYOUTS = {
    "one after the other": lambda bank: bank.clone(),
    "transposed": lambda bank: bank.transpose(0, 1).contiguous().transpose(0, 1),
    "apart": lambda bank: torch.stack([bank, torch.zeros_like(bank)], dim=2)[:, :, 0],
    "row by row": lambda bank: bank.movedim(2, 0).contiguous().movedim(0, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_problems_are_updated_as_each_is_alone(backend, layout, dtype):
    bank, features, labels, momentum = batch_of_problems(dtype)
    for label, weight in ((labels, momentum), (labels[0, 0], 0.3), (labels, momentum[0, 0])):
        expected, together = bank.clone(), LAYOUTS[layout](bank)
        for place in ((i, j) for i in range(3) for j in range(2)):
            own = label if label.dim() == 1 else label[place]
            each = weight[place] if isinstance(weight, Tensor) and weight.dim() > 1 else weight
            memory_update_(expected[place], features[place], own, each)
        assert memory_update_(together, features, label, weight) is together
        assert torch.equal(together, expected)


def test_no_problem_is_no_update(backend):
    bank, features, labels, _ = batch_of_problems()
    for none in (slice(0), (slice(None), slice(0))):
        assert memory_update_(bank[none], features[none], labels[none], 0.1).numel() == 0
        assert memory_update_(bank[none].half(), features[none], labels[none], 0.1).numel() == 0


def test_rows_of_the_bank_itself_are_taken_as_they_were(backend):
    bank, _, _, _ = problem(4, 4, 6)
    labels = torch.tensor([1, 2, 3, 0])
    expected = one_after_the_other(bank, bank.clone(), labels, 0.5, True)
    torch.testing.assert_close(memory_update_(bank, bank, labels, 0.5), expected)


def test_zero_rows_stay_zero_and_untouched_rows_keep_their_bits(backend):
    bank = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert memory_update_(bank, torch.zeros(1, 2), torch.tensor([0]), 0.1).tolist() == [[0, 0], [3, 4]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_labels_out_of_range_are_skipped_and_reported_in_debug_mode(backend, dtype, monkeypatch):
    bank, features, _, _ = problem(4, 3, 6, dtype=dtype)
    before = bank.clone()
    labels = torch.tensor([4, -(2**63), 2**63 - 1])
    assert torch.equal(memory_update_(bank, features, labels, 0.1), before)
    monkeypatch.setenv("ENGINE_DEBUG", "1")
    with pytest.raises(ValueError, match=r"labels must be in \[-1, 4\)"):
        memory_update_(bank, features, labels, 0.1)


def test_tells_autograd_that_the_bank_changed(backend):
    bank, features, labels, _ = problem(4, 3, 6)
    leaf = torch.ones(3, 6, dtype=torch.float64, requires_grad=True)
    product = leaf @ bank.T
    memory_update_(bank, features, labels, 0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_carries_no_gradient(backend, dtype):
    bank, features, labels, momentum = problem(4, 3, 6, dtype=dtype)
    memory_update_(bank, features.requires_grad_(), labels, momentum.requires_grad_())
    assert not bank.requires_grad


def test_refuses_bad_arguments():
    bank, features, labels, momentum = problem(4, 3, 6)
    with pytest.raises(ValueError, match="momentum must be a number in \\[0, 1\\] or a tensor \\[B\\], got float 1.5"):
        memory_update_(bank, features, labels, 1.5)
    with pytest.raises(ValueError, match="momentum must be of size 3 in dimension 0"):
        memory_update_(bank, features, labels, momentum[1:])
    with pytest.raises(
        ValueError, match=r"features must be of leading dimensions \[2\] like bank, got float64 \[3, 6\]"
    ):
        memory_update_(torch.stack([bank, bank]), features, labels, 0.1)
    for shared in (bank.expand(2, -1, -1), bank[:1].expand(4, -1)):
        with pytest.raises(ValueError, match="bank must be a tensor whose entries have memory of their own"):
            memory_update_(shared, features.expand(*shared.shape[:-2], -1, -1), labels, 0.1)
    with pytest.raises(ValueError, match=r"labels must be of leading dimensions \[\] like features"):
        memory_update_(bank, features, labels.expand(2, -1), 0.1)
    with pytest.raises(ValueError, match="labels must be of dtype int64"):
        memory_update_(bank, features, labels.int(), 0.1)
    with pytest.raises(ValueError, match="features must be of size 6 in dimension 1"):
        memory_update_(bank, features[:, 1:], labels, 0.1)
    with pytest.raises(ValueError, match="bank must be a tensor that requires no gradient"):
        memory_update_(bank.requires_grad_(), features, labels, 0.1)


WITHOUT_NATIVE_CODE = """
import sys, warnings
sys.modules["engine._C"] = None  # as where no compiler was found
import torch
from engine import ops
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        bank = ops.memory_update_(torch.zeros(1, 2), torch.tensor([[3.0, 4.0]]), torch.tensor([0]), 0.0)
assert torch.allclose(bank, torch.tensor([[0.6, 0.8]])), bank
(warning,) = caught
assert "engine.ops.memory_update_: back end 'cpu' cannot run" in str(warning.message)
assert "install a C++17 compiler, then run: pip install -e ." in str(warning.message)
try:
    with ops.use_backend("cpu"):
        ops.memory_update_(bank, bank, torch.tensor([0]), 0.0)
except RuntimeError as error:
    assert "was asked for but cannot run: engine._C is not built" in str(error)
else:
    raise AssertionError("a back end that cannot run ran")
"""


def test_runs_without_the_native_module_and_says_so_once():
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", WITHOUT_NATIVE_CODE], check=True, cwd=root)
