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
