"""Arguments of every operator, for tests of what must hold for any: `INPUTS[name]` draws a `Call`.

Shapes, types, layouts and kinds of values are drawn, so that a failure shrinks to the few that it needs; the numbers
come from a seed. Sizes are 0, 1 and those next to the block sizes of the kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

ROWS = st.sampled_from([0, 1, 2, 3, 5, 16, 31, 65, 97])
BANK_ROWS = st.sampled_from([0, 1, 2, 7, 16, 31, 97, 481])
WIDTHS = st.sampled_from([0, 1, 2, 3, 4, 16, 31, 64, 257])
NEIGHBORS = st.sampled_from([0, 1, 2, 3, 7, 31, 500])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])
LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided", "shifted"])
REDUCTIONS = st.sampled_from(["mean", "sum", "none"])
SEEDS = st.integers(0, 10_000)
PROBLEMS = st.sampled_from([(), (), (), (1,), (3,), (2, 2), (0,), (2, 0)])
"""Leading dimensions of operators that take batches of problems."""

INT64 = torch.iinfo(torch.int64)
WILD = (INT64.min, -(2**40), -3, -2, 2**31, 2**32, 2**40, 2**62, INT64.max - 1, INT64.max)
"""No label and no column of anything."""


@dataclass
class Call:
    """What an operator is called with.

    Attributes:
        arguments: positional, of any layout, with labels and indices that may be no label and no index.
        tame: the same contiguous, with -1 in place of what is no index.
        options: by keyword.
        exact: sums of products of the inputs are exact in float32, so that what ties does so in any order of summation.
    """

    arguments: tuple[Any, ...]
    tame: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    exact: bool = False


@dataclass
class Values:
    """A matrix, or something like it."""

    given: Tensor
    tame: Tensor
    kind: str


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The same entries; what lies between them in memory is poison."""
    poison = math.nan if value.is_floating_point() else WILD[0]
    if layout == "transposed" and value.dim() > 1:
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "strided":
        room = value.new_full((*value.shape[:-1], 2 * value.shape[-1]), poison)[..., ::2]
    elif layout == "shifted":  # rows apart from each other, the first not at the start of the memory
        room = value.new_full((*value.shape[:-1], value.shape[-1] + 3), poison)[..., 2:-1]
    else:
        return value.contiguous()
    return room.copy_(value)


def draw_rows(
    draw: st.DrawFn, *shape: int, dtype: torch.dtype, linear: bool = False, seed: int | None = None
) -> Values:
    """Rows of one kind: with ties, all equal, 0, tiny or huge ones.

    Args:
        linear: the operator sums rows but multiplies none, so that far larger ones are meaningful.
    """
    kind = draw(st.sampled_from(["normal", "normal", "integers", "signs", "axes", "equal", "zero"]))
    layout = draw(LAYOUTS)
    generator = torch.Generator().manual_seed(draw(SEEDS) if seed is None else seed)
    if kind == "normal":
        rows = torch.randn(shape, generator=generator, dtype=torch.float64)
    elif kind == "zero":
        rows = torch.zeros(shape, dtype=torch.float64)
    else:
        rows = torch.randint(-2, 3, shape, generator=generator).double()
    if kind == "signs":
        rows = 2 * (rows >= 0).double() - 1
    elif kind == "axes" and rows.numel():
        signs = 1 - 2 * (rows[..., :1] > 0).double()
        rows = torch.zeros_like(rows).scatter_(-1, rows.argmax(-1, keepdim=True), signs)
    elif kind == "equal" and shape[-2]:
        rows = rows[..., :1, :].expand(shape)
    power = {torch.float16: 7, torch.float64: 300}.get(dtype, 100) // (1 if linear else 2)
    rows = rows * 2.0 ** draw(st.sampled_from([0, 0, 0, -power, power]))
    rows = rows.to(dtype)
    if kind == "equal" and shape[-2] and layout == "contiguous":
        return Values(rows[..., :1, :].expand(shape), rows, kind)
    return Values(laid_out(rows, layout), rows, kind)


def draw_dtypes(draw: st.DrawFn) -> tuple[torch.dtype, torch.dtype]:
    """Of features and of a bank, which may differ."""
    first = draw(DTYPES)
    return first, draw(st.one_of(st.just(first), DTYPES))


def draw_labels(draw: st.DrawFn, *shape: int, below: int) -> Values:
    """Labels or indices: any, one for all, none, or such as are none."""
    kind = draw(st.sampled_from(["any", "any", "same", "none", "wild"]))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    labels = torch.randint(-1, max(below, 0), shape, generator=generator)
    if kind == "same":
        labels = torch.full(shape, below - 1)
    elif kind == "none":
        labels = torch.full(shape, -1)
    elif kind == "wild":
        wild = torch.tensor([*WILD, below, below + 1])
        chosen = wild[torch.randint(len(wild), shape, generator=generator)]
        labels = torch.where(torch.rand(shape, generator=generator) < 0.5, chosen, labels)
    tame = labels.masked_fill((labels < 0) | (labels >= below), -1)
    return Values(laid_out(labels, draw(LAYOUTS)), tame, kind)


def call(*values: Any, exact: bool = False, **options: Any) -> Call:
    """Of `Values` and of what is handed over as it is."""
    given = tuple(value.given if isinstance(value, Values) else value for value in values)
    tame = tuple(value.tame if isinstance(value, Values) else value for value in values)
    return Call(given, tame, options, exact)


def exact(*values: Values) -> bool:
    return all(value.kind != "normal" for value in values)


def normalized_exactly(*values: Values) -> bool:
    """Their rows have lengths that are powers of 2 or 0, well above the least that is divided by."""
    return all(
        value.kind in ("axes", "zero") or (value.kind == "signs" and value.tame.shape[-1] in (1, 4, 16, 64))
        for value in values
    ) and all(float(value.tame.abs().max()) > 1e-9 for value in values if value.kind != "zero" and value.tame.numel())


def draw_leading(draw: st.DrawFn, problems: tuple[int, ...]) -> tuple[int, ...]:
    """Of what each problem has for itself, or all share."""
    return problems if draw(st.booleans()) else ()


@st.composite
def contrast(draw: st.DrawFn, target: str) -> Call:
    problems, row_count, bank_count, width = draw(PROBLEMS), draw(ROWS), draw(BANK_ROWS), draw(WIDTHS)
    dtype, bank_dtype = draw_dtypes(draw)
    features = draw_rows(draw, *problems, row_count, width, dtype=dtype)
    bank = draw_rows(draw, *problems, bank_count, width, dtype=bank_dtype)
    if target == "labels":
        about = draw_labels(draw, *draw_leading(draw, problems), row_count, below=bank_count)
    elif target == "positives":
        about = draw_labels(draw, *problems, row_count, draw(st.sampled_from([0, 1, 3, 17])), below=bank_count)
    else:
        about = draw_rows(draw, *problems, row_count, bank_count, dtype=draw(DTYPES))
        about.tame = about.tame.abs().clamp(max=2.0)
        about.given = laid_out(about.tame, draw(LAYOUTS))
    temperature = draw(st.sampled_from([0.05, 1.0, 20]))
    return call(features, bank, about, temperature, reduction=draw(REDUCTIONS))


@st.composite
def memory_update_(draw: st.DrawFn) -> Call:
    problems, bank_rows, batch, width = draw(PROBLEMS), draw(ROWS), draw(ROWS), draw(WIDTHS)
    dtype, features_dtype = draw_dtypes(draw)
    seed = draw(SEEDS)
    bank = draw_rows(draw, *problems, bank_rows, width, dtype=dtype, seed=seed)
    if bank_rows > 1 and bank.given.stride(-2) == 0:
        bank.given = bank.tame.clone()  # nothing can be written to an expanded tensor
    features = draw_rows(draw, *problems, batch, width, dtype=features_dtype, seed=seed + 1)
    momentum: Any = draw(st.sampled_from([0.0, 0.1, 0.9, 1, None]))
    if momentum is None:
        shape = *draw_leading(draw, problems), batch
        weights = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(features_dtype)
        momentum = Values(laid_out(weights, draw(LAYOUTS)), weights, "normal")
    labels = draw_labels(draw, *draw_leading(draw, problems), batch, below=bank_rows)
    return call(bank, features, labels, momentum, normalize=draw(st.booleans()))


@st.composite
def topk(draw: st.DrawFn) -> Call:
    problems, bank_count, width = draw(PROBLEMS), draw(BANK_ROWS), draw(WIDTHS)
    dtype, bank_dtype = draw_dtypes(draw)
    bank = draw_rows(draw, *problems, bank_count, width, dtype=bank_dtype)
    exclude_self = draw(st.booleans())
    if draw(st.booleans()):
        queries = bank
    else:
        queries = draw_rows(draw, *problems, bank_count if exclude_self else draw(ROWS), width, dtype=dtype)
    return call(queries, bank, draw(NEIGHBORS), exclude_self=exclude_self, exact=exact(queries, bank))


@st.composite
def affinity(draw: st.DrawFn) -> Call:
    dtype, bank_dtype = draw_dtypes(draw)
    width = draw(WIDTHS)
    queries = draw_rows(draw, draw(ROWS), width, dtype=dtype)
    bank = draw_rows(draw, draw(BANK_ROWS), width, dtype=bank_dtype)
    return call(queries, bank, draw(NEIGHBORS), exact=exact(queries, bank))


@st.composite
def knn_intersection(draw: st.DrawFn) -> Call:
    dtype, bank_dtype = draw_dtypes(draw)
    width = draw(WIDTHS)
    views = draw_rows(draw, draw(st.integers(1, 3)), draw(ROWS), width, dtype=dtype)
    bank = draw_rows(draw, draw(BANK_ROWS), width, dtype=bank_dtype)
    return call(views, bank, draw(NEIGHBORS), exact=exact(views, bank))


@st.composite
def index_sets(draw: st.DrawFn) -> Call:
    row_count, high = draw(ROWS), draw(st.sampled_from([1, 8, 40]))
    sets = []
    for _ in range(2):
        values = draw_labels(draw, row_count, draw(st.sampled_from([0, 1, 3, 8, 17, 40])), below=high)
        entries = values.given.clamp(max=INT64.max - 1)  # the largest of all stands for padding
        sets.append(Values(laid_out(entries, draw(LAYOUTS)), entries.contiguous(), values.kind))
    return call(*sets)


def csr_of(dense: Tensor, wild: Tensor | None = None) -> Tensor:
    """What is not 0 in `dense`, with entries before it in each row whose columns are those of `wild`."""
    row_count, column_count = dense.shape
    columns, values = [], []
    for row in dense:
        kept = row.nonzero().squeeze(1)
        extra = kept[:0] if wild is None else wild
        columns.append(torch.cat([extra, kept]))
        values.append(torch.cat([row.new_full((len(extra),), 0.25), row[kept]]))
    starts = torch.tensor([0, *(len(row) for row in columns)]).cumsum(0)
    columns = torch.cat([*columns, starts[:0]])
    values = torch.cat([*values, dense.new_empty(0)])
    return torch.sparse_csr_tensor(starts, columns, values, (row_count, column_count), check_invariants=False)


def draw_wild_columns(draw: st.DrawFn, column_count: int) -> Tensor | None:
    columns = draw(st.lists(st.sampled_from([*WILD, -1, column_count, column_count + 1]), max_size=3))
    return torch.tensor(columns) if columns else None


@st.composite
def propagate(draw: st.DrawFn) -> Call:
    row_count, column_count = draw(ROWS), draw(st.sampled_from([0, 1, 2, 31, 97]))
    dtype, graph_dtype = draw_dtypes(draw)
    generator = torch.Generator().manual_seed(draw(SEEDS))
    dense = torch.randn(row_count, column_count, generator=generator, dtype=torch.float64).to(graph_dtype)
    dense[torch.rand(dense.shape, generator=generator) < draw(st.sampled_from([0.2, 0.9, 1.0]))] = 0
    features = draw_rows(draw, column_count, draw(WIDTHS), dtype=dtype, linear=True)
    tame = csr_of(dense)
    return call(Values(csr_of(dense, draw_wild_columns(draw, column_count)), tame, "normal"), features)


@st.composite
def dbscan(draw: st.DrawFn) -> Call:
    count, dtype = draw(st.sampled_from([0, 1, 2, 7, 31, 65])), draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(SEEDS))
    dense = torch.randint(1, 11, (count, count), generator=generator) / 10
    dense[torch.rand(dense.shape, generator=generator) < draw(st.sampled_from([0.5, 0.9, 1.0]))] = 0
    dense = dense.triu(1)
    dense = (dense + dense.T + draw(st.sampled_from([0.0, 0.1])) * torch.eye(count)).to(dtype)
    distance = Values(csr_of(dense, draw_wild_columns(draw, count)), csr_of(dense), "normal")
    return call(distance, draw(st.sampled_from([0.1, 0.3, 0.7])), draw(st.integers(1, 5)))


@st.composite
def cmfp(draw: st.DrawFn) -> Call:
    dtype, width = draw(DTYPES), draw(WIDTHS)
    vis, ir = (draw_rows(draw, draw(ROWS), width, dtype=dtype) for _ in range(2))
    normalize = draw(st.booleans())
    return call(vis, ir, draw(NEIGHBORS), normalize=normalize, exact=normalized_exactly(vis, ir))


@st.composite
def jaccard(draw: st.DrawFn) -> Call:
    features = draw_rows(draw, draw(st.sampled_from([0, 1, 2, 7, 33, 65])), draw(WIDTHS), dtype=draw(DTYPES))
    k1, k2 = draw(st.sampled_from([1, 2, 3, 6, 30])), draw(st.sampled_from([1, 2, 6]))
    return call(features, k1, k2, exact=exact(features))


@st.composite
def segment_mean(draw: st.DrawFn) -> Call:
    row_count, count = draw(BANK_ROWS), draw(ROWS)
    features = draw_rows(draw, row_count, draw(WIDTHS), dtype=draw(DTYPES), linear=True)
    return call(features, draw_labels(draw, row_count, below=count), count)


def draw_transport(draw: st.DrawFn, row_count: int, column_count: int) -> dict[str, Any]:
    """The options of optimal transport. Every iteration is made: at a tolerance, rounding could decide on one more."""
    generator = torch.Generator().manual_seed(draw(SEEDS))

    def weight(count: int) -> Tensor | None:
        if draw(st.booleans()):
            return None
        weights = torch.rand(count, generator=generator, dtype=torch.float64) + 0.01
        return laid_out(weights / weights.sum(), draw(LAYOUTS))

    relax, max_iter = draw(st.sampled_from([None, 0.3])), draw(st.sampled_from([1, 2, 7]))
    return {"a": weight(row_count), "b": weight(column_count), "relax": relax, "max_iter": max_iter, "tol": 0.0}


@st.composite
def sinkhorn(draw: st.DrawFn) -> Call:
    shape = (*draw(st.sampled_from([(), (1,), (3,), (2, 0)])), draw(ROWS), draw(BANK_ROWS))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    spread = draw(st.sampled_from([0.0, 1.0, 30.0, 1e3]))
    cost = (torch.rand(shape, generator=generator, dtype=torch.float64) * spread).to(draw(DTYPES))
    options = draw_transport(draw, *shape[-2:])
    return call(
        Values(laid_out(cost, draw(LAYOUTS)), cost, "normal"), draw(st.sampled_from([0.05, 1, 100.0])), **options
    )


@st.composite
def ot_assign(draw: st.DrawFn) -> Call:
    row_count, count, width = draw(ROWS), draw(ROWS), draw(WIDTHS)
    dtype, other_dtype = draw_dtypes(draw)
    features = draw_rows(draw, row_count, width, dtype=dtype)
    prototypes = draw_rows(draw, count, width, dtype=other_dtype)
    options = draw_transport(draw, row_count, count)
    return call(features, prototypes, draw(st.sampled_from([0.05, 1, 100.0])), **options)


@st.composite
def rank(draw: st.DrawFn) -> Call:
    query_count, gallery_count = draw(ROWS), draw(BANK_ROWS)
    distance = draw_rows(draw, query_count, gallery_count, dtype=draw(DTYPES))
    identities = draw(st.sampled_from([1, 5, 40]))
    ids = [draw_labels(draw, count, below=identities) for count in (query_count, gallery_count)]
    cams = [draw_labels(draw, count, below=5) for count in (query_count, gallery_count)]
    for value in (*ids, *cams):
        value.tame = value.given.contiguous()  # any number names an identity or a camera
    protocol = draw(st.sampled_from(["plain", "sysu", "llcm"]))
    return call(distance, *ids, *cams, protocol=protocol, max_rank=draw(st.sampled_from([1, 20, 500])))


INPUTS: dict[str, st.SearchStrategy[Call]] = {
    "affinity": affinity(),
    "cluster_contrast": contrast("labels"),
    "cmfp": cmfp(),
    "dbscan": dbscan(),
    "jaccard": jaccard(),
    "knn_intersection": knn_intersection(),
    "memory_update_": memory_update_(),
    "neighbor_contrast": contrast("positives"),
    "ot_assign": ot_assign(),
    "propagate": propagate(),
    "rank": rank(),
    "segment_mean": segment_mean(),
    "set_intersection": index_sets(),
    "set_union": index_sets(),
    "sinkhorn": sinkhorn(),
    "soft_contrast": contrast("weights"),
    "topk": topk(),
}
