"""Times the back ends of engine.ops against each other and against what the field runs.

    python tools/bench_kernels.py [--quick] [--op NAME ...] [--backend NAME ...] [--json FILE]

A contender is timed only after its result agreed with the reference. Calls of all contenders alternate, so that a
change of the machine's load meets all alike; a row gives the median and the quartiles.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from sklearn.cluster import DBSCAN
from torch import Tensor
from torch.nn import functional as F

from engine import info, ops

Array: TypeAlias = npt.NDArray[Any]

ROUNDS = 15
SECONDS_PER_SAMPLE = 0.02


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        size: for the table.
        inputs: makes fresh arguments, the same ones at every call.
        call: runs the operator on them.
        peers: by name, what others run instead, on the same arguments.
    """

    size: str
    inputs: Callable[[], tuple[Any, ...]]
    call: Callable[..., Any]
    peers: dict[str, Callable[..., Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender on one case."""

    op: str
    size: str
    contender: str
    median: float
    low: float
    high: float


def unit_rows(count: int, width: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """`[count, width]` random unit rows."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator)).to(device)


def integers(high: int, shape: tuple[int, ...], device: str, low: int = 0) -> Tensor:
    """Random int64 in [low, high)."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(1)).to(device)


def forward_and_backward(loss: Callable[..., Tensor], features: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """A training step's share of a loss: value and gradient."""
    features = features.detach().requires_grad_()
    value = loss(features, *rest)
    value.backward()
    return value.detach(), features.grad


def torch_cluster_contrast(features: Tensor, bank: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """What the field writes."""
    return F.cross_entropy(features @ bank.T / temperature, labels)


def torch_neighbor_contrast(features: Tensor, bank: Tensor, positives: Tensor, temperature: float) -> Tensor:
    """What the field writes: both sums over the full logits."""
    logits = features @ bank.T / temperature
    mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, positives, True)
    return (logits.logsumexp(1) - logits.masked_fill(~mask, -torch.inf).logsumexp(1)).mean()


def python_loop_update(bank: Tensor, features: Tensor, labels: Tensor, momentum: float) -> Tensor:
    """What the field writes: one row after the other."""
    for feature, label in zip(features, labels.tolist(), strict=True):
        bank[label] = momentum * bank[label] + (1 - momentum) * feature
        bank[label] /= bank[label].norm()
    return bank


def torch_topk(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Chunked product and `torch.topk`."""
    chunks = [(chunk @ bank.T).topk(k, dim=1) for chunk in queries.split(512)]
    values, indices = zip(*chunks, strict=True)
    return torch.cat(values), torch.cat(indices)


def torch_linear_sinkhorn(cost: Tensor, reg: float, iterations: int = 10) -> Tensor:
    """What the field writes, where no entry of the kernel underflows."""
    rows, columns = cost.shape
    kernel = (-cost / reg).exp()
    v = torch.full((columns,), 1 / columns, device=cost.device)
    for _ in range(iterations - 1):
        u = 1 / rows / (kernel @ v)
        v = 1 / columns / (kernel.T @ u)
    return v.log()


def torch_log_sinkhorn(cost: Tensor, reg: float, iterations: int = 10) -> Tensor:
    """The same in the log domain."""
    rows, columns = cost.shape
    scaled = -cost / reg
    log_v = torch.full((columns,), -math.log(columns), device=cost.device)
    for _ in range(iterations - 1):
        log_u = -math.log(rows) - (scaled + log_v).logsumexp(1, keepdim=True)
        log_v = -math.log(columns) - (scaled + log_u).logsumexp(0)
    return log_v


def python_rank(distance: Tensor, query_ids: Tensor, gallery_ids: Tensor) -> Tensor:
    """What the field writes: a sort of all distances, then one query after the other."""
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


def numpy_jaccard(features: Array, rank: Array, k1: int, k2: int) -> Array:
    """What the field writes, after the search for neighbours: a loop over the rows for each step, N x N matrices."""
    count = len(features)

    def reciprocal(row: int, k: int) -> Array:
        forward = rank[row, :k]
        return forward[(rank[forward, :k] == row).any(axis=1)]

    near = [reciprocal(row, k1) for row in range(count)]
    half = [reciprocal(row, round(k1 / 2) + 1) for row in range(count)]
    weights = np.zeros((count, count), dtype=np.float32)
    for row in range(count):
        sets = [half[other] for other in near[row]]
        joining = [members for members in sets if 3 * len(np.intersect1d(members, near[row])) > 2 * len(members)]
        members = np.unique(np.concatenate([near[row], *joining]))
        shares = np.exp(2 * features[members] @ features[row] - 2)
        weights[row, members] = shares / shares.sum()
    weights = np.stack([weights[rank[row, :k2]].mean(axis=0) for row in range(count)])
    holders = [np.flatnonzero(weights[:, column]) for column in range(count)]
    distance = np.zeros_like(weights)
    for row in range(count):
        shared = np.zeros(count, dtype=np.float32)
        for column in np.flatnonzero(weights[row]):
            others = holders[column]
            shared[others] += np.minimum(weights[row, column], weights[others, column])
        distance[row] = 1 - shared / (2 - shared)
    return distance.clip(min=0)


def numpy_clusters(features: Tensor) -> Tensor:
    """What the field runs to cluster: `numpy_jaccard` and scikit-learn on the dense matrix."""
    rows, rank = features.cpu().numpy(), torch_topk(features, features, 30)[1].cpu().numpy()
    distance = numpy_jaccard(rows, rank, 30, 6)
    labels = DBSCAN(eps=0.6, min_samples=4, metric="precomputed", n_jobs=-1).fit(distance).labels_
    return torch.from_numpy(labels).to(features.device)


def batch_size(quick: bool) -> tuple[int, int, int, int]:
    """Rows of a batch, clusters, rows of an instance bank, width."""
    return (64, 50, 1000, 256) if quick else (256, 800, 34167, 2048)


def data_size(quick: bool) -> tuple[int, int, int]:
    """Visible rows, infrared rows, width."""
    return (600, 400, 128) if quick else (4096, 2048, 2048)


def cluster_contrast_cases(quick: bool, device: str) -> Iterator[Case]:
    batch, clusters, _, width = batch_size(quick)
    arguments = (
        unit_rows(batch, width, 1, device),
        unit_rows(clusters, width, 2, device),
        integers(clusters, (batch,), device),
        0.05,
    )
    yield Case(
        f"{batch} x {clusters} x {width} fwd+bwd",
        lambda: arguments,
        partial(forward_and_backward, ops.cluster_contrast),
        {"torch eager": partial(forward_and_backward, torch_cluster_contrast)},
    )


def neighbor_contrast_cases(quick: bool, device: str) -> Iterator[Case]:
    batch, _, instances, width = batch_size(quick)
    features, bank = unit_rows(batch, width, 1, device), unit_rows(instances, width, 2, device)
    positives = ops.topk(features, bank, 10)[1]
    yield Case(
        f"{batch} x {instances} x {width} fwd+bwd",
        lambda: (features, bank, positives, 0.05),
        partial(forward_and_backward, ops.neighbor_contrast),
        {"torch eager": partial(forward_and_backward, torch_neighbor_contrast)},
    )


def soft_contrast_cases(quick: bool, device: str) -> Iterator[Case]:
    batch, clusters, _, width = batch_size(quick)
    features, bank = unit_rows(batch, width, 1, device), unit_rows(clusters, width, 2, device)
    weights = (features @ bank.T * 10).softmax(dim=1)
    yield Case(
        f"{batch} x {clusters} x {width} fwd+bwd",
        lambda: (features, bank, weights, 0.05),
        partial(forward_and_backward, ops.soft_contrast),
    )


def memory_update_cases(quick: bool, device: str) -> Iterator[Case]:
    batch, clusters, _, width = batch_size(quick)
    bank, features = unit_rows(clusters, width, 1, device), unit_rows(batch, width, 2, device)
    labels = integers(clusters, (batch,), device)
    yield Case(
        f"{batch} x {clusters} x {width}",
        lambda: (bank.clone(), features, labels, 0.1),
        ops.memory_update_,
        {"python loop": python_loop_update},
    )


def topk_cases(quick: bool, device: str) -> Iterator[Case]:
    rows, _, width = data_size(quick)
    bank = unit_rows(rows, width, 1, device)
    yield Case(f"{rows} x {rows} x {width}, k 30", lambda: (bank, bank, 30), ops.topk, {"torch chunked": torch_topk})


def knn_intersection_cases(quick: bool, device: str) -> Iterator[Case]:
    batch, _, instances, width = batch_size(quick)
    views = unit_rows(2 * batch, width, 1, device).view(2, batch, width)
    bank = unit_rows(instances, width, 2, device)
    yield Case(f"2 x {batch} x {instances} x {width}, k 30", lambda: (views, bank, 30), ops.knn_intersection)


def set_cases(operator: Callable[..., Tensor], quick: bool, device: str) -> Iterator[Case]:
    batch = 64 if quick else 1296
    sets = integers(1000, (2, batch, 30), device, low=-1)
    yield Case(f"{batch} x 30 and 30", lambda: (sets[0], sets[1]), operator)


def affinity_cases(quick: bool, device: str) -> Iterator[Case]:
    rows, others, width = data_size(quick)
    queries, bank = unit_rows(rows, width, 1, device), unit_rows(others, width, 2, device)
    yield Case(f"{rows} x {others} x {width}, k 30", lambda: (queries, bank, 30), ops.affinity)


def propagate_cases(quick: bool, device: str) -> Iterator[Case]:
    rows, others, width = data_size(quick)
    features = unit_rows(others, width, 2, device)
    csr = ops.affinity(unit_rows(rows, width, 1, device), features, 30)
    yield Case(f"{rows} x {others} x {width}, k 30", lambda: (csr, features), ops.propagate)


def cmfp_cases(quick: bool, device: str) -> Iterator[Case]:
    rows, others, width = data_size(quick)
    vis, ir = unit_rows(rows, width, 1, device), unit_rows(others, width, 2, device)
    yield Case(f"{rows} + {others} x {width}, k 30", lambda: (vis, ir, 30), ops.cmfp)


def jaccard_cases(quick: bool, device: str) -> Iterator[Case]:
    rows, _, width = data_size(quick)
    features = people(rows, width, device)
    yield Case(f"{rows} x {width}", lambda: (features,), ops.jaccard)


def dbscan_cases(quick: bool, device: str) -> Iterator[Case]:
    rows, _, width = data_size(quick)
    distance = ops.jaccard(people(rows, width, device))
    yield Case(f"{rows}, {distance.values().numel()} entries", lambda: (distance, 0.6), ops.dbscan)
    fewer = people(min(rows, 2048), width, device)
    yield Case(
        f"{len(fewer)} x {width} with jaccard",
        lambda: (fewer,),
        lambda features: ops.dbscan(ops.jaccard(features), 0.6),
        {"numpy loops": numpy_clusters},
    )


def segment_mean_cases(quick: bool, device: str) -> Iterator[Case]:
    rows, _, width = data_size(quick)
    features, labels = unit_rows(rows, width, 1, device), integers(100, (rows,), device, low=-1)
    yield Case(f"{rows} x {width}, 100 segments", lambda: (features, labels, 100), ops.segment_mean)


def sinkhorn_cases(quick: bool, device: str) -> Iterator[Case]:
    rows, clusters = (400, 50) if quick else (11909, 800)
    cost = 2 - 2 * unit_rows(rows, 64, 1, device) @ unit_rows(clusters, 64, 2, device).T
    yield Case(
        f"{rows} x {clusters}, 10 iterations",
        lambda: (cost, 0.2),
        lambda cost, reg: ops.sinkhorn(cost, reg, max_iter=10, tol=0).log_v,
        {"torch linear": torch_linear_sinkhorn, "torch log": torch_log_sinkhorn},
    )


def ot_assign_cases(quick: bool, device: str) -> Iterator[Case]:
    rows, clusters, width = (400, 50, 64) if quick else (11909, 800, 2048)
    features, prototypes = unit_rows(rows, width, 1, device), unit_rows(clusters, width, 2, device)
    yield Case(f"{rows} x {clusters} x {width}", lambda: (features, prototypes, 0.2), ops.ot_assign)


def rank_cases(quick: bool, device: str) -> Iterator[Case]:
    def scores(*arguments: Tensor) -> Tensor:
        result = ops.rank(*arguments)
        return torch.cat([result.cmc, result.cmc.new_tensor([result.mAP, result.mINP])])

    peers = {"field's Python": python_rank} if device == "cpu" else {}
    for queries, gallery, identities in [(200, 100, 50)] if quick else [(3803, 301, 96), (2060, 2060, 206)]:
        distance = torch.rand(queries, gallery, generator=torch.Generator().manual_seed(0)).to(device)
        ids = integers(identities, (queries + gallery,), device)
        inputs = (distance, ids[:queries], ids[queries:])
        yield Case(f"{queries} x {gallery}", lambda inputs=inputs: inputs, scores, peers)


def people(count: int, width: int, device: str) -> Tensor:
    """Unit rows in groups of sixteen, as features of people are."""
    centres = unit_rows(-(-count // 16), width, 1, device).repeat_interleave(16, dim=0)[:count]
    return F.normalize(centres + 0.7 * unit_rows(count, width, 2, device))


CASES: dict[str, Callable[[bool, str], Iterator[Case]]] = {
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
    "set_intersection": partial(set_cases, ops.set_intersection),
    "set_union": partial(set_cases, ops.set_union),
    "sinkhorn": sinkhorn_cases,
    "soft_contrast": soft_contrast_cases,
    "topk": topk_cases,
}


def contenders(op: str, case: Case, wanted: list[str] | None, device: str) -> dict[str, Callable[..., Any]]:
    """By name: every back end of `op` that runs on the device, the reference first, then the peers."""
    names = ["reference", "cpu"] if device == "cpu" else ["reference", "triton", "cuda"]
    runnable = [name for name in names if ops.backends(op)[name] is None and (wanted is None or name in wanted)]
    return {name: partial(on_backend, name, case.call) for name in runnable} | case.peers


def on_backend(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
    with ops.use_backend(name):
        return call(*arguments)


def check(op: str, case: Case, calls: dict[str, Callable[..., Any]]) -> None:
    """Every contender gives what the reference gives, or the benchmark ends."""
    expected = on_backend("reference", case.call, *case.inputs())
    for name, call in calls.items():
        try:
            torch.testing.assert_close(call(*case.inputs()), expected, rtol=1e-3, atol=1e-4)
        except AssertionError as error:
            sys.exit(f"{op}, {case.size}: {name} is wrong, so nothing is timed\n{error}")


def measure(op: str, case: Case, calls: dict[str, Callable[..., Any]], device: str, rounds: int) -> list[Timing]:
    """Alternate the contenders for some rounds; each sample is the mean of as many calls as fill a few milliseconds."""
    inputs = {name: case.inputs() for name in calls}
    repeats = {
        name: max(1, int(SECONDS_PER_SAMPLE / sample(call, inputs[name], 1, device))) for name, call in calls.items()
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(1e3 * sample(call, inputs[name], repeats[name], device))
    return [Timing(op, case.size, name, *spread(values)) for name, values in samples.items()]


def sample(call: Callable[..., Any], arguments: tuple[Any, ...], repeats: int, device: str) -> float:
    """Mean seconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call(*arguments)
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def header(device: str) -> dict[str, str]:
    """What a reader needs to judge the numbers."""
    machine = info.cpu_name() if device == "cpu" else torch.cuda.get_device_name()
    return {
        "machine": machine,
        "commit": info.commit() or "unknown",
        "threads": str(torch.get_num_threads()),
        **info.versions(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: does it run and agree?")
    parser.add_argument("--op", nargs="+", choices=sorted(CASES), default=sorted(CASES), metavar="NAME")
    parser.add_argument("--backend", nargs="+", choices=("reference", "cpu", "triton", "cuda"), metavar="NAME")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, help="write header and timings to this file")
    arguments = parser.parse_args()

    facts = header(arguments.device)
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n", end="\n\n")
    print(f"{'operator':<18}{'size':<32}{'contender':<15}{'median ms':>10}  {'quartiles':<20}{'x reference':>11}")
    timings: list[Timing] = []
    for op in arguments.op:
        for case in CASES[op](arguments.quick, arguments.device):
            calls = contenders(op, case, arguments.backend, arguments.device)
            check(op, case, calls)
            rows = measure(op, case, calls, arguments.device, 3 if arguments.quick else ROUNDS)
            report(rows)
            timings += rows
    if arguments.json:
        arguments.json.write_text(json.dumps({"header": facts, "timings": [asdict(row) for row in timings]}, indent=1))


def report(rows: list[Timing]) -> None:
    """One line per contender, with its speed over the reference."""
    reference = next((row.median for row in rows if row.contender == "reference"), None)
    for row in rows:
        ratio = f"{reference / row.median:.2f}" if reference else "-"
        quartiles = f"{row.low:.3f} - {row.high:.3f}"
        print(f"{row.op:<18}{row.size:<32}{row.contender:<15}{row.median:>10.3f}  {quartiles:<20}{ratio:>11}")


if __name__ == "__main__":
    main()
