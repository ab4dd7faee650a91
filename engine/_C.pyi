"""The native module, built from csrc/: addresses and sizes, nothing is checked here."""

def isa() -> str: ...
def memory_update_float32(
    bank: int,
    features: int,
    labels: int,
    momentum: int,
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
    bank_rows: int,
    batch: int,
    width: int,
    normalize: bool,
    threads: int,
) -> None: ...
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
