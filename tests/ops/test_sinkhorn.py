from __future__ import annotations

import pytest
import torch
from graph_checks import fixture, same_bits_for_any_thread_count
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine import ops
from engine.ops.sinkhorn import reference

BACKENDS = ("cpu", "reference")


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def random_cost(*shape, seed=0, dtype=torch.float64):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_weights(count, seed):
    weights = random_cost(count, seed=seed) + 0.1
    return weights / weights.sum()


def scaling_loop(cost, reg, a, b, power, iterations):
    """u = a / (K v), v = (b / (K^T u))^power, in the linear domain."""
    kernel = (-cost / reg).exp()
    v = torch.ones_like(b)
    for _ in range(iterations):
        u = a / (kernel @ v)
        v = (b / (kernel.T @ u)) ** power
    return (a / (kernel @ v)).unsqueeze(1) * kernel * v


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (7, 4), (40, 13)])
@pytest.mark.parametrize("relax", [None, 0.3])
def test_converges_to_the_plan_of_the_scaling_loop(shape, relax):
    cost, reg = random_cost(*shape, seed=1), 0.2
    a, b = random_weights(shape[0], 2), random_weights(shape[1], 3)
    result = ops.sinkhorn(cost, reg, a=a, b=b, relax=relax, max_iter=5000, tol=1e-14)
    power = 1.0 if relax is None else relax / (relax + reg)
    expected = scaling_loop(cost, reg, a, b, power, 3000)
    torch.testing.assert_close(result.plan(), expected, rtol=1e-9, atol=0)
    by_potentials = (result.log_u[:, None] + result.log_v - cost / reg).exp()
    torch.testing.assert_close(by_potentials, expected, rtol=1e-9, atol=0)
    assert torch.equal(result.labels(), expected.argmax(1))
    torch.testing.assert_close(result.confidence(), (expected / expected.sum(1, keepdim=True)).amax(1))


def test_reproduces_the_released_labels_and_the_converged_plan():
    arrays = fixture("b1_sinkhorn_lambda5")
    reg = 1 / int(arrays["lambda_sk"])
    stopped = ops.sinkhorn(arrays["cost"], reg)
    assert torch.equal(stopped.labels(), arrays["labels"])
    converged = ops.sinkhorn(arrays["cost"].double(), reg, tol=1e-12)
    assert torch.equal(converged.labels(), arrays["labels_converged"])
    torch.testing.assert_close(converged.plan(), arrays["Q_converged_ref64"], rtol=0, atol=1e-12)
    in_float32 = ops.sinkhorn(arrays["cost"], reg, tol=1e-6)
    torch.testing.assert_close(in_float32.plan().double(), arrays["Q_converged_ref64"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("tol", [1e-2, 1e-4, 1e-8])
def test_error_is_the_column_violation_of_the_plan_returned(tol):
    cost, a, b = random_cost(30, 8, seed=4), random_weights(30, 5), random_weights(8, 6)
    result = ops.sinkhorn(cost, 0.05, a=a, b=b, tol=tol)
    plan = result.plan()
    torch.testing.assert_close(result.error, (plan.sum(0) - b).abs().sum(), rtol=1e-6, atol=1e-15)
    torch.testing.assert_close(plan.sum(1), a, rtol=1e-13, atol=0)
    assert float(result.error) <= tol
    before = ops.sinkhorn(cost, 0.05, a=a, b=b, tol=tol, max_iter=int(result.iterations) - 1)
    assert float(before.error) > tol  # it stopped at the first iteration that met tol


def test_relaxed_error_is_the_change_the_next_column_step_would_make():
    cost, reg, relax = random_cost(20, 6, seed=7), 0.1, 0.5
    one, two = (ops.sinkhorn(cost, reg, relax=relax, tol=0, max_iter=count) for count in (4, 5))
    torch.testing.assert_close(one.error, (two.log_v - one.log_v).abs().max())


def test_a_strict_relaxation_is_the_column_constraint_and_a_loose_one_is_none():
    cost = random_cost(25, 5, seed=8)
    balanced = ops.sinkhorn(cost, 0.1, tol=1e-12).plan()
    torch.testing.assert_close(ops.sinkhorn(cost, 0.1, relax=1e7, tol=1e-12).plan(), balanced, rtol=1e-5, atol=0)
    free = (-cost / 0.1).softmax(1) / 25
    torch.testing.assert_close(ops.sinkhorn(cost, 0.1, relax=1e-7, tol=1e-12).plan(), free, rtol=1e-5, atol=0)


def test_a_batch_and_a_list_are_solved_like_single_problems():
    costs = torch.stack([random_cost(12, 5, seed=seed) * scale for seed, scale in ((0, 0.1), (1, 3.0), (2, 1.0))])
    single = [ops.sinkhorn(cost, 0.1) for cost in costs]
    assert len({int(result.iterations) for result in single}) > 1
    batch = ops.sinkhorn(costs.reshape(1, 3, 12, 5), 0.1)
    for index, result in enumerate(single):
        assert batch.iterations[0, index] == result.iterations
        for name in ("log_u", "log_v", "error"):
            torch.testing.assert_close(getattr(batch, name)[0, index], getattr(result, name), rtol=1e-13, atol=1e-15)
        assert torch.equal(batch.labels()[0, index], result.labels())
    ragged = [costs[0], costs[1, :7, :3], costs[2, :, :1]]
    weights = [None, random_weights(7, 1), None]
    together = ops.sinkhorn(
        ragged, 0.1, a=[weights[1].new_full((12,), 1 / 12), weights[1], weights[1].new_ones(12) / 12]
    )
    for index, cost in enumerate(ragged):
        alone = ops.sinkhorn(cost, 0.1, a=weights[index])
        torch.testing.assert_close(together.plan()[index], alone.plan())
        assert torch.equal(together.labels()[index], alone.labels())
        assert together.iterations[index] == alone.iterations


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
def test_looking_at_the_error_rarely_changes_nothing(backend, monkeypatch):
    costs = torch.stack([random_cost(12, 5, seed=seed) * scale for seed, scale in ((0, 0.1), (1, 3.0))])
    expected = ops.sinkhorn(costs, 0.1)
    monkeypatch.setitem(reference.__globals__, "_look_every", lambda device: 64)
    result = ops.sinkhorn(costs, 0.1)
    for name in ("log_u", "log_v", "iterations", "error"):
        assert torch.equal(getattr(result, name), getattr(expected, name))


@pytest.mark.parametrize("name", BACKENDS)
@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(0, 5),
    scale=st.sampled_from([0.0, 1e-30, 1.0, 1e4, 1e30]),
    reg=st.sampled_from([1e-3, 1.0, 1e6]),
    relax=st.sampled_from([None, 1e-3, 10.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    spoil=st.sampled_from(["nothing", "a column without weight", "a row without weight", "a forbidden row and column"]),
    seed=st.integers(0, 1000),
)
def test_never_nan(name, rows, columns, scale, reg, relax, dtype, spoil, seed):
    cost = (random_cost(rows, columns, seed=seed) * scale).to(dtype)
    a, b = torch.full((rows,), 1 / max(rows, 1)), torch.full((columns,), 1 / max(columns, 1))
    if spoil == "a column without weight":
        b[:1] = 0
    elif spoil == "a row without weight":
        a[:1] = 0
    elif spoil == "a forbidden row and column":
        cost[:1] = torch.inf
        cost[:, :1] = torch.inf
    with ops.use_backend(name):
        result = ops.sinkhorn(cost, reg, a=a, b=b, relax=relax, max_iter=30)
    plan = result.plan()
    assert plan.shape == (rows, columns) and result.labels().shape == result.confidence().shape == (rows,)
    for tensor in (plan, result.log_u, result.log_v, result.error, result.confidence()):
        assert not tensor.isnan().any()
    assert plan.isfinite().all() and (plan >= 0).all()
    if columns and spoil in ("nothing", "a row without weight"):
        torch.testing.assert_close(plan.sum(1), a.to(plan.dtype))
    if spoil == "a column without weight":
        assert (plan[:, :1] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("relax", [None, 0.3])
@pytest.mark.parametrize("spoil", [torch.nan, -torch.inf])
@pytest.mark.parametrize("where", ["cost", "a", "b"])
def test_native_puts_nan_where_the_reference_does(backend, isa, where, spoil, relax, dtype):
    problem = {"cost": random_cost(3, 70, 21, dtype=dtype), "a": torch.ones(3, 70) / 70, "b": torch.ones(3, 21) / 21}
    problem["cost"][:, 5] = torch.inf
    for entry in (0, -1):  # one problem of three remains as it is
        problem[where][entry].view(-1)[17] = spoil
    options = {"reg": 0.2, "relax": relax, "max_iter": 30, "tol": 1e-7}
    expected = reference(**problem, **options)
    with ops.use_backend("cpu"):
        result = ops.sinkhorn(**problem, **options)
    assert result.error.isnan().tolist() == [True, False, True]
    for name in ("log_u", "log_v", "iterations", "error", "labels"):
        actual, wanted = (getattr(solved, name) for solved in (result, expected))
        if name == "labels":
            actual, wanted = actual(), wanted()
        torch.testing.assert_close(actual, wanted, equal_nan=True)


def test_nan_of_a_row_that_is_forbidden_matters_to_none(backend):
    cost, weights = random_cost(9, 4), torch.ones(9) / 9
    cost[2], weights[2] = torch.inf, torch.nan
    result = ops.sinkhorn(cost, 0.2, a=weights, relax=0.3)
    assert result.log_u[2] == -torch.inf and not result.log_v.isnan().any() and result.iterations > 1


def test_nothing_to_transport():
    no_rows, no_columns = ops.sinkhorn(torch.ones(0, 3), 1.0), ops.sinkhorn(torch.ones(3, 0), 1.0)
    assert no_rows.plan().shape == (0, 3) and no_rows.iterations == 0
    assert no_columns.labels().tolist() == [-1, -1, -1] and no_columns.confidence().tolist() == [0.0] * 3
    assert ops.sinkhorn(torch.ones(0, 2, 3), 1.0).labels().shape == (0, 2)
    assert ops.sinkhorn([], 1.0).labels() == []


def test_equal_columns_go_to_the_lower_index():
    cost = torch.tensor([[1.0, 0.5, 0.5], [0.2, 0.2, 0.2]])
    assert ops.sinkhorn(cost, 0.1, relax=1e-6).labels().tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_costs_are_solved_in_float32(dtype):
    cost = random_cost(50, 9, seed=9, dtype=dtype)
    result = ops.sinkhorn(cost, 0.1)
    assert result.plan().dtype == torch.float32
    torch.testing.assert_close(result.plan(), ops.sinkhorn(cost.float(), 0.1).plan(), rtol=0, atol=0)


def test_reads_any_layout_and_any_thread_count():
    cost = random_cost(90, 700, seed=10, dtype=torch.float32).T
    expected = ops.sinkhorn(cost.contiguous(), 0.1)
    torch.testing.assert_close(ops.sinkhorn(cost, 0.1).plan(), expected.plan())

    def run():
        result = ops.sinkhorn(cost.contiguous(), 0.1)
        return result.log_u, result.log_v, result.error, result.plan()

    same_bits_for_any_thread_count(run)


def worst(result, exact):
    """Largest differences of the potentials, where both are finite; that they are finite in the same places."""
    differences = []
    for name in ("log_u", "log_v"):
        given, wanted = getattr(result, name).double(), getattr(exact, name)
        assert torch.equal(given.isfinite(), wanted.isfinite())
        difference = (given - wanted)[wanted.isfinite()].abs()
        differences.append(float(difference.max()) if difference.numel() else 0.0)
    return max(differences)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])  # isa
@given(
    rows=st.sampled_from([1, 2, 63, 64, 65, 200]),
    columns=st.sampled_from([1, 3, 15, 16, 17, 100]),
    spread=st.sampled_from([0.0, 1.0, 30.0, 1e3, 1e5]),
    shift=st.sampled_from([0.0, 1e3]),
    relax=st.sampled_from([None, 0.3]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    spoil=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_native_stays_in_the_error_budget(backend, isa, rows, columns, spread, shift, relax, dtype, spoil, seed):
    cost = (random_cost(rows, columns, seed=seed) * spread + shift).to(dtype)
    a, b = random_weights(rows, seed + 1), random_weights(columns, seed + 2)
    if spoil:
        cost[seed % rows, seed % columns] = torch.inf
        a[seed % rows], b[seed % columns] = 1e-30, 0
    options = {"a": a, "b": b, "relax": relax, "max_iter": 12, "tol": 0}
    with ops.use_backend("reference"):
        exact = ops.sinkhorn(cost.double(), 0.7, **options)
        plain = ops.sinkhorn(cost, 0.7, **options)
    native = ops.sinkhorn(cost, 0.7, **options)
    scaled = cost.double() / 0.7
    magnitude = 1 + max(float(x.nan_to_num(0, 0, 0).abs().max()) for x in (scaled, exact.log_u, exact.log_v))
    floor = 16 * torch.finfo(native.log_u.dtype).eps * magnitude
    assert worst(native, exact) <= 2 * worst(plain, exact) + floor


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_too_far_for_the_plan_keep_their_potential(backend, dtype):
    cost = random_cost(70, 40, seed=1, dtype=dtype)
    cost[:, 5:] += 2000  # at first nothing that a float can hold arrives there
    cost[:, 20] = torch.inf
    with ops.use_backend("reference"):
        exact = ops.sinkhorn(cost.double(), 1.0, relax=3.0, max_iter=2, tol=0)
    native = ops.sinkhorn(cost, 1.0, relax=3.0, max_iter=2, tol=0)
    assert native.log_v[20] == -torch.inf
    finite = torch.arange(40) != 20
    torch.testing.assert_close(native.log_v[finite].double(), exact.log_v[finite], rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(native.log_u.double(), exact.log_u, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
def test_thread_count_does_not_show_in_large_problems_and_batches(backend):
    one = random_cost(1000, 333, seed=3, dtype=torch.float32) * 9  # enough work for three threads
    far = one + 200 * (torch.arange(333) > 100)  # with columns summed anew
    many = random_cost(5, 30, 20, seed=4)

    def run():
        results = [ops.sinkhorn(cost, 0.2, max_iter=6, tol=0) for cost in (one, far, many)]
        return [getattr(result, name) for result in results for name in ("log_u", "log_v", "error", "iterations")]

    same_bits_for_any_thread_count(run)


def test_a_plan_is_a_constant():
    """Its gradient by the cost as it stands would take log_v for one that the cost does not move."""
    solved = ops.sinkhorn(torch.rand(3, 4, requires_grad=True), 0.1)
    assert not solved.plan().requires_grad and not solved.confidence().requires_grad


def test_wrong_arguments_are_named(monkeypatch):
    cost = torch.ones(3, 4)
    with pytest.raises(TypeError, match="cost must be a tensor or a list of tensors, got float"):
        ops.sinkhorn(1.0, 0.1)
    with pytest.raises(ValueError, match=r"cost must be a dense tensor of shape \[..., N, C\]"):
        ops.sinkhorn(torch.ones(3), 0.1)
    with pytest.raises(ValueError, match=r"cost must be a dense tensor .* got sparse_coo float32 \[3, 4\] on cpu"):
        ops.sinkhorn(cost.to_sparse(), 0.1)
    with pytest.raises(TypeError, match=r"cost\[1\] must be a tensor"):
        ops.sinkhorn([cost, None], 0.1)
    with pytest.raises(ValueError, match="reg must be a finite number above 0"):
        ops.sinkhorn(cost, 0)
    with pytest.raises(ValueError, match=r"a must be a float tensor of shape \[3\]"):
        ops.sinkhorn(cost, 0.1, a=torch.ones(4))
    with pytest.raises(TypeError, match="b must be a list of 2 tensors like cost"):
        ops.sinkhorn([cost, cost], 0.1, b=torch.ones(2, 4))
    with pytest.raises(ValueError, match="relax must be a finite number above 0"):
        ops.sinkhorn(cost, 0.1, relax=-1.0)
    with pytest.raises(ValueError, match="max_iter must be an integer of at least 1"):
        ops.sinkhorn(cost, 0.1, max_iter=0)
    with pytest.raises(ValueError, match="tol must be a number of at least 0"):
        ops.sinkhorn(cost, 0.1, tol=-1e-3)
    monkeypatch.setenv("ENGINE_DEBUG", "1")
    with pytest.raises(ValueError, match="cost must be without NaN"):
        ops.sinkhorn(cost * torch.nan, 0.1)
    with pytest.raises(ValueError, match="b must be at least 0, got values from -1.0"):
        ops.sinkhorn(cost, 0.1, b=-torch.ones(4))
