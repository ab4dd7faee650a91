"""Runs of several processes: the result of one, whatever their number."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import metrics, write_captions

WORKER = Path(__file__).with_name("distributed_worker.py")
BOUND = 1e-8  # in float64; see the worker
# In this order: some go on with what others left.
DEEDS = {
    4: ("check:all", "run:salcr", "stop:spread"),
    1: ("run:salcr", "run:spread", "run:parts", "run:firm", "resume:spread-stop-4", "stop:salcr"),
    2: ("run:parts", "run:firm", "resume:salcr-stop-1"),
}
RUNS = [("salcr", 4), ("parts", 2), ("firm", 2)]


@pytest.fixture(scope="module")
def runs(sysu_tree, tmp_path_factory):
    """The folder of all runs."""
    out = tmp_path_factory.mktemp("distributed")
    captions = write_captions(sysu_tree, out)
    for world, deeds in DEEDS.items():
        command = [sys.executable, str(WORKER), str(sysu_tree), str(out), captions, *deeds]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes = [
            subprocess.Popen(
                command, env=environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, **PIPES
            )
            for rank in range(world)
        ]
        outputs = [process.communicate(timeout=600)[0] for process in processes]
        assert not any(process.returncode for process in processes), "\n".join(outputs)
    return out


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def environment() -> dict[str, str]:
    paths = [str(WORKER.parents[1]), str(WORKER.parent)]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}


def final(folder: Path, process: int = 0) -> dict[str, torch.Tensor]:
    """Weights, statistics and memories at the end of a run."""
    return torch.load(folder / f"process{process}.pt")


def assert_alike(found: Path, expected: Path) -> None:
    one, other = final(found), final(expected)
    assert one.keys() <= other.keys()  # but for what processes share out
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], atol=BOUND, rtol=0, msg=name)
    for row, wanted in zip(metrics(found), metrics(expected), strict=True):
        assert row["losses"] == pytest.approx(wanted["losses"], abs=BOUND)
        for key in ("epoch", "stage", "lr", "labels", "scores"):
            assert row[key] == wanted[key]


@pytest.mark.parametrize(("name", "world"), RUNS)
def test_weights_memories_labels_losses_and_scores_are_those_of_one_process(runs, name, world):
    assert_alike(runs / f"{name}-run-{world}", runs / f"{name}-run-1")


@pytest.mark.parametrize(("name", "world"), RUNS)
def test_all_processes_end_with_the_same_bits(runs, name, world):
    expected, *others = (final(runs / f"{name}-run-{world}", process) for process in range(world))
    for other in others:
        assert all(torch.equal(other[key], value) for key, value in expected.items())


@pytest.mark.parametrize(("stopped", "whole"), [("spread-stop-4", "spread-run-1"), ("salcr-stop-1", "salcr-run-1")])
def test_a_run_goes_on_with_another_number_of_processes(runs, stopped, whole):
    assert_alike(runs / stopped, runs / whole)


def test_a_process_that_dies_ends_the_run_and_is_named(sysu_tree, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(WORKER), str(sysu_tree), str(tmp_path), "seed=0", "die:salcr"]
    done = subprocess.run(command, env=environment(), timeout=600, check=False, **PIPES)
    assert done.returncode != 0
    assert "exitcode  : 7" in done.stdout and "rank      : 1" in done.stdout
