"""The native module, built from csrc/: addresses and sizes, nothing is checked here."""

from collections.abc import Sequence

def cmfp_float32(
    vis: int,
    vis_storage: int,
    ir: int,
    ir_storage: int,
    vis_count: int,
    ir_count: int,
    vis_first: int,
    new_vis_count: int,
    ir_first: int,
    new_ir_count: int,
    width: int,
    k: int,
    normalize: bool,
    new_vis: int,
    new_ir: int,
    threads: int,
) -> None: ...
def cmfp_float64(
    vis: int,
    vis_storage: int,
    ir: int,
    ir_storage: int,
    vis_count: int,
    ir_count: int,
    vis_first: int,
    new_vis_count: int,
    ir_first: int,
    new_ir_count: int,
    width: int,
    k: int,
    normalize: bool,
    new_vis: int,
    new_ir: int,
    threads: int,
) -> None: ...

class CudaError(RuntimeError): ...

def cuda_find_kernel(device: int, module: int, name: str) -> int: ...
def cuda_launch(
    device: int,
    kernel: int,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int,
    stream: int,
    cooperative: bool,
    arguments: Sequence[float],
) -> None: ...
def cuda_load_module(device: int, image: bytes) -> int: ...
def dbscan_float32(
    starts: int, columns: int, values: int, labels: int, count: int, eps: float, min_samples: int, threads: int
) -> None: ...
def dbscan_float64(
    starts: int, columns: int, values: int, labels: int, count: int, eps: float, min_samples: int, threads: int
) -> None: ...

class jaccard_float32:
    def __init__(
        self, features: int, neighbors: int, count: int, width: int, k1: int, half: int, k2: int, threads: int
    ) -> None: ...
    def entry_count(self) -> int: ...
    def write(self, starts: int, columns: int, values: int, threads: int) -> None: ...

class jaccard_float64:
    def __init__(
        self, features: int, neighbors: int, count: int, width: int, k1: int, half: int, k2: int, threads: int
    ) -> None: ...
    def entry_count(self) -> int: ...
    def write(self, starts: int, columns: int, values: int, threads: int) -> None: ...

def isa() -> str: ...
def knn_intersection(neighbors: int, views: int, rows: int, k: int, common: int, threads: int) -> None: ...
def memory_update_float32(
    bank: int,
    features: int,
    labels: int,
    momentum: int,
    shared_momentum: float,
    bank_rows: int,
    batch: int,
    width: int,
    normalize: bool,
    threads: int,
) -> None: ...
def memory_update_float64(
    bank: int,
    features: int,
    labels: int,
    momentum: int,
    shared_momentum: float,
    bank_rows: int,
    batch: int,
    width: int,
    normalize: bool,
    threads: int,
) -> None: ...
def neighbor_contrast_float32(
    features: int,
    bank: int,
    bank_storage: int,
    positives: int,
    batch: int,
    bank_count: int,
    set_size: int,
    width: int,
    temperature: float,
    losses: int,
    gradients: int,
    threads: int,
) -> None: ...
def neighbor_contrast_float64(
    features: int,
    bank: int,
    bank_storage: int,
    positives: int,
    batch: int,
    bank_count: int,
    set_size: int,
    width: int,
    temperature: float,
    losses: int,
    gradients: int,
    threads: int,
) -> None: ...
def propagate_float32(
    starts: int,
    columns: int,
    values: int,
    row_count: int,
    column_count: int,
    features: int,
    features_storage: int,
    width: int,
    target: int,
    threads: int,
) -> None: ...
def propagate_float64(
    starts: int,
    columns: int,
    values: int,
    row_count: int,
    column_count: int,
    features: int,
    features_storage: int,
    width: int,
    target: int,
    threads: int,
) -> None: ...
def rank_float32(
    distance: int,
    query_ids: int,
    gallery_ids: int,
    query_cams: int,
    gallery_cams: int,
    queries: int,
    gallery: int,
    protocol: int,
    before: int,
    precision: int,
    penalty: int,
    threads: int,
) -> None: ...
def rank_float64(
    distance: int,
    query_ids: int,
    gallery_ids: int,
    query_cams: int,
    gallery_cams: int,
    queries: int,
    gallery: int,
    protocol: int,
    before: int,
    precision: int,
    penalty: int,
    threads: int,
) -> None: ...
def segment_mean_float32(
    features: int,
    storage: int,
    labels: int,
    row_count: int,
    width: int,
    segments: int,
    means: int,
) -> None: ...
def segment_mean_float64(
    features: int,
    storage: int,
    labels: int,
    row_count: int,
    width: int,
    segments: int,
    means: int,
) -> None: ...
def set_intersection(a: int, b: int, rows: int, a_width: int, b_width: int, common: int, threads: int) -> None: ...
def set_union(a: int, b: int, rows: int, a_width: int, b_width: int, joined: int, threads: int) -> None: ...
def sinkhorn_float32(
    cost: int,
    log_a: int,
    log_b: int,
    problems: int,
    rows: int,
    columns: int,
    reg: float,
    relax: float,
    max_iter: int,
    tol: float,
    log_u: int,
    log_v: int,
    iterations: int,
    error: int,
    threads: int,
) -> None: ...
def sinkhorn_float64(
    cost: int,
    log_a: int,
    log_b: int,
    problems: int,
    rows: int,
    columns: int,
    reg: float,
    relax: float,
    max_iter: int,
    tol: float,
    log_u: int,
    log_v: int,
    iterations: int,
    error: int,
    threads: int,
) -> None: ...
def soft_contrast_float32(
    features: int,
    bank: int,
    bank_storage: int,
    weights: int,
    weights_storage: int,
    batch: int,
    bank_count: int,
    width: int,
    temperature: float,
    losses: int,
    gradients: int,
    threads: int,
) -> None: ...
def soft_contrast_float64(
    features: int,
    bank: int,
    bank_storage: int,
    weights: int,
    weights_storage: int,
    batch: int,
    bank_count: int,
    width: int,
    temperature: float,
    losses: int,
    gradients: int,
    threads: int,
) -> None: ...
def sources() -> str: ...
def topk_float32(
    queries: int,
    queries_storage: int,
    bank: int,
    bank_storage: int,
    query_count: int,
    bank_count: int,
    width: int,
    k: int,
    exclude_self: bool,
    values: int,
    indices: int,
    threads: int,
) -> None: ...
def topk_float64(
    queries: int,
    queries_storage: int,
    bank: int,
    bank_storage: int,
    query_count: int,
    bank_count: int,
    width: int,
    k: int,
    exclude_self: bool,
    values: int,
    indices: int,
    threads: int,
) -> None: ...
