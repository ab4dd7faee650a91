"""Entropic optimal transport: Sinkhorn's iteration in the log domain, for a batch of problems.

One iteration is three launches. `_row_kernel` takes the row step of a block of rows and leaves the column sums of their
part of the plan; `_column_kernel` adds those, block after block, and proposes log_v; `_stop_kernel` finds the error of
each problem and gives the proposal to those that go on. Entries of the plan are at most 1, so their sums need no
maximum; a column so small that its sum is lost is summed once more in the log domain.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.ops.sinkhorn import Sinkhorn, log_weight, reference, row_offset

BLOCK_ROWS = 16
LOOK_EVERY = 10
"""Iterations between two looks at what goes on: a look waits for the device."""


@triton.jit
def _row_kernel(
    cost_p,
    offset_p,
    log_a_p,
    log_v_p,
    log_u_p,
    partial_p,
    row_count,
    column_count,
    inverse_reg,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    i_block, i_problem = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_rows = i_block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    m_rows = o_rows < row_count
    cost_p += (i_problem * row_count + o_rows[:, None]) * column_count
    log_v_p += i_problem * column_count
    offset = tl.load(offset_p + i_problem * row_count + o_rows, mask=m_rows, other=0.0)
    log_a = tl.load(log_a_p + i_problem * row_count + o_rows, mask=m_rows, other=float("-inf"))
    most = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    for start in range(0, column_count, BLOCK_COLUMNS):
        o_columns = start + tl.arange(0, BLOCK_COLUMNS)
        m_columns = o_columns < column_count
        cost = tl.load(cost_p + o_columns[None, :], mask=m_rows[:, None] & m_columns[None, :], other=0.0).to(tl.float32)
        log_v = tl.load(log_v_p + o_columns, mask=m_columns, other=float("-inf"))
        scores = log_v[None, :] - (cost - offset[:, None]) * inverse_reg
        larger = tl.maximum(most, tl.max(scores, axis=1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(most - shift) + tl.sum(tl.exp(scores - shift[:, None]), axis=1)
        most = larger
    # Where nothing can be sent the row is 0, not log_a / 0.
    log_u = tl.where(total == 0, float("-inf"), log_a - most - tl.log(total))
    tl.store(log_u_p + i_problem * row_count + o_rows, log_u, mask=m_rows)
    partial_p += (i_problem * tl.num_programs(0) + i_block) * column_count
    for start in range(0, column_count, BLOCK_COLUMNS):
        o_columns = start + tl.arange(0, BLOCK_COLUMNS)
        m_columns = o_columns < column_count
        cost = tl.load(cost_p + o_columns[None, :], mask=m_rows[:, None] & m_columns[None, :], other=0.0).to(tl.float32)
        log_v = tl.load(log_v_p + o_columns, mask=m_columns, other=float("-inf"))
        plan = tl.exp(log_u[:, None] + log_v[None, :] - (cost - offset[:, None]) * inverse_reg)
        tl.store(partial_p + o_columns, tl.sum(tl.where(m_rows[:, None], plan, 0.0), axis=0), mask=m_columns)


@triton.jit
def _column_kernel(
    cost_p,
    offset_p,
    log_b_p,
    log_v_p,
    log_u_p,
    partial_p,
    proposed_p,
    errors_p,
    row_count,
    column_count,
    block_count,
    inverse_reg,
    exponent,
    least,
    RELAXED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    i_column, i_problem = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_columns = i_column * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    m_columns = o_columns < column_count
    o_vector = i_problem * column_count + o_columns
    partial_p += i_problem * block_count * column_count
    sums = tl.zeros([BLOCK_COLUMNS], dtype=tl.float32)
    for block in range(block_count):
        sums += tl.load(partial_p + block * column_count + o_columns, mask=m_columns, other=0.0)
    log_v = tl.load(log_v_p + o_vector, mask=m_columns, other=float("-inf"))
    log_b = tl.load(log_b_p + o_vector, mask=m_columns, other=float("-inf"))
    log_column = tl.log(sums) - tl.where(log_v == float("-inf"), 0.0, log_v)
    lost = m_columns & (log_b != float("-inf")) & (sums < least)
    if tl.max(lost.to(tl.int32), axis=0) > 0:
        most = tl.full([BLOCK_COLUMNS], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_COLUMNS], dtype=tl.float32)
        for start in range(0, row_count, BLOCK_ROWS):
            o_rows = i_problem * row_count + start + tl.arange(0, BLOCK_ROWS)
            m_rows = start + tl.arange(0, BLOCK_ROWS) < row_count
            offset = tl.load(offset_p + o_rows, mask=m_rows, other=0.0)
            log_u = tl.load(log_u_p + o_rows, mask=m_rows, other=float("-inf"))
            cost = tl.load(
                cost_p + o_rows[:, None] * column_count + o_columns[None, :],
                mask=m_rows[:, None] & m_columns[None, :],
                other=0.0,
            ).to(tl.float32)
            scores = log_u[:, None] - (cost - offset[:, None]) * inverse_reg
            larger = tl.maximum(most, tl.max(scores, axis=0))
            shift = tl.where(larger == float("-inf"), 0.0, larger)
            total = total * tl.exp(most - shift) + tl.sum(tl.exp(scores - shift[None, :]), axis=0)
            most = larger
        exact = tl.where(total == 0, float("-inf"), most + tl.log(total))
        log_column = tl.where(lost, exact, log_column)
    proposed = tl.where(log_column == float("-inf"), float("-inf"), log_b - log_column) * exponent
    if RELAXED:
        error = tl.where(proposed == log_v, 0.0, tl.abs(proposed - log_v))
        error = tl.max(tl.where(m_columns, error, 0.0), axis=0)
    else:
        error = tl.abs(tl.exp(log_v + log_column) - tl.exp(log_b))
        error = tl.sum(tl.where(m_columns, error, 0.0), axis=0)
    tl.store(proposed_p + o_vector, proposed, mask=m_columns)
    tl.store(errors_p + i_problem * tl.num_programs(0) + i_column, error)


@triton.jit
def _stop_kernel(
    errors_p,
    proposed_p,
    log_v_p,
    error_p,
    iterations_p,
    active_p,
    column_count,
    error_count,
    tol,
    last,
    RELAXED: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    i_problem = tl.program_id(0).to(tl.int64)
    error = tl.zeros([], dtype=tl.float32)
    for i_error in range(error_count):
        part = tl.load(errors_p + i_problem * error_count + i_error)
        error = tl.maximum(error, part, propagate_nan=tl.PropagateNan.ALL) if RELAXED else error + part
    active = tl.load(active_p + i_problem)
    tl.store(error_p + i_problem, error)
    tl.store(iterations_p + i_problem, tl.load(iterations_p + i_problem) + active)
    active = tl.where(error > tol, active, 0)
    tl.store(active_p + i_problem, active)
    if (active > 0) & (last == 0):
        for start in range(0, column_count, BLOCK_COLUMNS):
            o_columns = start + tl.arange(0, BLOCK_COLUMNS)
            m_columns = o_columns < column_count
            proposed = tl.load(proposed_p + i_problem * column_count + o_columns, mask=m_columns)
            tl.store(log_v_p + i_problem * column_count + o_columns, proposed, mask=m_columns)


def sinkhorn(
    cost: Tensor,
    reg: float,
    *,
    a: Tensor | None = None,
    b: Tensor | None = None,
    relax: float | None = None,
    max_iter: int = 500,
    tol: float = 1e-3,
) -> Sinkhorn:
    """As engine/ops/sinkhorn.py, without waiting for the device but at every look."""
    if cost.numel() == 0:
        return reference(cost, reg, a=a, b=b, relax=relax, max_iter=max_iter, tol=tol)
    matrix = cost.contiguous()
    batch, (row_count, column_count) = cost.shape[:-2], cost.shape[-2:]
    offset = row_offset(matrix)
    log_a = log_weight(a, cost.shape[:-1], offset).contiguous()
    log_b = log_weight(b, (*batch, column_count), offset).contiguous()
    log_u, log_v, proposed = torch.empty_like(log_a), log_b.clone(), torch.empty_like(log_b)
    iterations, active = torch.zeros(2, *batch, dtype=torch.int32, device=cost.device)
    active.fill_(1)
    error = offset.new_empty(batch)
    block_count, problem_count = triton.cdiv(row_count, BLOCK_ROWS), error.numel()
    block_columns = min(256, triton.next_power_of_2(column_count))
    error_count = triton.cdiv(column_count, 32)
    partial = offset.new_empty(problem_count, block_count, column_count)
    errors = offset.new_empty(problem_count, error_count)
    inverse_reg = min(1 / reg, torch.finfo(torch.float32).max)  # times an offset of 0 an infinite one would be NaN
    for iteration in range(1, max_iter + 1):
        _row_kernel[(block_count, problem_count)](
            matrix,
            offset,
            log_a,
            log_v,
            log_u,
            partial,
            row_count,
            column_count,
            inverse_reg,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=block_columns,
            num_warps=4,
        )
        _column_kernel[(error_count, problem_count)](
            matrix,
            offset,
            log_b,
            log_v,
            log_u,
            partial,
            proposed,
            errors,
            row_count,
            column_count,
            block_count,
            inverse_reg,
            1.0 if relax is None else relax / (relax + reg),
            1e-30,
            RELAXED=relax is not None,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLUMNS=32,
            num_warps=1,
        )
        _stop_kernel[(problem_count,)](
            errors,
            proposed,
            log_v,
            error,
            iterations,
            active,
            column_count,
            error_count,
            float(tol),
            int(iteration == max_iter),
            RELAXED=relax is not None,
            BLOCK_COLUMNS=1024,
            num_warps=4,
        )
        if iteration % LOOK_EVERY == 0 and iteration < max_iter and not bool(active.any()):
            break
    return Sinkhorn(log_u + offset / reg, log_v, iterations.long(), error, cost, reg, log_a)
