"""Runs of several processes: the result of one, whatever their number."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from small_runs import metrics, write_captions

from engine import distributed
from engine.device import pick_device
from engine.errors import UserError

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


@pytest.mark.parametrize(
    ("failure", "message", "end"),
    [
        (UserError("the disk is full"), "^the disk is full$", (2, 0)),
        (RuntimeError("out of memory"), "^out of memory$", (1, 0)),
        (SystemExit(143), "143", (143, 0)),
        (
            RuntimeError("[/x/gloo/tcp/pair.cc:1] Connection closed by peer [::1]:7. This is typical."),
            r"out of reach \(Connection closed by peer \[::1\]:7\); the one that failed first says why",
            (2, 1),
        ),
    ],
)
def test_whoever_fails_ends_without_waiting_for_the_others(monkeypatch, failure, message, end):
    """With NCCL to take leave waits for all, who may be waiting for this one; those left alone let it be noticed first."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    joins = mock.patch.object(dist, "init_process_group")
    leaves = mock.patch.object(dist, "destroy_process_group")
    with joins, leaves as left, mock.patch("atexit.register") as at_exit:
        with pytest.raises((UserError, RuntimeError, SystemExit), match=message), distributed.joined():
            raise failure
        assert not left.called
        at_exit.assert_called_once_with(distributed._end, *end)
        with distributed.joined():
            pass
        assert left.called


def test_several_processes_cannot_have_one_gpu(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "local_rank", lambda: 99)
    with pytest.raises(UserError, match="device: 'cuda:0' cannot be that of 2 processes; use device=auto"):
        pick_device("cuda:0")
    with pytest.raises(
        UserError, match="'cuda:99' cannot be used .*; start as many processes on a machine as it has GPUs"
    ):
        pick_device("cuda")
