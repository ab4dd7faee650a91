"""How `bench_kernels.py` checks, times and weighs the contenders of a case.

A contender is timed only after its result agreed with the reference. Calls of all contenders alternate, so that a change
of the machine's load meets all alike. What takes minutes runs once, in a process of its own; so does what needs its
memory measured, as only a process that has done nothing else can tell.

On a GPU, events on the stream take the time, the second-level cache is emptied before each call, and torch's allocator
tells the memory. torch multiplies in float32; who may use TF32 has it in the name ("TF32", of the engine "fast").
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from bench_cases import CASES, SIZES, TOLERANCE, Case, Maker, Size, bytes_of
from bench_peers import Peer
from torch import Tensor

from engine import ops
from engine.ops._backend import ORDER
from engine.ops._precision import products

AUTOMATIC = "automatic"
"""The engine's own choice, where an operator without a back end of its own is made of others that have one."""
PATIENCE = 20.0
"""Seconds of a first call beyond which it is the only one."""
SECONDS_PER_SAMPLE = 0.02
ROUNDS = 15
MOST_REPEATS_ON_A_GPU = 50
"""Calls of a sample, between which emptying the cache takes longer than many a call."""
FAST_TOLERANCE = 5e-3
"""How far products in TF32 may be from the reference; unit rows of 2048 are 6e-5 off, logits at 0.05 twenty times that."""


@dataclass(frozen=True)
class Row:
    """One contender on one case.

    Attributes:
        op, form, size: as in the case.
        dtype: of its inputs.
        contender: a back end of the engine or a peer.
        ours: whether it is the back end that the engine picks by itself.
        missing: why it did not run, then without what follows.
        samples: calls, or groups of short ones, that the times are of.
        apart: whether it ran in a process of its own, so not in turn with the others.
        median, low, high: milliseconds, with the quartiles.
        gflops, gbytes: counted work over the median, in 1e9 a second.
        ceiling: the time that counted work takes at the measured rates of torch.mm and of a copy, over the median.
        memory: most bytes in use during the call, less what was before and what it returns; None if not measured.
        speedup: its median over that of the engine.
        goal: what `speedup` is to be.
        memory_goal: what `memory` is to be at most.
        time_goal: what `median` is to be at most.
        failed: whether it is missing as it was wrong or broke off.
    """

    op: str
    form: str
    size: str
    dtype: str
    contender: str
    ours: bool = False
    missing: str | None = None
    samples: int = 0
    apart: bool = False
    median: float | None = None
    low: float | None = None
    high: float | None = None
    gflops: float | None = None
    gbytes: float | None = None
    ceiling: float | None = None
    memory: int | None = None
    speedup: float | None = None
    goal: float | None = None
    memory_goal: float | None = None
    time_goal: float | None = None
    failed: bool = False


@dataclass(frozen=True)
class Settings:
    """What a run of the benchmark is asked for.

    Attributes:
        backends: names to run, None = all.
        peers: whether they run.
        budget: seconds that the rounds of one case may take.
        memory: whether every contender's memory is measured, not only where the case states a goal.
        keep_going: whether a contender that is wrong or fails is left out, and its row says so, instead of ending it all.
    """

    size: Size
    device: str
    dtype: torch.dtype
    threads: int
    backends: tuple[str, ...] | None = None
    peers: bool = True
    budget: float = 20.0
    memory: bool = False
    keep_going: bool = False

    @property
    def make(self) -> Maker:
        return Maker(self.dtype, self.device)

    def weighs(self, case: Case) -> bool:
        """Whether memory is measured unasked: of the engine's choice and of the peers, where a goal speaks of it."""
        return case.memory_goal is not None and self.size.name != "quick"


@dataclass(frozen=True)
class Contender:
    """Something that runs a case: a back end of the engine, or a peer."""

    name: str
    call: Callable[..., Any]
    peer: Peer | None = None
    fast: bool = False

    @property
    def apart(self) -> bool:
        return self.peer is not None and (self.peer.slow or bool(self.peer.environment))

    def tolerance(self, dtype: torch.dtype) -> float:
        if self.fast:
            return max(FAST_TOLERANCE, TOLERANCE[dtype])
        return self.peer.tolerance if self.peer and self.peer.tolerance else TOLERANCE[dtype]


@dataclass(frozen=True)
class Ceiling:
    """Rates of this machine in this run, 1e9 a second: `torch.mm` of two large float32 matrices, and a copy.

    Attributes:
        tf32_gflops: on a GPU, of the same product in TF32.
    """

    gflops: float
    gbytes: float
    tf32_gflops: float | None = None

    @property
    def fastest(self) -> float:
        """Products that are as good as float32 can be made of those in TF32, so no other rate bounds them."""
        return max(self.gflops, self.tf32_gflops or 0.0)


def measure_ceiling(device: str, side: int = 4096) -> Ceiling:
    """The best of a few calls each."""
    left, right = torch.rand(2, side, side, device=device)
    precisions = ("ieee",) if device == "cpu" else ("ieee", "fast")
    rates = []
    for precision in precisions:
        with products(torch.device(device), precision):
            rates.append(2e-9 * side**3 / best_of(lambda: left @ right, device))
    source = torch.rand(1 << 26, device=device)
    target = torch.empty_like(source)
    copy = best_of(lambda: target.copy_(source), device)
    return Ceiling(rates[0], 2e-9 * bytes_of(source) / copy, *rates[1:])


def best_of(call: Callable[[], Any], device: str, count: int = 6) -> float:
    return min(sample(call, (), 1, device) for _ in range(count))


# Contenders


def engine_backends(case: Case, settings: Settings) -> list[str]:
    """The back ends that run all operators of a case, the engine's own choice first, the reference last."""
    operators = (case.op, *case.also)
    order = ORDER[torch.device(settings.device).type]
    able = [name for name in order if all(ops.backends(op)[name] is None for op in operators)]
    first = [] if all(own_choice(op, order) == able[0] for op in operators) else [AUTOMATIC]
    return [name for name in first + able if settings.backends is None or name in settings.backends]


def own_choice(op: str, order: tuple[str, ...]) -> str:
    return next(name for name in order if ops.backends(op)[name] is None)


def contenders(case: Case, settings: Settings) -> list[Contender]:
    """What runs here, the back ends first."""
    names = engine_backends(case, settings)
    found = [Contender(name, partial(on_backend, name, case.call)) for name in names]
    if settings.device != "cpu" and settings.dtype != torch.float64 and case.precise:
        fast = partial(case.call, precision="fast")
        found += [
            Contender(f"{name}, fast", partial(on_backend, name, fast), fast=True)
            for name in names
            if name != "reference"
        ]
    return found + [
        Contender(name, peer.call, peer) for name, peer in peers_of(case, settings).items() if peer.missing() is None
    ]


def peers_of(case: Case, settings: Settings) -> dict[str, Peer]:
    """The peers that these inputs suit, installed or not."""
    if not settings.peers:
        return {}
    on_gpu = settings.device != "cpu"
    found = {
        name: peer
        for name, peer in case.peers.items()
        if settings.dtype in peer.dtypes and (peer.on_gpu if on_gpu else peer.on_cpu)
    }
    if on_gpu:  # what takes minutes on a CPU does not
        found = {name: replace(peer, slow=False) for name, peer in found.items()}
    if on_gpu and settings.dtype == torch.float32:
        for name, peer in list(found.items()):
            if peer.multiplies:
                tolerance = max(FAST_TOLERANCE, peer.tolerance or 0.0)
                found[f"{name}, TF32"] = replace(peer, call=partial(in_tf32, peer.call), tolerance=tolerance)
    return found


def in_tf32(call: Callable[..., Any], *arguments: Any) -> Any:
    with products(torch.device("cuda"), "fast"):
        return call(*arguments)


def on_backend(name: str, call: Callable[..., Any], *arguments: Any) -> Any:
    with nullcontext() if name == AUTOMATIC else ops.use_backend(name):
        return call(*arguments)


# One case


def run_case(case: Case, index: int, settings: Settings, ceiling: Ceiling) -> list[Row]:
    """Check, time and weigh all contenders of the `index`-th case of its operator.

    Raises:
        AssertionError: a contender is wrong, and the settings are not to keep going.
    """
    found = contenders(case, settings)
    failures: dict[str, str] = {}
    times, expected = gate(case, [contender for contender in found if not contender.apart], settings, failures)
    memory: dict[str, int | None] = {}
    for contender in found:
        if contender.name in failures:
            continue
        chosen = contender is found[0] or contender.peer is not None
        with failing(contender, settings, failures):
            if contender.apart or (
                settings.device == "cpu" and (settings.memory or (settings.weighs(case) and chosen))
            ):
                seconds, memory[contender.name], result = apart(case, index, contender, settings)
                if contender.apart:
                    agree(case, contender, settings, expected, result)
                    times[contender.name] = seconds
            elif settings.device != "cpu":  # whose memory is known without a process of its own
                memory[contender.name] = weigh(contender.call, case.inputs(), settings.device)[1]
    left = [contender for contender in found if contender.name not in failures]
    times |= alternate(case, [contender for contender in left if not times[contender.name]], settings)
    return rows(case, found, times, memory, settings, ceiling, failures)


@contextmanager
def failing(contender: Contender, settings: Settings, failures: dict[str, str]) -> Iterator[None]:
    """Where the settings are to keep going, what fails inside the block is written down instead of raised."""
    try:
        yield
    except Exception as error:
        if not settings.keep_going:
            raise
        failures[contender.name] = described(error)


def described(error: Exception) -> str:
    """In one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def gate(
    case: Case, found: list[Contender], settings: Settings, failures: dict[str, str] | None = None
) -> tuple[dict[str, list[float]], Any]:
    """Every contender once: the seconds of those that are too slow for another call, and the reference's result."""
    reference = Contender("reference", partial(on_backend, "reference", case.call))
    ordered = [reference, *(contender for contender in found if contender.name != "reference")]
    times: dict[str, list[float]] = {}
    expected = None
    for contender in ordered:
        with failing(contender, settings, {} if failures is None else failures):
            seconds, result = timed(contender.call, case.inputs(), settings.device)
            compiles = contender.peer is not None and contender.peer.compiles
            times[contender.name] = [seconds] if seconds > PATIENCE and not compiles else []
            if contender is reference:
                expected = result
            agree(case, contender, settings, expected, result)
    return times, expected


def agree(case: Case, contender: Contender, settings: Settings, expected: Any, result: Any) -> None:
    try:
        case.agree(case.inputs(), expected, result, contender.tolerance(settings.dtype))
    except AssertionError as error:
        what = f"{case.op} {case.form}, {case.size}: {contender.name}"
        raise AssertionError(f"{what} is wrong, so nothing is timed\n{error}") from None


def alternate(case: Case, found: list[Contender], settings: Settings) -> dict[str, list[float]]:
    """Seconds of a call: samples of all contenders in turn, each the mean of as many calls as fill some milliseconds.

    A contender gets as many as its share of the budget pays for, spread evenly over the rounds; where that is none, its
    first call counts.
    """
    inputs = {c.name: case.inputs() for c in found}
    first = {c.name: sample(c.call, inputs[c.name], 1, settings.device) for c in found}
    most = MOST_REPEATS_ON_A_GPU if settings.device != "cpu" else sys.maxsize
    repeats = {name: min(most, max(1, int(SECONDS_PER_SAMPLE / seconds))) for name, seconds in first.items()}
    share = settings.budget / max(1, len(found))
    counts = {name: min(ROUNDS, int(share / (first[name] * repeats[name]))) for name in first}
    times: dict[str, list[float]] = {name: [] if counts[name] else [first[name]] for name in first}
    rounds = max(counts.values(), default=0)
    for turn, contender in product(range(rounds), found):
        name = contender.name
        if (turn + 1) * counts[name] // rounds > turn * counts[name] // rounds:
            times[name].append(sample(contender.call, inputs[name], repeats[name], settings.device))
    return times


def sample(call: Callable[..., Any], arguments: tuple[Any, ...], repeats: int, device: str) -> float:
    """Mean seconds of one call."""
    if device != "cpu":
        return sample_on_gpu(call, arguments, repeats)
    start = time.perf_counter()
    for _ in range(repeats):
        call(*arguments)
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def sample_on_gpu(call: Callable[..., Any], arguments: tuple[Any, ...], repeats: int) -> float:
    """By events around each call. While the cache is emptied the host runs ahead, so that short launches do not show."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        cache_filler().zero_()
        begin.record()
        call(*arguments)
        end.record()
    torch.cuda.synchronize()
    return 1e-3 * sum(begin.elapsed_time(end) for begin, end in events) / repeats


@cache
def cache_filler() -> Tensor:
    """More than any second-level cache holds."""
    return torch.empty(1 << 28, dtype=torch.int8, device="cuda")


def timed(call: Callable[..., Any], arguments: tuple[Any, ...], device: str) -> tuple[float, Any]:
    """Seconds and result."""
    synchronize(device)
    start = time.perf_counter()
    result = call(*arguments)
    synchronize(device)
    return time.perf_counter() - start, result


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def rows(
    case: Case,
    found: list[Contender],
    times: dict[str, list[float]],
    memory: dict[str, int | None],
    settings: Settings,
    ceiling: Ceiling,
    failures: dict[str, str],
) -> list[Row]:
    """One for every contender, and for every peer that is not there."""
    dtype = str(settings.dtype).removeprefix("torch.")
    common = partial(Row, case.op, case.form, case.size, dtype)
    floor = max(1e-9 * case.flops / ceiling.fastest, 1e-9 * case.bytes / ceiling.gbytes)
    ours = found[0].name if found and found[0].peer is None and settings.backends is None else None
    own_median = statistics.median(times[ours]) if ours and ours not in failures else None
    result = []
    for contender in found:
        if contender.name in failures:
            result.append(common(contender.name, missing=failures[contender.name], failed=True))
            continue
        samples = [seconds / case.steps for seconds in times[contender.name]]
        low, median, high = quartiles(samples)
        result.append(
            common(
                contender.name,
                ours=contender.name == ours,
                samples=len(samples),
                apart=contender.apart,
                median=1e3 * median,
                low=1e3 * low,
                high=1e3 * high,
                gflops=1e-9 * case.flops / median,
                gbytes=1e-9 * case.bytes / median,
                ceiling=floor / median,
                memory=memory.get(contender.name),
                speedup=statistics.median(times[contender.name]) / own_median if own_median else None,
                # A goal is for these operators at the size of SYSU-MM01, on a CPU, in float32.
                goal=case.goals.get(contender.name) if goals_apply(settings) else None,
                memory_goal=case.memory_goal if goals_apply(settings) and contender.name == ours else None,
                time_goal=case.gpu_goal if goals_apply(settings, "cuda") and contender.name == ours else None,
            )
        )
    missing = {name: peer.missing() for name, peer in peers_of(case, settings).items()}
    return result + [common(name, missing=reason) for name, reason in missing.items() if reason]


def goals_apply(settings: Settings, device: str = "cpu") -> bool:
    return settings.size.name == "sysu" and settings.device == device and settings.dtype == torch.float32


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) == 1:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


# Processes of their own


def apart(case: Case, index: int, contender: Contender, settings: Settings) -> tuple[list[float], int | None, Any]:
    """Seconds, extra bytes and result of a contender in a fresh process."""
    environment = dict(contender.peer.environment) if contender.peer else {}
    needed = contender.apart
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "result.pt") if needed else None
        context = multiprocessing.get_context("spawn")
        with environment_set(environment), ProcessPoolExecutor(1, mp_context=context) as pool:
            seconds, memory = pool.submit(in_child, case.op, index, contender.name, settings, file).result()
        return seconds, memory, torch.load(file, map_location=settings.device, weights_only=True) if file else None


@contextmanager
def environment_set(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def in_child(op: str, index: int, name: str, settings: Settings, file: Path | None) -> tuple[list[float], int | None]:
    """Build the case anew and run one contender of it; its result goes to `file`.

    The call that is measured is not the first: loading libraries and starting threads takes time and memory, once. Only
    of what is slow the first is at a small size.
    """
    torch.set_num_threads(settings.threads)
    case = find_case(op, index, settings)
    contender = find_contender(case, name, settings)
    slow = contender.peer is not None and contender.peer.slow
    warming = find_case(op, index, replace(settings, size=SIZES["quick"])) if slow else case
    find_contender(warming, name, settings).call(*warming.inputs())
    arguments = case.inputs()
    seconds, memory, result = weigh(contender.call, arguments, settings.device)
    if file:
        torch.save(result, file)
    times = [seconds]
    del result
    if file and not slow and seconds <= PATIENCE:
        count = max(1, min(ROUNDS, int(settings.budget / 5 / seconds)))
        times = [sample(contender.call, arguments, 1, settings.device) for _ in range(count)]
    return times, memory


def find_case(op: str, index: int, settings: Settings) -> Case:
    """The `index`-th case of an operator, or its last where a small size has fewer."""
    *_, case = islice(CASES[op](settings.size, settings.make), index + 1)
    return case


def find_contender(case: Case, name: str, settings: Settings) -> Contender:
    return next(contender for contender in contenders(case, settings) if contender.name == name)


def weigh(call: Callable[..., Any], arguments: tuple[Any, ...], device: str) -> tuple[float, int | None, Any]:
    """Seconds, extra bytes and result of one call."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds, result = timed(call, arguments, device)
        return seconds, torch.cuda.max_memory_allocated() - before - returned_bytes(result, arguments), result
    before = forget_peak()
    seconds, result = timed(call, arguments, device)
    if before is None:
        return seconds, None, result
    return seconds, max(0, resident("VmHWM") - before - returned_bytes(result, arguments)), result


def forget_peak() -> int | None:
    """Give free memory back and let the peak of resident memory begin at what is left: these bytes, None off Linux."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    except (AttributeError, OSError):
        return None


def resident(entry: str) -> int:
    """Bytes, from an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{entry}:"))


def returned_bytes(result: Any, arguments: tuple[Any, ...]) -> int:
    """Bytes of a result that are not those of an argument."""
    tensors = result if isinstance(result, tuple) else (result,)
    return sum(
        bytes_of(tensor)
        for tensor in tensors
        if isinstance(tensor, Tensor) and not any(tensor is argument for argument in arguments)
    )
