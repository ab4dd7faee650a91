"""Where a run waits for a GPU: never in a step, and where it must in what comes before an epoch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulated import cuda_backend
from small_runs import FIRM, settings, start, write_captions
from waiting import no_waiting, waits

from engine import ops
from engine.data.loader import Loader
from engine.phases import Phases

pytestmark = pytest.mark.filterwarnings("ignore:.*not the complete data set", "ignore:.*labels")
OFFLINE = {
    "features.py extract_one": 2,  # images come from files, a batch of each modality
    "ops/jaccard.py _nearest": 2,  # whether rows are unit; this and the next for each modality
    "ops/jaccard.py _expanded_on_gpu": 2,  # how much there is to be stored
    "ops/jaccard.py _distance_on_gpu": 2,
    "cluster.py _totals": 1,  # clusters of both
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def next_batch(run):
    labels = run.state.labels
    plan = run.method.batches(labels, run.config.train.stages[0], np.random.RandomState(0))
    return next(Loader(run.pixels, run.config.augment, run.device, (1, 2)).batches(plan, labels, 0, ltg=False))


@pytest.mark.parametrize(("method", "stage"), [("dcl", 0), ("salcr", 1)])
def test_what_waits_before_an_epoch_and_that_no_step_does(method, stage, sysu_tree, cache, tmp_path, monkeypatch):
    run = start(settings(sysu_tree, cache, f"method.name={method}", "optim.clip=1"), tmp_path)
    monkeypatch.setattr(
        run.optimizer, "step", lambda: None
    )  # Adam counts its steps on the CPU, wherever the network is
    with cuda_backend():
        with waits() as places:
            run._label(stage, Phases(run.device))
        assert places == OFFLINE
        batch = next_batch(run)
        run.network.train()
        with waits() as places:
            run._step(batch, stage)
        assert not places


def test_no_step_of_firm_waits(sysu_tree, cache, tmp_path, monkeypatch):
    chosen = [*FIRM, write_captions(sysu_tree, tmp_path), "optim.clip=1"]
    run = start(settings(sysu_tree, cache, *chosen), tmp_path / "run")
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    run._label(0, Phases(run.device))
    plan = run.method.batches(run.state.labels, run.config.train.stages[0], np.random.RandomState(0))
    loader = Loader(run.pixels, run.config.augment, run.device, (1, 2), run.texts)
    batch = next(loader.batches(plan, run.state.labels, 0, ltg=False))
    run.network.train()
    with cuda_backend(), waits() as places:
        run._step(batch, 0)
    assert not places


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("method", "stage"), [("dcl", 0), ("salcr", 1)])
def test_no_step_waits_on_a_gpu(method, stage, sysu_tree, cache, tmp_path):
    run = start(settings(sysu_tree, cache, f"method.name={method}", "optim.clip=1", "device=cuda"), tmp_path)
    run._label(stage, Phases(run.device))
    batch = next_batch(run)
    run.network.train()
    run._step(batch, stage)  # the first may compile
    with no_waiting():
        run._step(batch, stage)


def test_what_would_wait_is_found_wherever_it_is():
    rows = torch.arange(12.0).view(4, 3)
    with cuda_backend(), waits() as places:
        rows[rows[:, 0] > 3]
        rows[torch.tensor([0, 1])]
        bool((rows > 3).any())
        rows.cpu()
        ops.affinity(rows, rows, 2)
        ops.segment_mean(rows, rows.new_zeros(4, dtype=torch.int64), 2)
    assert places == {"nothing of the engine": 4, "ops/affinity.py cuda": 1}
    with ops.use_backend("reference"), waits() as places:
        ops.memory_update_(rows.clone(), rows, rows.new_zeros(4, dtype=torch.int64), 0.5)
    assert {place.split()[0] for place in places} == {"ops/memory_update_.py"}
