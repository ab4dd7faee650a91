from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine import info, ops

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))

import bench_cases
import bench_kernels
import bench_measure
import bench_report
from bench_peers import Peer

SMALL = replace(bench_cases.SIZES["quick"], vis=150, ir=90, queries=50, rankings=((60, 40, 20),))
QUICK = bench_measure.Settings(SMALL, "cpu", torch.float32, threads=1, budget=0.0)
CEILING = bench_measure.Ceiling(gflops=100.0, gbytes=10.0)
ROW = bench_measure.Row(
    *("topk", "self", "4 x 2", "float32", "faiss"),
    samples=3,
    median=2.0,
    low=1.0,
    high=3.0,
    gflops=1.5,
    gbytes=0.25,
    ceiling=0.5,
    speedup=4.0,
    goal=3.2,
)
OURS = replace(ROW, contender="cpu", ours=True, memory=2_000_000, speedup=1.0, goal=None, memory_goal=1e6)


def cases_of(op, settings=QUICK):
    return bench_cases.CASES[op](settings.size, settings.make)


def test_every_operator_has_a_case():
    assert sorted(bench_cases.CASES) == info.operator_names()


@pytest.mark.parametrize("op", sorted(bench_cases.CASES))
def test_back_ends_and_peers_agree_with_the_reference(op):
    for case in cases_of(op):
        found = [c for c in bench_measure.contenders(case, QUICK) if not (c.peer and c.peer.compiles)]
        assert case.op == op
        assert {"reference"} < {contender.name for contender in found}
        bench_measure.gate(case, found, QUICK)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", sorted(bench_cases.CASES))
def test_back_ends_agree_in_every_dtype(op, dtype):
    settings = replace(QUICK, dtype=dtype, peers=dtype == torch.float64)
    for case in cases_of(op, settings):
        found = [c for c in bench_measure.contenders(case, settings) if not (c.peer and c.peer.compiles)]
        bench_measure.gate(case, found, settings)


@pytest.mark.parametrize("op", sorted(bench_cases.CASES))
def test_every_case_counts_its_work(op):
    for case in cases_of(op):
        assert case.bytes > 0 and case.flops >= 0
        assert set(case.goals) <= set(case.peers)


def test_work_is_counted_once():
    itself, rectangle = cases_of("topk")
    assert itself.flops == 150 * 151 * 128  # every pair once, with itself too
    assert rectangle.flops == 2 * 50 * 150 * 128
    assert rectangle.bytes == (50 + 150) * 128 * 4 + 50 * 30 * (4 + 8)


def test_a_wrong_contender_is_not_timed():
    case = next(cases_of("memory_update_"))
    sloppy = bench_measure.Contender("sloppy", lambda bank, *_: bank)
    with pytest.raises(AssertionError, match="memory_update_ .*: sloppy is wrong, so nothing is timed"):
        bench_measure.gate(case, [sloppy], QUICK)


def test_a_neighbour_that_is_not_the_nearest_is_wrong():
    case = next(cases_of("topk"))
    queries, bank, k = case.inputs()
    values, indices = ops.topk(queries, bank, k)
    case.agree(case.inputs(), (values, indices), (values, indices), 1e-4)
    farthest = (queries[0] @ bank.T).argmin()
    wrong_values, wrong = values.clone(), indices.clone()
    wrong[0, -1], wrong_values[0, -1] = farthest, queries[0] @ bank[farthest]
    with pytest.raises(AssertionError, match="a nearer neighbour is missing"):
        case.agree(case.inputs(), (values, indices), (wrong_values, wrong), 1e-4)
    wrong[0, -1], wrong_values[0, -1] = indices[0, 0], values[0, 0]
    with pytest.raises(AssertionError, match="twice"):
        case.agree(case.inputs(), (values, indices), (wrong_values, wrong), 1e-4)


def test_a_sparse_entry_too_few_or_too_far_off_is_wrong():
    graph = torch.eye(4).to_sparse_csr()
    bench_cases.sparse((), graph, graph.clone(), 1e-4)
    for other in (torch.eye(4).fill_diagonal_(0.9), torch.eye(4) * torch.tensor([1.0, 1, 1, 0])):
        with pytest.raises(AssertionError, match="entries differ"):
            bench_cases.sparse((), graph, other.to_sparse_csr(), 1e-4)


def test_who_takes_long_has_fewer_samples_spread_over_the_rounds(monkeypatch):
    seconds = {"fast": 0.5, "slow": 2.0, "slowest": 5.0}
    order = []

    def sample(call, *_):
        order.append(call)
        return seconds[call]

    monkeypatch.setattr(bench_measure, "sample", sample)
    found = [bench_measure.Contender(name, name) for name in seconds]
    times = bench_measure.alternate(next(cases_of("rank")), found, replace(QUICK, budget=12.0))
    assert {name: len(values) for name, values in times.items()} == {"fast": 8, "slow": 2, "slowest": 1}
    assert order == ["fast", "slow", "slowest"] + (["fast"] * 4 + ["slow"]) * 2  # the first calls, then the rounds


def test_a_peer_that_is_missing_says_so():
    case = replace(next(cases_of("memory_update_")), peers={"other": Peer(lambda: None, package="not_there")})
    *_, row = bench_measure.run_case(case, 0, QUICK, CEILING)
    assert (row.contender, row.missing, row.median) == ("other", "not installed (pip install -e .[bench])", None)
    assert "not installed" in bench_report.line(bench_report.cells(row))


def test_the_engine_s_own_choice_is_compared_with_the_others():
    case = next(cases_of("memory_update_"))
    first, *others = bench_measure.run_case(case, 0, QUICK, CEILING)
    assert first.ours and first.speedup == 1
    assert not any(row.ours for row in others)
    for row in (first, *others):
        assert row.speedup == pytest.approx(row.median / first.median)
        assert row.gbytes == pytest.approx(1e-6 * case.bytes / row.median)
        assert row.low <= row.median <= row.high


def on_cuda(monkeypatch):
    """Settings of a run on CUDA tensors, in which the engine runs what it would on those of the CPU."""
    backends = [bench_measure.AUTOMATIC, "reference"]
    monkeypatch.setattr(bench_measure, "engine_backends", lambda case, settings: backends)
    return replace(QUICK, device="cuda")


def test_a_gpu_has_peers_of_its_own_and_products_in_tf32(monkeypatch):
    case = next(cases_of("topk"))
    here, there = (set(bench_measure.peers_of(case, settings)) for settings in (QUICK, on_cuda(monkeypatch)))
    assert here == {"faiss", "faiss, AVX-512 BLAS", "torch chunked", "scikit-learn"}
    assert there == {"faiss on the GPU", "cuML", "torch chunked", "torch chunked, TF32"}


def test_a_peer_in_tf32_finds_torch_set_to_it():
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    assert bench_measure.in_tf32(lambda: setting.fp32_precision) == "tf32"
    assert setting.fp32_precision == before


@pytest.mark.parametrize("op", sorted(bench_cases.CASES))
def test_on_a_gpu_back_ends_run_fast_too_where_the_operator_can(op, monkeypatch):
    settings = on_cuda(monkeypatch)
    for case in cases_of(op):
        found = {contender.name: contender for contender in bench_measure.contenders(case, settings)}
        assert ("automatic, fast" in found) == case.precise and "reference, fast" not in found
        if case.precise:
            expected = found["reference"].call(*case.inputs())
            fast = found["automatic, fast"]
            bench_measure.agree(case, fast, settings, expected, fast.call(*case.inputs()))


def test_who_fails_is_left_out_where_the_others_are_to_go_on():
    def breaks(*_):
        raise RuntimeError("out of\nmemory")

    wrong, broken = Peer(lambda bank, *_: bank), Peer(breaks)
    case = replace(next(cases_of("memory_update_")), peers={"wrong": wrong, "broken": broken})
    found = {row.contender: row for row in bench_measure.run_case(case, 0, replace(QUICK, keep_going=True), CEILING)}
    assert found["cpu"].median and not found["cpu"].failed
    assert found["broken"].failed and found["broken"].missing == "RuntimeError: out of memory"
    assert found["wrong"].failed and "wrong is wrong" in found["wrong"].missing
    with pytest.raises(RuntimeError, match="out of"):
        bench_measure.run_case(replace(case, peers={"broken": broken}), 0, QUICK, CEILING)


def test_an_operator_that_cannot_even_begin_is_a_row(monkeypatch):
    def none(size, make):
        raise RuntimeError("no inputs")
        yield

    monkeypatch.setitem(bench_cases.CASES, "topk", none)
    ((row,),) = bench_kernels.rows_of("topk", replace(QUICK, keep_going=True), CEILING)
    assert (row.op, row.failed, row.missing) == ("topk", True, "RuntimeError: no inputs")


def test_on_a_gpu_events_around_each_call_take_the_time_after_the_cache_was_emptied(monkeypatch):
    happened = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            happened.append("event")

        def elapsed_time(self, other):
            return 3.0  # milliseconds

    class Filler:
        def zero_(self):
            happened.append("emptied")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("waited"))
    monkeypatch.setattr(bench_measure, "cache_filler", Filler)
    seconds = bench_measure.sample(lambda what: happened.append(what), ("call",), 2, "cuda")
    assert seconds == pytest.approx(0.003)
    assert happened == ["emptied", "event", "call", "event"] * 2 + ["waited"]


def test_the_ceiling_of_a_gpu_is_its_product_in_tf32():
    assert CEILING.fastest == 100 and replace(CEILING, tf32_gflops=400.0).fastest == 400


def test_the_memory_of_a_call_is_what_it_takes_beside_its_result():
    def call(rows):
        return torch.ones(40, 1 << 18).sum(dim=0) + rows

    _, memory, result = bench_measure.weigh(call, (torch.zeros(1 << 18),), "cpu")
    if memory is None:
        pytest.skip("the system does not tell the peak")
    assert result[0] == 40
    assert 38 << 20 <= memory <= 48 << 20  # the kernel counts pages in batches


def test_the_exponent_is_the_slope_in_logarithms():
    assert bench_kernels.exponent([(1000, 1.0), (2000, 4.0), (4000, 16.0)]) == pytest.approx(2)
    assert bench_kernels.exponent([(1000, 1.0)]) is None


def test_growing_sizes_stop_where_a_call_takes_too_long(monkeypatch):
    monkeypatch.setattr(bench_kernels, "COUNTS", (40, 80, 160, 320))
    monkeypatch.setattr(bench_kernels, "typical", lambda call, inputs, device: len(inputs[0]) ** 2 * 1e-3)
    arguments = bench_kernels.parse(["--scale", "--op", "topk", "--quick"])
    itself, _ = bench_kernels.grow(arguments)
    assert [count for count, _ in itself.points] == [40, 80]  # the third would take more than thirty seconds
    assert itself.exponent == pytest.approx(2)
    assert (itself.op, itself.contender) == ("topk", "cpu")
    assert bench_report.growth_lines([itself]) == [
        "topk self, k 30 (cpu): ~ N^2.00; 40: 1600 ms, 80: 6400 ms",
    ]


def test_the_page_tells_which_goals_are_reached():
    growth = bench_report.Growth("topk", "self", "cpu", [(2000, 1.0), (4000, 4.0)], 2.0)
    page = bench_report.markdown({"commit": "abc"}, [OURS, ROW], [growth], "benchmarks.png")
    assert "| commit | `abc` |" in page
    assert "| topk self | 4 x 2 | faiss | 3.2x | 4.00x | yes |" in page
    assert "| topk self | 4 x 2 | extra memory | < 1 MB | 2.0 MB | no |" in page
    assert "| topk self | cpu | 1 | 4 | 2.00 |" in page
    assert "(benchmarks.png)" in page
    row = replace(ROW, contender="cuda", ours=True, goal=None, time_goal=0.25)
    page = bench_report.markdown({"torch.mm in TF32": "4 GFLOP/s"}, [row], [], None)
    assert "| topk self | 4 x 2 | time | < 0.25 ms | 2 ms | no |" in page
    assert "on this GPU" in page


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "speed.png"
    bench_report.plot(path, {"machine": "a machine", "threads": "2", "commit": "abc"}, [OURS, ROW])
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_quick_run_writes_a_row_for_every_contender(tmp_path, capsys):
    data, page = tmp_path / "rows.json", tmp_path / "page.md"
    given = [
        "--quick",
        "--budget",
        "0.1",
        "--op",
        "rank",
        "memory_update_",
        "--json",
        str(data),
        "--markdown",
        str(page),
    ]
    bench_kernels.main(given)
    written = json.loads(data.read_text())
    assert {(row["op"], row["contender"]) for row in written["rows"]} == {
        (op, name)
        for op, peer in (("memory_update_", "Python loop"), ("rank", "field's Python"))
        for name in ("cpu", "reference", peer)
    }
    assert set(written["rows"][0]) == set(bench_measure.Row.__dataclass_fields__)
    assert {"command", "machine", "commit", "date", "threads", "instructions", "torch"} <= set(written["header"])
    assert "field's Python" in capsys.readouterr().out and "field's Python" in page.read_text()


def test_memory_is_measured_in_a_process_of_its_own(tmp_path):
    data = tmp_path / "rows.json"
    choice = ["--quick", "--threads", "1", "--op", "set_union", "--backend", "reference", "--no-peers", "--memory"]
    run = subprocess.run(
        [sys.executable, str(TOOLS / "bench_kernels.py"), *choice, "--json", str(data)],
        check=False,
        env=os.environ | {"PYTHONPATH": str(TOOLS.parent)},  # this checkout's engine
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    written = json.loads(data.read_text())
    assert written["header"]["OMP_WAIT_POLICY"] == os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
    (row,) = written["rows"]
    assert row["contender"] == "reference" and row["speedup"] is None
    assert row["memory"] is None or 0 <= row["memory"] < 1 << 26
