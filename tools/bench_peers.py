"""What others run instead of the operators: libraries of the `bench` extra, torch, and the field's loops.

Each function takes what the case of `bench_cases.py` takes and gives what the operator gives. The loops do, in our
words, what most releases of the field do. A library is imported when it is called, as it may not be there.
"""

from __future__ import annotations

import importlib
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from sklearn.cluster import DBSCAN
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional as F

Array: TypeAlias = npt.NDArray[Any]


@dataclass(frozen=True)
class Peer:
    """A way to get what an operator gives.

    Attributes:
        call: takes the arguments of the case.
        package: what it imports, when that may be missing.
        part: what that package must have, as not every build of it does.
        dtypes: of the inputs it can take. Half types are not among them: what others accumulate is then too coarse.
        on_gpu, on_cpu: where its tensors may be.
        multiplies: whether it is mostly products of matrices, which a GPU also has in TF32: there it runs both ways.
        slow: takes minutes at full size, so that it runs once, in a process of its own which gives its memory back.
        compiles: spends its first call on compiling.
        environment: variables that must be set before its library is loaded; it then runs in a process of its own.
        instructions: what the processor must have, as `torch.backends.cpu.get_cpu_capability` names it.
        tolerance: how far it may be from the reference, where it solves the problem by another road.
    """

    call: Callable[..., Any]
    package: str | None = None
    part: str | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    on_gpu: bool = True
    on_cpu: bool = True
    multiplies: bool = False
    slow: bool = False
    compiles: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    instructions: str | None = None
    tolerance: float | None = None

    def missing(self) -> str | None:
        """None when it can run here, else the reason."""
        if self.package and find_spec(self.package) is None:
            return "not installed (pip install -e .[bench])" if self.on_cpu else "not installed"
        if self.package and self.part and not hasattr(importlib.import_module(self.package), self.part):
            return f"installed without {self.part}"
        if self.compiles and not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
            return "no C++ compiler"
        if self.instructions not in (None, torch.backends.cpu.get_cpu_capability()):
            return f"no {self.instructions}"
        return None


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile(function)`, made at its first call: importing the compiler takes seconds."""
    make = cache(partial(torch.compile, function))
    return lambda *arguments: make()(*arguments)


# Contrastive losses and the memory


def forward_and_backward(
    loss: Callable[..., Tensor], features: Tensor, *rest: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """A training step's share of a loss: value and gradient."""
    features = features.detach().requires_grad_()
    value = loss(features, *rest, **options)
    value.backward()
    return value.detach(), features.grad


def cluster_contrast(features: Tensor, bank: Tensor, labels: Tensor, temperature: float) -> Tensor:
    return F.cross_entropy(features @ bank.T / temperature, labels)


def cluster_contrasts(features: Tensor, bank: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Of a batch of problems `[P, B, D]`, the sum of the losses."""
    logits = features @ bank.mT / temperature
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) * len(features)


def soft_contrast(features: Tensor, bank: Tensor, weights: Tensor, temperature: float) -> Tensor:
    return F.cross_entropy(features @ bank.T / temperature, weights)


def neighbor_contrast(features: Tensor, bank: Tensor, positives: Tensor, temperature: float) -> Tensor:
    """Both sums over the full logits."""
    logits = features @ bank.T / temperature
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, positives, True)
    return (logits.logsumexp(1) - logits.masked_fill(~mask, -torch.inf).logsumexp(1)).mean()


def memory_update_(bank: Tensor, features: Tensor, labels: Tensor, momentum: float) -> Tensor:
    """One row after the other."""
    for feature, label in zip(features, labels.tolist(), strict=True):
        bank[label] = momentum * bank[label] + (1 - momentum) * feature
        bank[label] /= bank[label].norm()
    return bank


def memory_updates_(bank: Tensor, features: Tensor, labels: Tensor, momentum: float) -> Tensor:
    """Of a batch of problems, one after the other."""
    for problem in zip(bank, features, labels, strict=True):
        memory_update_(*problem, momentum)
    return bank


# Neighbours


def torch_topk(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Chunked product and `torch.topk`."""
    chunks = [(chunk @ bank.T).topk(k, dim=1) for chunk in queries.split(512)]
    values, indices = zip(*chunks, strict=True)
    return torch.cat(values), torch.cat(indices)


def faiss_topk(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`faiss.knn`, with the threads that torch has."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    found = faiss.knn(queries.numpy(), bank.numpy(), k, metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


@cache
def faiss_resources() -> Any:
    """Streams and scratch memory of FAISS on the GPU, which it takes when they are made."""
    import faiss

    return faiss.StandardGpuResources()


def faiss_gpu_topk(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`faiss.knn_gpu` on CUDA tensors."""
    import faiss
    import faiss.contrib.torch_utils  # teaches FAISS to take tensors

    return faiss.knn_gpu(faiss_resources(), queries, bank, k, metric=faiss.METRIC_INNER_PRODUCT)


def cuml_topk(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Brute force by Euclidean distance, as with scikit-learn."""
    from cuml.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=k, algorithm="brute", output_type="cupy").fit(bank)
    distance, indices = (torch.as_tensor(found, device=queries.device) for found in search.kneighbors(queries))
    return 1 - distance**2 / 2, indices.long()


def sklearn_topk(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Brute force by Euclidean distance, which orders unit rows as the inner product does."""
    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank.numpy())
    distance, indices = search.kneighbors(queries.numpy())
    return torch.from_numpy(1 - distance**2 / 2), torch.from_numpy(indices)


def knn_intersection(views: Tensor, bank: Tensor, k: int) -> Tensor:
    """The neighbours of every view, then sets of Python."""
    found = [torch_topk(view, bank, k)[1].tolist() for view in views]
    shared = [sorted(set.intersection(*map(set, lists))) for lists in zip(*found, strict=True)]
    return padded(shared, k, views.device)


def set_intersection(a: Tensor, b: Tensor) -> Tensor:
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    return padded([sorted((set(x) & set(y)) - {-1}) for x, y in pairs], min(a.shape[1], b.shape[1]), a.device)


def set_union(a: Tensor, b: Tensor) -> Tensor:
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    return padded([sorted((set(x) | set(y)) - {-1}) for x, y in pairs], a.shape[1] + b.shape[1], a.device)


def padded(rows: list[list[int]], width: int, device: torch.device) -> Tensor:
    """Lists as one tensor, filled up with -1."""
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], device=device)


# Graph features


def dense_graph(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """The graph as a dense matrix, each row sorted whole to find its k largest."""
    similarity = queries @ bank.T
    order = similarity.argsort(dim=1, descending=True)[:, :k].clone()
    graph = torch.zeros_like(similarity).scatter_(1, order, similarity.gather(1, order).clamp_(min=0))
    graph /= graph.sum(dim=1, keepdim=True).clamp(min=torch.finfo(graph.dtype).tiny)
    return graph


def affinity(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    return dense_graph(queries, bank, k).to_sparse_csr()


def cmfp(vis: Tensor, ir: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Four dense graphs, one after the other, and dense products."""
    vis, ir = F.normalize(vis), F.normalize(ir)

    def spread(rows: Tensor) -> Tensor:
        return F.normalize(dense_graph(rows, vis, k) @ vis + dense_graph(rows, ir, k) @ ir)

    return spread(vis), spread(ir)


def propagate(csr: Tensor, features: Tensor) -> Tensor:
    """Dense, as the field has it."""
    return csr.to_dense() @ features


def segment_mean(features: Tensor, labels: Tensor, count: int) -> Tensor:
    """One cluster after the other."""
    return torch.stack([features[labels == label].mean(dim=0) for label in range(count)])


# Optimal transport


def linear_sinkhorn(cost: Tensor, reg: float, iterations: int) -> Tensor:
    """log v with the kernel kept, which is right where no entry of it underflows."""
    rows, columns = cost.shape
    kernel = (-cost / reg).exp()
    v = cost.new_full((columns,), 1 / columns)
    for _ in range(iterations - 1):
        u = 1 / rows / (kernel @ v)
        v = 1 / columns / (kernel.T @ u)
    return v.log()


def log_sinkhorn(cost: Tensor, reg: float, iterations: int) -> Tensor:
    """The same in the log domain."""
    rows, columns = cost.shape
    scaled = -cost / reg
    log_v = cost.new_full((columns,), -math.log(columns))
    for _ in range(iterations - 1):
        log_u = -math.log(rows) - (scaled + log_v).logsumexp(1, keepdim=True)
        log_v = -math.log(columns) - (scaled + log_u).logsumexp(0)
    return log_v


def pot_sinkhorn(cost: Tensor, reg: float, iterations: int) -> Tensor:
    """`sinkhorn_log` of POT, which begins with its columns: the transposed problem has our steps in our order."""
    from ot.bregman import sinkhorn_log

    matrix = np.ascontiguousarray(cost.numpy().T)
    found = sinkhorn_log([], [], matrix, reg, numItermax=iterations - 1, stopThr=0, log=True, warn=False)
    return torch.from_numpy(found[1]["log_u"])


def geomloss_sinkhorn(cost: Tensor, reg: float, iterations: int) -> Tensor:
    """`geomloss.ot.solve`, which lowers `reg` step by step and averages: near the same solution, not our iterates."""
    from geomloss import ot

    return ot.solve(cost, reg=reg, max_iter=iterations).potential_b / reg


def ot_assign(features: Tensor, prototypes: Tensor, reg: float, iterations: int) -> Tensor:
    """The linear iteration and the largest entry of each row of the plan."""
    cost = torch.cdist(features, prototypes).square()
    return (linear_sinkhorn(cost, reg, iterations) - cost / reg).argmax(dim=1)


# Clustering


def jaccard(features: Tensor, neighbours: Tensor, k1: int, k2: int) -> Array:
    """After the search for neighbours: a loop over the rows for each step, N x N matrices."""
    rows, rank = features.cpu().numpy(), neighbours.cpu().numpy()
    count = len(rows)

    def reciprocal(row: int, k: int) -> Array:
        forward = rank[row, :k]
        return forward[(rank[forward, :k] == row).any(axis=1)]

    near = [reciprocal(row, k1) for row in range(count)]
    half = [reciprocal(row, round(k1 / 2) + 1) for row in range(count)]
    single = np.zeros((count, count), dtype=rows.dtype)
    for row in range(count):
        sets = [half[other] for other in near[row]]
        joining = [members for members in sets if 3 * len(np.intersect1d(members, near[row])) > 2 * len(members)]
        members = np.unique(np.concatenate([near[row], *joining]))
        shares = np.exp(2 * rows[members] @ rows[row] - 2)
        single[row, members] = shares / shares.sum()
    weights = np.empty_like(single)
    for row in range(count):
        weights[row] = single[rank[row, :k2]].mean(axis=0)
    del single
    holders = [np.flatnonzero(weights[:, column]) for column in range(count)]
    distance = np.empty_like(weights)
    for row in range(count):
        shared = np.zeros(count, dtype=rows.dtype)
        for column in np.flatnonzero(weights[row]):
            others = holders[column]
            shared[others] += np.minimum(weights[row, column], weights[others, column])
        distance[row] = 1 - shared / (2 - shared)
    return distance.clip(min=0, out=distance)


def clusters_of_neighbours(features: Tensor, neighbours: Tensor, eps: float) -> Tensor:
    """`jaccard` and scikit-learn on the dense matrix."""
    distance = jaccard(features, neighbours, 30, 6)
    labels = DBSCAN(eps=eps, min_samples=4, metric="precomputed", n_jobs=torch.get_num_threads()).fit(distance).labels_
    return torch.from_numpy(labels).to(features.device)


def clusters(features: Tensor, eps: float) -> Tensor:
    """The search for neighbours as well."""
    return clusters_of_neighbours(features, torch_topk(features, features, 30)[1], eps)


def sklearn_dbscan(distance: Tensor, eps: float) -> Tensor:
    """scikit-learn on the sparse matrix."""
    from scipy.sparse import csr_matrix

    parts = (distance.values().numpy(), distance.col_indices().numpy(), distance.crow_indices().numpy())
    clustering = DBSCAN(eps=eps, min_samples=4, metric="precomputed").fit(csr_matrix(parts, shape=distance.shape))
    return torch.from_numpy(clustering.labels_)


# Evaluation


def rank(distance: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> Tensor:
    """A sort of all distances, then one query after the other: CMC to rank 20, mAP, mINP."""
    order = np.argsort(distance.numpy(), axis=1)
    matches = gallery_ids.numpy()[order] == query_ids.numpy()[:, None]
    curves, precisions, penalties = [], [], []
    for match in matches:
        if not match.any():
            continue
        hits = match.cumsum()
        curves.append((hits > 0)[:20])
        places = np.flatnonzero(match) + 1
        penalties.append(hits[-1] / places[-1])
        precision = np.asarray([count / place for place, count in enumerate(hits, 1)])
        precisions.append((precision * match).sum() / hits[-1])
    scores = np.mean(precisions), np.mean(penalties)
    return torch.from_numpy(np.concatenate([np.mean(curves, axis=0), scores]))
