"""What `bench_kernels.py` times: every operator at some sizes, with its peers, counted work and goals.

A case counts the least that its operator must do: products of which none is computed twice, and inputs read and outputs
written once. So a contender that does twice the work shows half the rate.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias
from unittest import mock

import bench_peers as peers
import torch
from bench_peers import Peer, forward_and_backward
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from torch.nn import functional as F

from engine import ops
from engine.ops import _csr

Agree: TypeAlias = Callable[[tuple[Any, ...], Any, Any, float], None]

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}
"""How far contenders may be from the reference, by dtype of the inputs."""
OUTLIERS = 0.005
"""Share of rows that may differ where a choice is made among nearly equal neighbours."""
NEIGHBOURS = 30
ITERATIONS = 20
RADIUS = 0.6
PARTS = 6
"""Part banks of one size: of three parts, for the queries of either modality."""


@dataclass(frozen=True)
class Size:
    """Where the shapes of the cases come from."""

    name: str
    batch: int
    clusters: int
    vis: int
    ir: int
    width: int
    queries: int
    part_rows: int
    rankings: tuple[tuple[int, int, int], ...]  # queries, gallery, identities

    @property
    def instances(self) -> int:
        """Rows of a bank that holds every image."""
        return self.vis + self.ir

    @property
    def slow(self) -> bool:
        """Whether loops in Python over N x N matrices take minutes."""
        return self.vis > 5000


SIZES = {
    size.name: size
    for size in (
        Size("quick", 64, 50, 600, 400, 128, 200, 64, ((200, 100, 50),)),
        Size("regdb", 256, 206, 2060, 2060, 2048, 2060, 1296, ((2060, 2060, 206),)),
        Size("sysu", 256, 800, 22258, 11909, 2048, 4096, 1296, ((3803, 301, 96), (2060, 2060, 206))),
    )
}


def grown(count: int) -> Size:
    """A narrow data set of `count` visible images, for the growth of cost."""
    return Size(f"{count}", 256, 800, count, count // 2, 256, 1024, 1296, ((count, 301, 96),))


@dataclass(frozen=True)
class Case:
    """One use of an operator at one size.

    Attributes:
        op: name of the operator.
        form: which use of it.
        size: for the table.
        inputs: makes fresh arguments, the same ones at every call.
        call: runs the operator on them.
        flops, bytes: the least that must be computed and moved, of one of `steps`.
        also: other operators that `call` runs.
        peers: by name.
        agree: (inputs, expected, got, tolerance) raises AssertionError when a result is wrong.
        steps: iterations in a call; times are those of one.
        precise: whether `call` takes the operator's argument `precision`.
        goals: how many times faster than a peer the engine is to be, on a CPU.
        gpu_goal: milliseconds that a step may take on an H200.
        memory_goal: bytes that the engine may use beside inputs and outputs; with it, memory is always measured.
    """

    op: str
    form: str
    size: str
    inputs: Callable[[], tuple[Any, ...]]
    call: Callable[..., Any]
    flops: float
    bytes: float
    agree: Agree
    also: tuple[str, ...] = ()
    peers: dict[str, Peer] = field(default_factory=dict)
    steps: int = 1
    precise: bool = False
    goals: dict[str, float] = field(default_factory=dict)
    gpu_goal: float | None = None
    memory_goal: float | None = None


# Agreement with the reference


def close(_: tuple[Any, ...], expected: Any, got: Any, tolerance: float) -> None:
    """Every entry."""
    torch.testing.assert_close(got, expected, rtol=10 * tolerance, atol=tolerance, check_dtype=False)


def equal(_: tuple[Any, ...], expected: Tensor, got: Tensor, __: float) -> None:
    """Every entry, exactly."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0, check_dtype=False)


def centred(_: tuple[Any, ...], expected: Tensor, got: Tensor, tolerance: float) -> None:
    """Potentials, which may all be shifted by one number."""
    got, expected = got.flatten() - got.mean(), expected.flatten() - expected.mean()
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance, check_dtype=False)


def rows_equal(_: tuple[Any, ...], expected: Tensor, got: Tensor, __: float) -> None:
    """Nearly all rows, exactly."""
    assert got.shape == expected.shape, f"shape {tuple(got.shape)} instead of {tuple(expected.shape)}"
    wrong = (got != expected).flatten(1).any(dim=1) if got.dim() > 1 else got != expected
    few(wrong, "rows differ")


def rows_close(_: tuple[Any, ...], expected: tuple[Tensor, ...], got: tuple[Tensor, ...], tolerance: float) -> None:
    """Nearly all rows of each result."""
    for theirs, ours in zip(got, expected, strict=True):
        few((theirs - ours).abs().amax(dim=1) > tolerance, "rows differ")


def neighbours(
    inputs: tuple[Any, ...], expected: tuple[Tensor, Tensor], got: tuple[Tensor, Tensor], tolerance: float
) -> None:
    """k different rows of the bank, of which none is clearly less similar than the k-th of the reference."""
    queries, bank, _ = inputs
    values, indices = got
    ordered = indices.sort(dim=1).values
    assert (ordered[:, 1:] != ordered[:, :-1]).all(), "an index is there twice"
    true = torch.cat(
        [
            torch.einsum("bkd,bd->bk", bank[where].double(), rows.double())
            for rows, where in zip(queries.split(256), indices.split(256), strict=True)
        ]
    )
    # Inner products of unit rows are known to a tenth of what losses are.
    torch.testing.assert_close(values.double(), true, rtol=0, atol=tolerance / 10)
    assert (true >= expected[0][:, -1:].double() - tolerance / 10).all(), "a nearer neighbour is missing"


def sparse(_: tuple[Any, ...], expected: Tensor, got: Tensor, tolerance: float) -> None:
    """Nearly all entries of two CSR matrices, place and value."""
    keys, values = zip(entries(expected), entries(got), strict=True)
    every = torch.cat(keys).unique()
    dense = torch.full((2, len(every)), torch.inf, dtype=torch.float64, device=every.device)
    for row, key, value in zip(dense, keys, values, strict=True):
        row[torch.searchsorted(every, key)] = value.double()
    few(~((dense[0] - dense[1]).abs() <= tolerance), "entries differ")


def entries(csr: Tensor) -> tuple[Tensor, Tensor]:
    """Keys `row * N + column` and values."""
    rows = torch.arange(csr.shape[0], device=csr.device).repeat_interleave(csr.crow_indices().diff())
    return rows * csr.shape[1] + csr.col_indices(), csr.values()


def clustering(_: tuple[Any, ...], expected: Tensor, got: Tensor, __: float) -> None:
    """One partition but for what rounding moves across the radius; ids may move with it."""
    score = adjusted_rand_score(expected.cpu(), got.cpu())
    assert score > 1 - OUTLIERS, f"adjusted Rand index {score:.4f}"


def few(wrong: Tensor, what: str) -> None:
    share = float(wrong.double().mean()) if wrong.numel() else 0.0
    assert share <= OUTLIERS, f"{100 * share:.2f} % of {what}"


# Inputs


@dataclass(frozen=True)
class Maker:
    """Random tensors, the same for the same seed on any device."""

    dtype: torch.dtype
    device: str

    def unit_rows(self, count: int, width: int, seed: int) -> Tensor:
        """`[count, width]` unit rows in any direction."""
        return self.unit(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))

    def people(self, count: int, width: int) -> Tensor:
        """Unit rows as SYSU-MM01 has images: 56 of a person, of which 14 are by one camera and nearer to each other."""
        generator = torch.Generator().manual_seed(1)

        def directions(group: int) -> Tensor:
            rows = F.normalize(torch.randn(-(-count // group), width, generator=generator))
            return rows.repeat_interleave(group, dim=0)[:count]

        return self.unit(directions(56) + 0.5 * directions(14) + 0.7 * directions(1))

    def unit(self, rows: Tensor) -> Tensor:
        """Divided by their norms, as exactly as the dtype allows."""
        exact = rows.to(torch.promote_types(self.dtype, torch.float32))
        return self.place(F.normalize(exact))

    def uniform(self, *shape: int) -> Tensor:
        return self.place(torch.rand(shape, generator=torch.Generator().manual_seed(0)))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 in [low, high)."""
        return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1)).to(self.device)

    def place(self, rows: Tensor) -> Tensor:
        return rows.to(self.device, self.dtype)


def bytes_of(*tensors: Tensor) -> int:
    """Bytes of the content."""
    total = 0
    for tensor in tensors:
        if tensor.layout == torch.sparse_csr:
            total += bytes_of(tensor.crow_indices(), tensor.col_indices(), tensor.values())
        else:
            total += tensor.numel() * tensor.element_size()
    return total


# Contrastive losses and the memory


def cluster_contrast_cases(size: Size, make: Maker) -> Iterator[Case]:
    features = make.unit_rows(size.batch, size.width, 1)
    bank = make.unit_rows(size.clusters, size.width, 2)
    labels = make.integers(0, size.clusters, size.batch)
    shape = f"{size.batch} x {size.clusters} x {size.width}"
    # Logits, and as many products again for the gradient; features and bank read, gradient written.
    flops = 4 * size.batch * size.clusters * size.width
    moved = bytes_of(features, features, bank)
    yield Case(
        op="cluster_contrast",
        form="fwd + bwd",
        size=shape,
        inputs=lambda: (features, bank, labels, 0.05),
        call=partial(forward_and_backward, ops.cluster_contrast),
        flops=flops,
        bytes=moved,
        agree=close,
        peers={"torch eager": Peer(partial(forward_and_backward, peers.cluster_contrast), multiplies=True)},
        precise=True,
    )

    def step(
        loss: Callable[..., Tensor], update: Callable[..., Tensor], features: Tensor, bank: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        value, gradient = forward_and_backward(loss, features, bank, *rest)
        return value, gradient, update(bank, features, labels, 0.1)

    yield Case(
        op="cluster_contrast",
        form="fwd + bwd + update",
        size=shape,
        inputs=lambda: (features, bank.clone(), labels, 0.05),
        call=partial(step, ops.cluster_contrast, ops.memory_update_),
        flops=flops,
        bytes=moved + 2 * bytes_of(features),
        agree=close,
        also=("memory_update_",),
        peers={
            "torch + Python loop": Peer(partial(step, peers.cluster_contrast, peers.memory_update_), multiplies=True)
        },
        goals={"torch + Python loop": 4},
    )

    parts = [tensor.expand(PARTS, *tensor.shape).clone() for tensor in (features, bank)]
    each_labels = torch.stack([labels.roll(part) for part in range(PARTS)])

    def steps(
        loss: Callable[..., Tensor], update: Callable[..., Tensor], features: Tensor, bank: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        value, gradient = forward_and_backward(lambda *arguments: loss(*arguments).sum(), features, bank, *rest)
        return value, gradient, update(bank, features, each_labels, 0.1)

    yield Case(
        op="cluster_contrast",
        form=f"fwd + bwd + update of {PARTS} banks",
        size=shape,
        inputs=lambda: (parts[0], parts[1].clone(), each_labels, 0.05),
        call=partial(steps, ops.cluster_contrast, ops.memory_update_),
        flops=PARTS * flops,
        bytes=PARTS * (moved + 2 * bytes_of(features)),
        agree=close,
        also=("memory_update_",),
        peers={
            "torch + Python loop": Peer(partial(steps, peers.cluster_contrasts, peers.memory_updates_), multiplies=True)
        },
    )


def neighbor_contrast_cases(size: Size, make: Maker) -> Iterator[Case]:
    features = make.unit_rows(size.batch, size.width, 1)
    bank = make.unit_rows(size.instances, size.width, 2)
    positives = ops.topk(features, bank, 10)[1]
    yield Case(
        op="neighbor_contrast",
        form="fwd + bwd",
        size=f"{size.batch} x {size.instances} x {size.width}",
        inputs=lambda: (features, bank, positives, 0.05),
        call=partial(forward_and_backward, ops.neighbor_contrast),
        flops=4 * size.batch * size.instances * size.width,
        bytes=bytes_of(features, features, bank, positives),
        agree=close,
        peers={
            "torch eager": Peer(partial(forward_and_backward, peers.neighbor_contrast), multiplies=True),
            "torch.compile": Peer(
                partial(forward_and_backward, peers.compiled(peers.neighbor_contrast)), compiles=True, multiplies=True
            ),
        },
        precise=True,
        goals={"torch eager": 2.5},
        gpu_goal=0.25,
        memory_goal=size.batch * size.instances * 4 / 20,
    )


def soft_contrast_cases(size: Size, make: Maker) -> Iterator[Case]:
    features = make.unit_rows(size.batch, size.width, 1)
    bank = make.unit_rows(size.clusters, size.width, 2)
    weights = (features @ bank.T * 10).softmax(dim=1)
    yield Case(
        op="soft_contrast",
        form="fwd + bwd",
        size=f"{size.batch} x {size.clusters} x {size.width}",
        inputs=lambda: (features, bank, weights, 0.05),
        call=partial(forward_and_backward, ops.soft_contrast),
        flops=4 * size.batch * size.clusters * size.width,
        bytes=bytes_of(features, features, bank, weights),
        agree=close,
        peers={"torch eager": Peer(partial(forward_and_backward, peers.soft_contrast), multiplies=True)},
        precise=True,
    )


def memory_update_cases(size: Size, make: Maker) -> Iterator[Case]:
    bank = make.unit_rows(size.clusters, size.width, 1)
    features = make.unit_rows(size.batch, size.width, 2)
    labels = make.integers(0, size.clusters, size.batch)
    touched = len(labels.unique())
    yield Case(
        op="memory_update_",
        form="",
        size=f"{size.batch} x {size.clusters} x {size.width}",
        inputs=lambda: (bank.clone(), features, labels, 0.1),
        call=ops.memory_update_,
        flops=6 * size.batch * size.width,
        bytes=bytes_of(features) + 2 * bytes_of(bank[:touched]),
        agree=close,
        peers={"Python loop": Peer(peers.memory_update_)},
        goals={"Python loop": 80},
        gpu_goal=0.005,
    )


# Neighbours


def topk_cases(size: Size, make: Maker) -> Iterator[Case]:
    bank = make.unit_rows(size.vis, size.width, 1)
    everyone = {
        "faiss": Peer(peers.faiss_topk, package="faiss", dtypes=(torch.float32,), on_gpu=False),
        "faiss, AVX-512 BLAS": Peer(
            peers.faiss_topk,
            package="faiss",
            dtypes=(torch.float32,),
            on_gpu=False,
            environment={"OPENBLAS_CORETYPE": "SkylakeX"},
            instructions="AVX512",
        ),
        "faiss on the GPU": Peer(
            peers.faiss_gpu_topk,
            package="faiss",
            part="StandardGpuResources",
            dtypes=(torch.float32,),
            on_cpu=False,
        ),
        "cuML": Peer(peers.cuml_topk, package="cuml", dtypes=(torch.float32,), on_cpu=False),
        "torch chunked": Peer(peers.torch_topk, multiplies=True),
        "scikit-learn": Peer(peers.sklearn_topk, on_gpu=False),
    }
    yield Case(
        op="topk",
        form=f"self, k {NEIGHBOURS}",
        size=f"{size.vis} x {size.width}",
        inputs=lambda: (bank, bank, NEIGHBOURS),
        call=ops.topk,
        flops=size.vis * (size.vis + 1) * size.width,  # every pair once
        bytes=bytes_of(bank) + size.vis * NEIGHBOURS * (8 + bank.element_size()),
        agree=neighbours,
        peers=everyone,
        precise=True,
        goals={"faiss": 3.2, "torch chunked": 3.5, "scikit-learn": 6},
    )
    queries = make.unit_rows(size.queries, size.width, 2)
    yield Case(
        op="topk",
        form=f"rectangle, k {NEIGHBOURS}",
        size=f"{size.queries} x {size.vis} x {size.width}",
        inputs=lambda: (queries, bank, NEIGHBOURS),
        call=ops.topk,
        flops=2 * size.queries * size.vis * size.width,
        bytes=bytes_of(bank, queries) + size.queries * NEIGHBOURS * (8 + bank.element_size()),
        agree=neighbours,
        peers=everyone,
        precise=True,
        goals={"faiss": 1.7, "torch chunked": 2.3},
    )


def knn_intersection_cases(size: Size, make: Maker) -> Iterator[Case]:
    views = make.unit_rows(2 * size.batch, size.width, 1).view(2, size.batch, size.width)
    views = F.normalize(views + views[:1], dim=2)  # near each other
    bank = make.unit_rows(size.instances, size.width, 2)
    yield Case(
        op="knn_intersection",
        form=f"k {NEIGHBOURS}",
        size=f"2 x {size.batch} x {size.instances} x {size.width}",
        inputs=lambda: (views, bank, NEIGHBOURS),
        call=ops.knn_intersection,
        flops=4 * size.batch * size.instances * size.width,
        bytes=bytes_of(views, bank) + size.batch * NEIGHBOURS * 8,
        agree=rows_equal,
        also=("topk",),
        peers={"torch + Python sets": Peer(peers.knn_intersection, multiplies=True)},
        precise=True,
    )


def set_cases(name: str, operator: Callable[..., Tensor], size: Size, make: Maker) -> Iterator[Case]:
    sets = make.integers(-1, 1000, 2, size.part_rows, NEIGHBOURS)
    yield Case(
        op=name,
        form="",
        size=f"{size.part_rows} x {NEIGHBOURS} and {NEIGHBOURS}",
        inputs=lambda: (sets[0], sets[1]),
        call=operator,
        flops=0,
        bytes=bytes_of(sets, operator(sets[0], sets[1])),
        agree=equal,
        peers={"Python sets": Peer(getattr(peers, name))},
    )


# Graph features


def affinity_cases(size: Size, make: Maker) -> Iterator[Case]:
    queries = make.unit_rows(size.ir, size.width, 1)
    bank = make.unit_rows(size.vis, size.width, 2)
    yield Case(
        op="affinity",
        form=f"k {NEIGHBOURS}",
        size=f"{size.ir} x {size.vis} x {size.width}",
        inputs=lambda: (queries, bank, NEIGHBOURS),
        call=ops.affinity,
        flops=2 * size.ir * size.vis * size.width,
        bytes=bytes_of(queries, bank) + size.ir * NEIGHBOURS * (8 + 4),
        agree=sparse,
        also=("topk",),
        peers={"dense sort": Peer(peers.affinity, slow=size.slow, multiplies=True)},
        precise=True,
    )


def propagate_cases(size: Size, make: Maker) -> Iterator[Case]:
    features = make.unit_rows(size.vis, size.width, 2)
    csr = random_graph(size.ir, size.vis, make)
    yield Case(
        op="propagate",
        form=f"{NEIGHBOURS} a row",
        size=f"{size.ir} x {size.vis} x {size.width}",
        inputs=lambda: (csr, features),
        call=ops.propagate,
        flops=2 * size.ir * NEIGHBOURS * size.width,
        bytes=bytes_of(csr, features, features[:1].expand(size.ir, -1)),
        agree=close,
        peers={"dense product": Peer(peers.propagate)},
    )


def random_graph(rows: int, columns: int, make: Maker) -> Tensor:
    """CSR with rows of `NEIGHBOURS` equal weights."""
    stride = columns // NEIGHBOURS
    chosen = make.integers(0, stride, rows, NEIGHBOURS) + stride * torch.arange(NEIGHBOURS, device=make.device)
    starts = torch.arange(0, rows * NEIGHBOURS + 1, NEIGHBOURS, device=make.device)
    weights = torch.full((rows * NEIGHBOURS,), 1 / NEIGHBOURS, dtype=make.dtype, device=make.device)
    return _csr.from_starts(starts, chosen.flatten(), weights, columns)


def cmfp_cases(size: Size, make: Maker) -> Iterator[Case]:
    vis, ir = make.unit_rows(size.vis, size.width, 1), make.unit_rows(size.ir, size.width, 2)
    yield Case(
        op="cmfp",
        form=f"k {NEIGHBOURS}",
        size=f"({size.vis} + {size.ir}) x {size.width}",
        inputs=lambda: (vis, ir, NEIGHBOURS),
        call=ops.cmfp,
        # Every pair once, and two neighbourhoods summed a row.
        flops=size.instances * (size.instances + 1) * size.width + 4 * size.instances * NEIGHBOURS * size.width,
        bytes=2 * bytes_of(vis, ir),
        agree=rows_close,
        also=("affinity", "propagate", "topk"),
        peers={"dense sort + matmul": Peer(peers.cmfp, slow=size.slow, multiplies=True)},
        precise=True,
        goals={"dense sort + matmul": 15},
        memory_goal=size.vis * size.vis * 4 / 2,
    )


# Clustering


@contextmanager
def known_neighbours(indices: Tensor) -> Iterator[None]:
    """Inside, `ops.jaccard` is told its neighbours, which no argument of it can do, so that the rest is timed alone."""
    module = importlib.import_module("engine.ops.jaccard")
    with mock.patch.object(module, "topk", return_value=(None, indices)) as search:
        yield
    assert search.called, "engine.ops.jaccard finds its neighbours elsewhere"


def jaccard_cases(size: Size, make: Maker) -> Iterator[Case]:
    features = make.people(size.vis, size.width)
    indices = ops.topk(features, features, NEIGHBOURS)[1]
    shape = f"{size.vis} x {size.width}"
    pairs = size.vis * (size.vis + 1) * size.width

    def after(features: Tensor, indices: Tensor) -> Tensor:
        with known_neighbours(indices):
            return ops.jaccard(features, NEIGHBOURS)

    def both_after(features: Tensor, indices: Tensor, eps: float) -> Tensor:
        return ops.dbscan(after(features, indices), eps)

    def both(features: Tensor, eps: float) -> Tensor:
        return ops.dbscan(ops.jaccard(features, NEIGHBOURS), eps)

    distance = after(features, indices)
    yield Case(
        op="jaccard",
        form="after the k-NN",
        size=shape,
        inputs=lambda: (features, indices),
        call=after,
        flops=2 * size.vis * NEIGHBOURS * size.width,  # the products that the weights need
        bytes=bytes_of(features, indices, distance),
        agree=sparse,
        gpu_goal=2,
    )
    yield Case(
        op="jaccard",
        form="+ dbscan after the k-NN",
        size=shape,
        inputs=lambda: (features, indices, RADIUS),
        call=both_after,
        flops=2 * size.vis * NEIGHBOURS * size.width,
        bytes=bytes_of(features, indices),
        agree=clustering,
        also=("dbscan",),
        peers={"field's loops": Peer(peers.clusters_of_neighbours, on_gpu=False, slow=size.slow)},
        goals={"field's loops": 60},
    )
    yield Case(
        op="jaccard",
        form="+ dbscan with the k-NN",
        size=shape,
        inputs=lambda: (features, RADIUS),
        call=both,
        flops=pairs,
        bytes=bytes_of(features),
        agree=clustering,
        also=("dbscan", "topk"),
        peers={"field's loops": Peer(peers.clusters, on_gpu=False, slow=size.slow)},
        goals={"field's loops": 15},
        memory_goal=1e9,
    )


def dbscan_cases(size: Size, make: Maker) -> Iterator[Case]:
    distance = ops.jaccard(make.people(size.vis, size.width), NEIGHBOURS)
    yield Case(
        op="dbscan",
        form="",
        size=f"{size.vis}, {distance.values().numel()} entries",
        inputs=lambda: (distance, RADIUS),
        call=ops.dbscan,
        flops=0,
        bytes=bytes_of(distance) + 8 * size.vis,
        agree=equal,
        peers={"scikit-learn, sparse": Peer(peers.sklearn_dbscan, on_gpu=False)},
        gpu_goal=0.1,
    )


def segment_mean_cases(size: Size, make: Maker) -> Iterator[Case]:
    features = make.unit_rows(size.vis, size.width, 1)
    labels = torch.arange(size.vis, device=make.device) % size.clusters
    yield Case(
        op="segment_mean",
        form="",
        size=f"{size.vis} x {size.clusters} x {size.width}",
        inputs=lambda: (features, labels, size.clusters),
        call=ops.segment_mean,
        flops=size.vis * size.width,
        bytes=bytes_of(features, labels) + size.clusters * size.width * features.element_size(),
        agree=close,
        peers={"Python loop": Peer(peers.segment_mean)},
    )


# Optimal transport


def sinkhorn_cases(size: Size, make: Maker) -> Iterator[Case]:
    cost = 2 - 2 * make.unit_rows(size.ir, 64, 1) @ make.unit_rows(size.clusters, 64, 2).T
    yield Case(
        op="sinkhorn",
        form=f"an iteration of {ITERATIONS}",
        size=f"{size.ir} x {size.clusters}",
        inputs=lambda: (cost, 0.2, ITERATIONS),
        call=lambda cost, reg, iterations: ops.sinkhorn(cost, reg, max_iter=iterations, tol=0).log_v,
        flops=4 * size.ir * size.clusters,  # two sums of products with the kernel
        bytes=bytes_of(cost),
        agree=centred,
        peers={
            "torch linear": Peer(peers.linear_sinkhorn),
            "torch log": Peer(peers.log_sinkhorn),
            "POT": Peer(peers.pot_sinkhorn, package="ot", on_gpu=False),
            "GeomLoss": Peer(peers.geomloss_sinkhorn, package="geomloss", tolerance=0.02),
        },
        steps=ITERATIONS,
        goals={"torch linear": 4.5, "torch log": 50, "POT": 65},
        gpu_goal=0.014,
    )


def ot_assign_cases(size: Size, make: Maker) -> Iterator[Case]:
    features = make.unit_rows(size.ir, size.width, 1)
    prototypes = make.unit_rows(size.clusters, size.width, 2)
    yield Case(
        op="ot_assign",
        form=f"{ITERATIONS} iterations",
        size=f"{size.ir} x {size.clusters} x {size.width}",
        inputs=lambda: (features, prototypes, 0.2, ITERATIONS),
        call=lambda rows, centres, reg, count, **options: ops.ot_assign(
            rows, centres, reg, max_iter=count, tol=0, **options
        ),
        flops=2 * size.ir * size.clusters * (size.width + 2 * ITERATIONS),
        bytes=bytes_of(features, prototypes) + 8 * size.ir,
        agree=rows_equal,
        peers={"torch linear": Peer(peers.ot_assign, multiplies=True)},
        precise=True,
    )


# Evaluation


def rank_cases(size: Size, make: Maker) -> Iterator[Case]:
    def scores(*arguments: Tensor, protocol: str = "plain") -> Tensor:
        result = ops.rank(*arguments, protocol=protocol)
        return torch.cat([result.cmc, result.cmc.new_tensor([result.mAP, result.mINP])])

    for queries, gallery, identities in size.rankings:
        distance = make.uniform(queries, gallery)
        ids, cams = (make.integers(0, high, queries + gallery) for high in (identities, 9))
        inputs = (distance, ids[:queries], ids[queries:])
        plain = Case(
            op="rank",
            form="",
            size=f"{queries} x {gallery}",
            inputs=lambda inputs=inputs: inputs,
            call=scores,
            flops=0,
            bytes=bytes_of(*inputs),
            agree=close,
            peers={"field's Python": Peer(peers.rank, on_gpu=False)},
            goals={"field's Python": 50},
        )
        yield plain
        seen = (*inputs, cams[:queries], cams[queries:])
        yield replace(
            plain, form="llcm", inputs=lambda seen=seen: seen, call=partial(scores, protocol="llcm"), peers={}, goals={}
        )


CASES: dict[str, Callable[[Size, Maker], Iterator[Case]]] = {
    "affinity": affinity_cases,
    "cluster_contrast": cluster_contrast_cases,
    "cmfp": cmfp_cases,
    "dbscan": dbscan_cases,
    "jaccard": jaccard_cases,
    "knn_intersection": knn_intersection_cases,
    "memory_update_": memory_update_cases,
    "neighbor_contrast": neighbor_contrast_cases,
    "ot_assign": ot_assign_cases,
    "propagate": propagate_cases,
    "rank": rank_cases,
    "segment_mean": segment_mean_cases,
    "set_intersection": partial(set_cases, "set_intersection", ops.set_intersection),
    "set_union": partial(set_cases, "set_union", ops.set_union),
    "sinkhorn": sinkhorn_cases,
    "soft_contrast": soft_contrast_cases,
    "topk": topk_cases,
}
