"""Entropic optimal transport by Sinkhorn's iteration in the log domain."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.ops import _check, _cuda
from engine.ops._backend import pick
from engine.ops._precision import accumulation_dtype

CHUNKS = 256
"""Parts at most into which a GPU divides the rows of a problem, whatever it is: sums do not hang on the GPU."""


@dataclass(frozen=True)
class Sinkhorn:
    """The plan `Q_ij = exp(log_u_i + log_v_j - cost_ij / reg)`; for a list of costs every field but `reg` is a list.

    Attributes:
        log_u: `[..., N]`, always the row step of `log_v`: rows have their marginal.
        log_v: `[..., C]`.
        iterations: `[...]` int64, row steps done.
        error: `[...]`, of exactly this plan; what `sinkhorn` compares with `tol`.
        cost: `[..., N, C]` as given.
        reg: as given.
        log_a: `[..., N]` log of the row marginal.
    """

    log_u: Tensor | list[Tensor]
    log_v: Tensor | list[Tensor]
    iterations: Tensor | list[Tensor]
    error: Tensor | list[Tensor]
    cost: Tensor | list[Tensor]
    reg: float
    log_a: Tensor | list[Tensor]

    def plan(self) -> Any:
        """Q, `[..., N, C]`. From the row-wise softmax, so that rows are exact however large cost / reg is."""
        return self._each(lambda log_a, scores: log_a.exp().unsqueeze(-1) * _softmax(scores))

    def labels(self) -> Any:
        """Largest entry of each row, `[..., N]` int64, the lower index on ties; -1 where there is no column."""
        return self._each(lambda log_a, scores: argmax(scores))

    def confidence(self) -> Any:
        """Share of the largest entry in its row, `[..., N]` in [0, 1]."""
        return self._each(lambda log_a, scores: _softmax(scores).amax(-1) if scores.shape[-1] else scores.sum(-1))

    @torch.no_grad()  # that of a plan would lack what the cost does to log_v
    def _each(self, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor | list[Tensor]:
        """`function(log_a, log_v - cost / reg)`, the latter up to a constant per row."""

        def one(cost: Tensor, log_a: Tensor, log_v: Tensor) -> Tensor:
            return function(log_a, log_v.unsqueeze(-2) - scale(cost, self.reg))

        if isinstance(self.cost, list):
            return [one(*problem) for problem in zip(self.cost, self.log_a, self.log_v, strict=True)]
        return one(self.cost, self.log_a, self.log_v)  # type: ignore[arg-type]


@torch.no_grad()
def sinkhorn(
    cost: Tensor | Sequence[Tensor],
    reg: float,
    *,
    a: Tensor | Sequence[Tensor] | None = None,
    b: Tensor | Sequence[Tensor] | None = None,
    relax: float | None = None,
    max_iter: int = 500,
    tol: float = 1e-3,
) -> Sinkhorn:
    """`min_Q <Q, cost> - reg H(Q)` over plans Q with row sums `a` and column sums `b`.

    Cuturi, *Sinkhorn Distances* (NeurIPS 2013); SALCR (IJCV 2025) Eq. 4 with lambda = 1 / reg. With
    `K = exp(-cost / reg)` and starting from `v = b`, one iteration is the row step `u = a / (K v)` and then, unless it
    was the last, the column step `v = b / (K^T u)`, or `v = (b / (K^T u))^(relax / (relax + reg))` where the column
    marginal is relaxed by a Kullback-Leibler penalty of weight `relax` (FIRM; Chizat et al., 2018).

    After the row step the error is `sum_j |(K^T u)_j v_j - b_j|` (with `relax`: the largest change of log_v that the
    column step would make). A problem stops when its error is <= `tol`; every problem of a batch stops for itself, so
    batching changes no result. (The SALCR release stops when `sum_j |b_j / b'_j - 1| < .1`, tested every ten
    iterations: another rule, another number of iterations.)

    Args:
        cost: `[..., N, C]` float32, float16, bfloat16 or float64, or a list of such tensors. inf forbids a pair.
        reg: weight of the entropy, > 0.
        a: `[N]` or `[..., N]` row marginal, >= 0, default 1/N; a list where `cost` is one.
        b: `[C]` or `[..., C]` column marginal, likewise, default 1/C. Without `relax` its sum should be that of `a`.
        relax: weight of the penalty instead of the column constraint, > 0.
        max_iter: iterations at most, >= 1.
        tol: >= 0.

    Returns:
        A `Sinkhorn`, float64 for float64 costs, else float32. Neither it nor its plan has a gradient.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [0.1, 1.0]])
        >>> solved = ops.sinkhorn(cost, reg=0.1, tol=1e-6)
        >>> solved.plan().sum(dim=1), solved.labels()
        (tensor([0.5000, 0.5000]), tensor([0, 1]))
    """
    check_settings(reg, relax, tol)
    max_iter = _check.count("max_iter", max_iter, 1)
    if isinstance(cost, Tensor):
        _check_problem("", cost, a, b)
        return pick("sinkhorn", cost)(cost, reg, a=a, b=b, relax=relax, max_iter=max_iter, tol=tol)
    if not isinstance(cost, Sequence):
        raise TypeError(f"cost must be a tensor or a list of tensors, got {type(cost).__name__}")
    weights = [_listed(name, given, len(cost)) for name, given in (("a", a), ("b", b))]
    results = []
    for index, problem in enumerate(zip(cost, *weights, strict=True)):
        _check_problem(f"[{index}]", *problem)
        matrix, rows, columns = problem
        solve_one = pick("sinkhorn", matrix)
        results.append(solve_one(matrix, reg, a=rows, b=columns, relax=relax, max_iter=max_iter, tol=tol))
    fields = ("log_u", "log_v", "iterations", "error", "cost", "log_a")
    return Sinkhorn(reg=reg, **{name: [getattr(result, name) for result in results] for name in fields})


def reference(
    cost: Tensor,
    reg: float,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    relax: float | None = None,
    max_iter: int = 500,
    tol: float = 1e-3,
) -> Sinkhorn:
    """`solve` on the whole matrix."""
    scaled = scale(cost, reg)
    log_a = log_weight(a, cost.shape[:-1], scaled)
    log_b = log_weight(b, cost.shape[:-2] + cost.shape[-1:], scaled)
    log_u, log_v, iterations, error = solve(lambda: (scaled,), log_a, log_b, reg, relax, max_iter, tol)
    if scaled.shape[-1]:
        log_u = log_u + row_offset(cost) / reg
    return Sinkhorn(log_u, log_v, iterations, error, cost, reg, log_a)


def cpu(
    cost: Tensor,
    reg: float,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    relax: float | None = None,
    max_iter: int = 500,
    tol: float = 1e-3,
) -> Sinkhorn:
    """`solve_native` on the whole matrix."""
    matrix = cost.to(accumulation_dtype(cost))
    log_a = log_weight(a, cost.shape[:-1], matrix)
    log_b = log_weight(b, cost.shape[:-2] + cost.shape[-1:], matrix)
    log_u, log_v, iterations, error = solve_native(matrix, log_a, log_b, reg, relax, max_iter, tol)
    return Sinkhorn(log_u, log_v, iterations, error, cost, reg, log_a)


def cuda(
    cost: Tensor,
    reg: float,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    relax: float | None = None,
    max_iter: int = 500,
    tol: float = 1e-3,
) -> Sinkhorn:
    """csrc/sinkhorn.cu: one launch iterates until every problem has stopped. Nothing waits for the device."""
    if cost.numel() == 0:
        return reference(cost, reg, a=a, b=b, relax=relax, max_iter=max_iter, tol=tol)
    matrix, offset = cost.contiguous(), row_offset(cost)
    batch, (row_count, column_count) = cost.shape[:-2], cost.shape[-2:]
    log_a = log_weight(a, cost.shape[:-1], offset).contiguous()
    log_b = log_weight(b, (*batch, column_count), offset).contiguous()
    log_u, log_v = torch.empty_like(log_a), torch.stack([log_b, log_b])
    iterations, error = offset.new_empty(batch, dtype=torch.int64), offset.new_empty(batch)
    problem_count = error.numel()
    chunk_rows = max(8, -(-row_count // CHUNKS))
    chunk_count = -(-row_count // chunk_rows)
    working_space = (
        offset.new_empty(problem_count, chunk_count, column_count),
        offset.new_empty(problem_count, -(-column_count // 32)),
    )
    active, state = offset.new_empty(problem_count, dtype=torch.bool), offset.new_zeros(3, dtype=torch.int32)
    limits = torch.finfo(torch.float32)  # an infinite factor times 0 would be NaN, as would be 0 times infinity
    inverse_reg = min(max(1 / reg, limits.smallest_normal), limits.max)
    exponent = 1.0 if relax is None else relax / (relax + reg)
    _cuda.launch(
        "sinkhorn",
        f"sinkhorn_{_cuda.name_of(cost.dtype)}_kernel",
        min(problem_count * chunk_count, 2 * _cuda.multiprocessors(cost.device)),
        256,
        (
            *(matrix, offset, log_a, log_b, log_u, log_v, *working_space, error, iterations, active, state),
            *(problem_count, row_count, column_count, chunk_rows),
            *(inverse_reg, exponent, relax is not None, float(tol), max_iter),
        ),
        cooperative=True,
    )
    log_v = torch.where(iterations.unsqueeze(-1) % 2 == 1, log_v[0], log_v[1])
    return Sinkhorn(log_u + offset / reg, log_v, iterations, error, cost, reg, log_a)


def solve_native(
    cost: Tensor, log_a: Tensor, log_b: Tensor, reg: float, relax: float | None, max_iter: int, tol: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """csrc/sinkhorn.cpp: an iteration reads the cost once, threads over blocks of rows or over problems.

    Args:
        cost: `[..., N, C]` float32 or float64, kept as it is; log_a, log_b: as in `solve`.

    Returns:
        As `solve`.
    """
    from engine import _C

    cost, log_a, log_b = cost.contiguous(), log_a.contiguous(), log_b.contiguous()
    log_u, log_v = torch.empty_like(log_a), torch.empty_like(log_b)
    iterations, error = log_v.new_empty(cost.shape[:-2], dtype=torch.int64), log_v.new_empty(cost.shape[:-2])
    run = _C.sinkhorn_float64 if cost.dtype == torch.float64 else _C.sinkhorn_float32
    run(
        cost.data_ptr(),
        log_a.data_ptr(),
        log_b.data_ptr(),
        iterations.numel(),
        cost.shape[-2],
        cost.shape[-1],
        reg,
        relax or 0.0,
        max_iter,
        tol,
        log_u.data_ptr(),
        log_v.data_ptr(),
        iterations.data_ptr(),
        error.data_ptr(),
        torch.get_num_threads(),
    )
    return log_u, log_v, iterations, error


def solve(
    blocks: Callable[[], Iterable[Tensor]],
    log_a: Tensor,
    log_b: Tensor,
    reg: float,
    relax: float | None,
    max_iter: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sinkhorn's iteration, one visit of the matrix each.

    Args:
        blocks: gives `cost / reg` as blocks of rows `[..., n, C]` in order, at every visit anew.
        log_a, log_b: `[..., N]`, `[..., C]`.

    Returns:
        log_u `[..., N]`, log_v `[..., C]`, iterations `[...]`, error `[...]`.
    """
    log_v = log_b
    iterations = torch.zeros(log_b.shape[:-1], dtype=torch.int64, device=log_b.device)
    active = torch.full_like(iterations, log_a.shape[-1] > 0, dtype=torch.bool)
    # Looking later does no more than visit stopped problems again: their log_v stays, so all else repeats itself.
    look_every = _look_every(log_b.device)
    iteration = 0
    while True:
        iteration += 1
        log_u, log_column = _visit(blocks(), log_a, log_v)
        if relax is None:
            proposed = _divide(log_b, log_column)
            error = ((log_v + log_column).exp() - log_b.exp()).abs().sum(-1)
        else:
            proposed = _divide(log_b, log_column) * (relax / (relax + reg))
            change = (proposed - log_v).masked_fill(proposed == log_v, 0).abs()
            error = change.amax(-1) if change.shape[-1] else change.sum(-1)
        iterations += active
        active = active & (error > tol)
        if iteration == max_iter or (iteration % look_every == 0 and not bool(active.any())):
            return log_u, log_v, iterations, error
        log_v = torch.where(active.unsqueeze(-1), proposed, log_v)


def scale(cost: Tensor, reg: float) -> Tensor:
    """`cost / reg` less each row's smallest entry, which the row step absorbs: large entries keep their differences."""
    cost = cost.to(accumulation_dtype(cost))
    if cost.shape[-1] == 0:
        return cost
    return (cost - row_offset(cost).unsqueeze(-1)) / reg


def argmax(scores: Tensor) -> Tensor:
    """Index of the largest entry of each row, the lowest on ties, -1 without columns."""
    return scores.argmax(-1) if scores.shape[-1] else scores.new_full(scores.shape[:-1], -1, dtype=torch.int64)


def log_weight(weight: Tensor | None, shape: Sequence[int], like: Tensor) -> Tensor:
    """Log of a marginal expanded to `shape`, by default uniform with sum 1."""
    if weight is None:
        return like.new_full(tuple(shape), -math.log(max(shape[-1], 1)))
    return weight.to(like.dtype).log().expand(tuple(shape))


def check_settings(reg: float, relax: float | None, tol: float) -> None:
    """The settings that `sinkhorn` and `ot_assign` share."""
    _check.positive("reg", reg)
    if relax is not None:
        _check.positive("relax", relax)
    if isinstance(tol, bool) or not isinstance(tol, (int, float)) or not tol >= 0:
        raise _check.fail("tol", "a number of at least 0", tol)


def check_weight(name: str, weight: object, shape: Sequence[int], like: Tensor) -> None:
    """A marginal fits the cost; under `ENGINE_DEBUG=1` it is not negative."""
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(weight).__name__}")
    if weight.shape not in (tuple(shape), tuple(shape[-1:])) or weight.dtype not in _check.FLOATS:
        raise _check.fail(name, f"a float tensor of shape {list(shape[-1:])} or {list(shape)}", weight)
    _check.like(name, weight, "cost", like, dtype=False)
    if _check.debug() and not bool((weight >= 0).all()):
        raise ValueError(f"{name} must be at least 0, got values from {float(weight.min())}")


def _check_problem(index: str, cost: object, a: Any, b: Any) -> None:
    cost = _check.tensor(f"cost{index}", cost, "... N C")
    check_weight(f"a{index}", a, cost.shape[:-1], cost)
    check_weight(f"b{index}", b, cost.shape[:-2] + cost.shape[-1:], cost)
    _check.no_nan(f"cost{index}", cost)


def _listed(name: str, given: Any, length: int) -> Sequence[Tensor | None]:
    if given is None:
        return [None] * length
    if isinstance(given, Tensor) or not isinstance(given, Sequence) or len(given) != length:
        raise TypeError(f"{name} must be a list of {length} tensors like cost, got {type(given).__name__}")
    return given


def _look_every(device: torch.device) -> int:
    """Iterations between two looks at the error: off the CPU a look waits for the device."""
    return 1 if device.type == "cpu" else 10


def _visit(blocks: Iterable[Tensor], log_a: Tensor, log_v: Tensor) -> tuple[Tensor, Tensor]:
    """The row step, and `log (K^T u)` of its result."""
    log_u = torch.empty_like(log_a)
    log_column = torch.full_like(log_v, -torch.inf)
    start = 0
    for block in blocks:
        rows = slice(start, start + block.shape[-2])
        start = rows.stop
        log_u[..., rows] = _divide(log_a[..., rows], (log_v.unsqueeze(-2) - block).logsumexp(-1))
        log_column = torch.logaddexp(log_column, (log_u[..., rows].unsqueeze(-1) - block).logsumexp(-2))
    return log_u, log_column


def _divide(log_weight: Tensor, log_sum: Tensor) -> Tensor:
    """log(weight / sum), where nothing can be sent (an empty, forbidden or weightless line) 0 instead of weight / 0."""
    return (log_weight - log_sum).masked_fill(log_sum == -torch.inf, -torch.inf)


def _softmax(scores: Tensor) -> Tensor:
    """Row-wise softmax; a row that has only forbidden entries is 0."""
    return scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)


def row_offset(cost: Tensor) -> Tensor:
    """Smallest entry of each row, 0 for a row of inf."""
    least = cost.amin(-1).to(accumulation_dtype(cost))
    return least.masked_fill(least == torch.inf, 0)
