"""How far the operators that multiply matrices are from exact, in each `precision` that they take.

    python tools/precision_errors.py [--device cuda] [--json FILE]

Every operator with the argument `precision` runs on unit rows of width 2048, as near each other as images of some people,
and is held against its reference in float64 on the same numbers. Beside `ieee` and `fast`, as the engine computes them on
this device, stands the reference in float32; on a CPU all precisions are float32. Three more columns are arithmetic done in
float64, on any device, and no measurement of it: the products of the reference with their factors rounded as tensor cores
need them, to TF32 and to bfloat16, and the sum of three products of TF32 parts that stands for one in float32.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # nothing has to be installed

import torch
from bench_cases import Maker
from gpu_check import errors_table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine import checkpoint, ops
from engine.ops import _csr, use_backend
from engine.ops._precision import PRECISIONS

Product = Callable[[Tensor, Tensor], Tensor]
TEMPERATURE = 0.05
NEIGHBOURS = 30
FAR = 1e-5
"""More than float32 moves an entry of a unit row, or a distance, by; another neighbour moves it further."""


# The arithmetic of tensor cores


def rounded(values: Tensor, bits: int) -> Tensor:
    """float64 to the nearest number of `bits` significant bits, the implied one included: Veltkamp's splitting."""
    scaled = values * (2 ** (53 - bits) + 1)
    return scaled - (scaled - values)


def of_rounded(bits: int) -> Product:
    return lambda left, right: rounded(left, bits) @ rounded(right, bits)


def of_parts(left: Tensor, right: Tensor) -> Tensor:
    """All but the product of the low parts, of high and low parts in TF32."""
    (left_high, left_low), (right_high, right_low) = map(parts, (left, right))
    return left_high @ right_high + (left_high @ right_low + left_low @ right_high)


def parts(values: Tensor) -> tuple[Tensor, Tensor]:
    high = rounded(values, TF32)
    return high, rounded(values - high, TF32)


TF32, BFLOAT16 = 11, 8
ROUNDINGS: dict[str, Product] = {
    "3 x TF32, emulated": of_parts,
    "TF32, emulated": of_rounded(TF32),
    "bfloat16, emulated": of_rounded(BFLOAT16),
}


class Rounding(TorchDispatchMode):
    """Inside the block a product of dense matrices is `product`."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if any(isinstance(value, Tensor) and value.layout != torch.strided for value in args):
            return func(*args, **options)
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            return self.product(*args)
        if func is torch.ops.aten.addmm.default:
            added, left, right = args
            return options.get("beta", 1) * added + options.get("alpha", 1) * self.product(left, right)
        return func(*args, **options)


# What is run


@dataclass(frozen=True)
class Sizes:
    """Of what the operators run on."""

    rows: int = 256
    clusters: int = 800
    instances: int = 4096
    images: int = 1024
    width: int = 2048


@dataclass(frozen=True)
class Result:
    """What an operator gave.

    Attributes:
        values: numbers, in an order that a choice among nearly equal ones does not move.
        gradient: of a loss.
        chosen: `[rows, ...]`, what was chosen for each row.
    """

    values: Tensor | None = None
    gradient: Tensor | None = None
    chosen: Tensor | None = None


@dataclass(frozen=True)
class Case:
    """An operator, its inputs in float32, and what to do with its function."""

    op: str
    size: str
    run: Callable[..., Result]
    inputs: tuple[Tensor, ...]


@dataclass(frozen=True)
class Row:
    """How far one way of computing is from float64.

    Attributes:
        computed: which way.
        values, gradient: the largest difference of an entry.
        rows: the share of rows that chose otherwise, or whose values are further away than `FAR`.
    """

    op: str
    size: str
    computed: str
    values: float | None
    gradient: float | None
    rows: float | None


def cases(sizes: Sizes, make: Maker) -> Iterator[Case]:
    people = make.people(sizes.instances + sizes.rows, sizes.width)
    people = people[torch.randperm(len(people), generator=torch.Generator().manual_seed(0)).to(people.device)]
    bank, rows = people.split((sizes.instances, sizes.rows))
    images = make.people(sizes.images, sizes.width)
    centres = make.unit(bank[: sizes.clusters] + bank[-sizes.clusters :])
    rows_by = f"{sizes.rows} x {{}} x {sizes.width}".format
    similar = rows @ bank.T
    labels = (rows @ centres.T).argmax(dim=1)
    yield Case("cluster_contrast", rows_by(len(centres)), loss, (rows, centres, labels))
    yield Case("neighbor_contrast", rows_by(len(bank)), loss, (rows, bank, similar.topk(10).indices))
    yield Case("soft_contrast", rows_by(len(centres)), loss, (rows, centres, (10 * rows @ centres.T).softmax(dim=1)))
    yield Case("topk", rows_by(len(bank)), nearest, (rows, bank))
    yield Case("knn_intersection", f"2 x {rows_by(len(bank))}", common, (torch.stack([rows, noisy(rows, make)]), bank))
    yield Case("affinity", rows_by(len(bank)), graph, (rows, bank))
    yield Case("cmfp", f"({len(images)} + {len(rows)}) x {sizes.width}", propagated, (images, rows))
    yield Case("jaccard", f"{len(images)} x {sizes.width}", distances, (images,))
    yield Case("ot_assign", f"{len(images)} x {len(centres)} x {sizes.width}", assigned, (images, centres))


def noisy(rows: Tensor, make: Maker) -> Tensor:
    """Other views of the same images."""
    return make.unit(rows + 0.3 * make.unit_rows(*rows.shape, seed=2))


def loss(function: Callable[..., Tensor], rows: Tensor, *rest: Tensor, **options: str) -> Result:
    leaf = rows.clone().requires_grad_()
    with torch.enable_grad():
        losses = function(leaf, *rest, TEMPERATURE, reduction="none", **options)
        (gradient,) = torch.autograd.grad(losses.sum(), leaf)
    return Result(losses.detach(), gradient)


def nearest(function: Callable[..., tuple[Tensor, Tensor]], rows: Tensor, bank: Tensor, **options: str) -> Result:
    values, indices = function(rows, bank, NEIGHBOURS, **options)
    return Result(values, chosen=indices.sort(dim=1).values)


def common(function: Callable[..., Tensor], views: Tensor, bank: Tensor, **options: str) -> Result:
    return Result(chosen=function(views, bank, NEIGHBOURS, **options))


def graph(function: Callable[..., Tensor], rows: Tensor, bank: Tensor, **options: str) -> Result:
    weights = function(rows, bank, NEIGHBOURS, **options).to_dense()
    return Result(weights.sort(dim=1).values, chosen=weights > 0)


def propagated(function: Callable[..., tuple[Tensor, Tensor]], vis: Tensor, ir: Tensor, **options: str) -> Result:
    return Result(torch.cat(function(vis, ir, NEIGHBOURS, **options)))


def distances(function: Callable[..., Tensor], rows: Tensor, **options: str) -> Result:
    """How much rows overlap: a distance that is not stored is 1."""
    found = function(rows, NEIGHBOURS, **options)
    overlap = _csr.from_starts(found.crow_indices(), found.col_indices(), 1 - found.values(), len(rows))
    return Result(overlap.to_dense())


def assigned(function: Callable[..., Tensor], rows: Tensor, centres: Tensor, **options: str) -> Result:
    return Result(chosen=function(rows, centres, TEMPERATURE, max_iter=50, tol=0.0, **options))


# How far it is from exact


def measured(case: Case) -> Iterator[Row]:
    """A row for every way of computing."""
    operator, reference = getattr(ops, case.op), importlib.import_module(f"engine.ops.{case.op}").reference
    double = tuple(value.double() if value.is_floating_point() else value for value in case.inputs)
    with use_backend("reference"):
        exact = case.run(reference, *double)
        yield compared(case, "reference, float32", exact, case.run(reference, *case.inputs))
    for precision in PRECISIONS:
        yield compared(case, precision, exact, case.run(operator, *case.inputs, precision=precision))
    for name, product in ROUNDINGS.items():
        with use_backend("reference"), Rounding(product):
            found = case.run(reference, *double)
        yield compared(case, name, exact, found)


def compared(case: Case, computed: str, exact: Result, found: Result) -> Row:
    values, gradient = (
        None if truth is None or other is None else (truth - other).abs()
        for truth, other in ((exact.values, found.values), (exact.gradient, found.gradient))
    )
    changed = None
    if exact.chosen is not None and found.chosen is not None:
        changed = exact.chosen != found.chosen
    elif values is not None and gradient is None:
        changed = values > FAR
    return Row(
        case.op,
        case.size,
        computed,
        None if values is None else float(values.max()),
        None if gradient is None else float(gradient.max()),
        None if changed is None else float(changed.view(len(changed), -1).any(dim=1).double().mean()),
    )


def parse(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON too")
    return parser.parse_args(given)


def main(given: list[str], sizes: Sizes | None = None) -> int:
    arguments = parse(given)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device")
        return 2
    rows: list[dict[str, Any]] = []
    for case in cases(sizes or Sizes(), Maker(torch.float32, arguments.device)):
        rows += map(asdict, measured(case))
        if arguments.json:
            checkpoint.write(arguments.json, (json.dumps(rows, indent=1) + "\n").encode())
    print(errors_table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
