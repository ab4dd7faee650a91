"""The training loop: files, resuming, faults, settings that must not change the result."""

from __future__ import annotations

import errno
import json
import os
from itertools import cycle, islice

import numpy as np
import pytest
import torch
from small_runs import assert_same_run, interrupted_after, metrics, settings, start

from engine import checkpoint, methods, trainer
from engine.data.loader import Loader
from engine.errors import UserError
from engine.phases import Phases
from engine.trained import evaluate_checkpoint
from engine.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*not the complete data set", "ignore:.*labels")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(sysu_tree, cache, tmp_path_factory):
    """A finished run, for comparison: its folder and its table."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, start(settings(sysu_tree, cache), folder).run()


def weights(folder, name="last.pt"):
    return checkpoint.load(folder / name)["network"]


def test_a_run_leaves_settings_log_metrics_checkpoints_and_a_table(whole):
    folder, rows = whole
    names = {path.name for path in folder.iterdir()}
    files = {"config.yaml", "environment.json", "log.txt", "metrics.jsonl", "results.md"}
    assert names == files | {".lock", "last.pt", "previous.pt", "best.pt", "stage1.pt", "stage2.pt"}
    labels = [label for label, _ in rows]
    assert labels[:4] == ["untrained", "after warm-up", "after stage 1", "after stage 2 (last epoch)"]
    assert labels[4].startswith("best epoch (") and labels[-1] == "after stage 2 (last epoch) + CMFP(te) k=3"
    assert {score.rerank for label, score in rows if "CMFP" not in label} == {""}
    assert "| after stage 2" in (folder / "results.md").read_text()
    log = (folder / "log.txt").read_text()
    assert "epoch 4/4  ·  stage 2" in log and "cross P" in log and "images/s" in log
    assert [row["stage"] for row in metrics(folder)] == [1, 1, 2, 2]
    assert set(metrics(folder)[0]["losses"]) == {"vis", "aug", "ir"}
    modules = {"dagl.vis", "dagl.ir", "fgsal.vis", "fgsal.ir", "gpcr.global", "gpcr.part"}
    assert set(metrics(folder)[3]["losses"]) == modules


@pytest.mark.parametrize("features", ["memory", "disk"])
def test_the_same_seed_gives_the_same_bits(whole, sysu_tree, cache, tmp_path, features):
    start(settings(sysu_tree, cache, f"train.features={features}"), tmp_path).run()
    assert_same_run(tmp_path, whole[0])


def test_another_seed_gives_another_run(whole, sysu_tree, cache, tmp_path):
    start(settings(sysu_tree, cache, "seed=1"), tmp_path).run()
    assert metrics(tmp_path)[0]["losses"] != metrics(whole[0])[0]["losses"]


@pytest.mark.parametrize("stop", [1, 5, 6, 7, 11])
def test_a_run_stopped_anywhere_resumes_to_the_same_bits(whole, sysu_tree, cache, tmp_path, stop):
    loaded = settings(sysu_tree, cache, "train.checkpoint_steps=2")
    with interrupted_after(stop), pytest.raises(KeyboardInterrupt):
        start(loaded, tmp_path).run()
    before = checkpoint.load(tmp_path / "last.pt")
    assert 3 * before["epoch"] + before["step"] in (stop, stop - 1)
    torch.manual_seed(99)  # the state of the process must not matter
    table = Trainer(loaded, tmp_path, resume=True).run()
    assert_same_run(tmp_path, whole[0])
    assert table == whole[1]


def test_a_finished_run_resumes_to_its_table(whole, sysu_tree, cache):
    assert Trainer(settings(sysu_tree, cache), whole[0], resume=True).run() == whole[1]


def test_a_stage_one_checkpoint_starts_stage_two(whole, sysu_tree, cache, tmp_path):
    loaded = settings(sysu_tree, cache, f"train.start_from={whole[0]}")
    rows = start(loaded, tmp_path).run()
    assert [label for label, _ in rows][:2] == ["as loaded", "after stage 2 (last epoch)"]
    assert metrics(tmp_path) == metrics(whole[0])[2:]


def test_starting_from_the_middle_of_a_stage_is_refused(whole, sysu_tree, cache, tmp_path):
    loaded = settings(sysu_tree, cache, f"train.start_from={whole[0]}", "train.stages.0.epochs=1")
    with pytest.raises(
        UserError, match=r"saved after 2 epochs; with train.stages of 1, 2 .* must end a stage but the last"
    ):
        start(loaded, tmp_path)


def test_a_machine_with_other_images_is_noticed_before_anything_is_shared(sysu_tree, cache, tmp_path, monkeypatch):
    run = start(settings(sysu_tree, cache), tmp_path)
    monkeypatch.setattr(trainer.distributed, "from_main", lambda found: found | {"test": "9 visible images"})
    with pytest.raises(
        UserError, match=r"the test images are not those of the main process \(9 visible images there, \d+ "
    ):
        run._check_images()
    monkeypatch.setattr(trainer.distributed, "from_main", lambda found: found)
    run._check_images()


def test_memories_of_the_last_epoch_are_gone_before_new_features_come(sysu_tree, cache, tmp_path, monkeypatch):
    run, found = start(settings(sysu_tree, cache), tmp_path), []
    extract = trainer.extract

    def watched(*arguments, **named):
        found.append(dict(run.state.memories))
        return extract(*arguments, **named)

    monkeypatch.setattr(trainer, "extract", watched)
    run.run()
    assert found == [{}] * 4 and run.state.memories


@pytest.mark.parametrize("stage", [0, 1])
def test_a_batch_in_parts_has_the_losses_gradients_memories_and_statistics_of_the_whole(
    sysu_tree, cache, tmp_path, monkeypatch, stage
):
    monkeypatch.setattr(Trainer, "_descend", lambda self: None)  # leaves the gradients to be compared
    results = []
    for parts in (1, 2):
        chosen = ("model.bn_group=6", f"train.accumulate={parts}")
        run = start(settings(sysu_tree, cache, *chosen), tmp_path / str(parts))
        run._label(stage, Phases(run.device))
        labels = run.state.labels
        loader = Loader(run.pixels, run.config.augment, run.device, (1, 2))
        plan = run.method.batches(labels, run.config.train.stages[stage], np.random.RandomState(0))
        run.network.train()
        terms = run._step(next(loader.batches(plan, labels, 0, ltg=False)), stage)
        gradients = {name: p.grad for name, p in run.network.named_parameters() if p.grad is not None}
        buffers = {f"{name} now": value for name, value in run.network.named_buffers()}
        results.append(terms | gradients | buffers | run.state.memories)
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, atol=1e-4, rtol=1e-4, msg=name)
    assert any(value.abs().max() > 0.01 for value in results[0].values())


@pytest.mark.parametrize(
    "override",
    [
        "train.precision=bf16",
        "train.precision=fp16",
        "train.precision=tf32",
        "train.channels_last=true",
        "model.bn_group=6",
        "deterministic=true",
    ],
)
def test_ways_to_run_train_and_score(sysu_tree, cache, tmp_path, override):
    short = ("train.stages.0.epochs=1", "train.stages.1.epochs=1", "train.warm_up.iterations=0", override)
    rows = start(settings(sysu_tree, cache, *short), tmp_path).run()
    assert all(np.isfinite(list(score.values.values())).all() for _, score in rows)
    assert all(np.isfinite(list(row["losses"].values())).all() for row in metrics(tmp_path))
    torch.use_deterministic_algorithms(False)


def test_compiled_training_gives_the_same_losses(whole, sysu_tree, cache, tmp_path, monkeypatch):
    compiled = []

    def compile_eagerly(network):
        compiled.append(network)
        return torch._dynamo.optimize("eager")(network)

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    short = ("train.compile=true", "train.stages.0.epochs=1", "train.stages.1.epochs=1")
    start(settings(sysu_tree, cache, *short), tmp_path).run()
    assert compiled
    for name, value in metrics(tmp_path)[0]["losses"].items():
        assert value == pytest.approx(metrics(whole[0])[0]["losses"][name], rel=1e-4)


def test_no_cluster_at_all_is_an_error_with_a_remedy(sysu_tree, cache, tmp_path):
    with pytest.raises(UserError, match=r"no cluster among the visible and infrared images.*Raise cluster\.eps"):
        start(settings(sysu_tree, cache, "cluster.min_samples=1000"), tmp_path).run()


def test_an_epoch_without_clusters_keeps_the_labels_before(sysu_tree, cache, tmp_path, monkeypatch):
    label, calls = methods.find("salcr").label, []

    def second_time_nothing(self, features, stage, phases):
        calls.append(stage)
        labels = label(self, features, stage, phases)
        if len(calls) == 2:
            nothing = labels.clusters.map(lambda part: torch.full_like(part, -1))
            return trainer.Labels(nothing, nothing)
        return labels

    monkeypatch.setattr(methods.find("salcr"), "label", second_time_nothing)
    start(settings(sysu_tree, cache), tmp_path).run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["labels_kept"] for row in rows] == [False, True, False, False]
    assert rows[0]["labels"] == rows[1]["labels"]
    assert "the last epoch's labels are kept" in (tmp_path / "log.txt").read_text()


def test_a_loss_that_is_not_finite_stops_before_the_step_and_is_named(sysu_tree, cache, tmp_path, monkeypatch):
    losses = methods.find("salcr").losses

    def broken(self, output, batch, memories):
        terms = losses(self, output, batch, memories)
        return terms if batch.cross is None else terms | {"dagl.ir": terms["dagl.ir"] * float("nan")}

    monkeypatch.setattr(methods.find("salcr"), "losses", broken)
    with pytest.raises(UserError, match=r"epoch 3, step 1: loss term 'dagl\.ir' is not finite.*lower optim\.lr"):
        start(settings(sysu_tree, cache), tmp_path).run()
    saved = checkpoint.load(tmp_path / "last.pt")
    assert saved["epoch"] == 2
    assert all(value.isfinite().all() for value in saved["network"].values())


ONE_EPOCH = ("method.name=dcl", "train.warm_up.iterations=0", "train.stages.0.epochs=1", "train.stages.1.epochs=1")


@pytest.mark.parametrize("value, got", [(torch.zeros(4), r"a tensor \[4\]"), (0.5, "0.5")])
def test_a_loss_term_that_is_no_number_of_torch_is_named(value, got, sysu_tree, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(methods.find("dcl"), "losses", lambda *_: {"mine": value})
    with pytest.raises(UserError, match=rf"loss term 'mine': expected .*\.mean\(\) gives, got {got}"):
        start(settings(sysu_tree, cache, *ONE_EPOCH), tmp_path).run()


def test_an_epoch_has_the_steps_that_are_set_whatever_batches_a_method_gives(sysu_tree, cache, tmp_path, monkeypatch):
    batches = methods.find("dcl").batches
    monkeypatch.setattr(methods.find("dcl"), "batches", lambda *args: cycle(batches(*args)))
    monkeypatch.setattr(methods.find("dcl"), "describe", lambda *_: {"one": torch.ones(()), "two": np.float32(2)})
    start(settings(sysu_tree, cache, *ONE_EPOCH), tmp_path / "endless").run()
    rows = metrics(tmp_path / "endless")
    assert [(row["labels"]["one"], row["labels"]["two"]) for row in rows] == [(1, 2), (1, 2)]

    monkeypatch.setattr(methods.find("dcl"), "batches", lambda *args: islice(batches(*args), 2))
    with pytest.raises(UserError, match=r"dcl: its batches ended after 2 steps .* expected 3 \(train\.stages\.0\.iter"):
        start(settings(sysu_tree, cache, *ONE_EPOCH), tmp_path / "short").run()


def test_a_full_disk_is_named_and_the_old_checkpoint_stays(whole, sysu_tree, cache, tmp_path, monkeypatch):
    run = start(settings(sysu_tree, cache), tmp_path)
    run._save("last.pt")
    before = (tmp_path / "last.pt").read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"last\.pt: cannot be written \(the disk is full; .* MiB needed\).*--resume"):
        run._save("last.pt")
    assert (tmp_path / "last.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_a_damaged_or_foreign_checkpoint_is_refused(whole, tmp_path):
    damaged, foreign = tmp_path / "damaged.pt", tmp_path / "foreign.pt"
    damaged.write_bytes((whole[0] / "last.pt").read_bytes()[:1000])
    torch.save({"state_dict": {}}, foreign)
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(damaged)
    with pytest.raises(UserError, match="not a checkpoint of this engine"):
        checkpoint.load(foreign)
    with pytest.raises(UserError, match=r"no such checkpoint; this folder has best\.pt, last\.pt"):
        checkpoint.locate(str(whole[0]), "stage7")


@pytest.mark.parametrize(
    "wrong",
    [{"epoch": 5}, {"epoch": -1}, {"epoch": "1"}, {"epoch": 4, "step": 1}, {"epoch": 0, "step": 99}, {"step": 1.0}],
)
def test_a_checkpoint_goes_on_only_with_a_step_of_its_run(whole, sysu_tree, cache, wrong, monkeypatch):
    content = checkpoint.load(whole[0] / "last.pt") | wrong
    monkeypatch.setattr(checkpoint, "latest", lambda folder: (content, folder / "last.pt"))
    with pytest.raises(UserError, match=r"not a checkpoint to go on from .*this run has 4 epochs"):
        Trainer(settings(sysu_tree, cache), whole[0], resume=True).run()


@pytest.mark.parametrize("wrong", [{"epoch": "2"}, {"epoch": None}, {"step": 1}, {"step": "x"}])
def test_a_network_is_taken_over_only_from_the_end_of_a_stage(whole, sysu_tree, cache, tmp_path, wrong):
    checkpoint.save(tmp_path / "x.pt", checkpoint.load(whole[0] / "stage1.pt") | wrong)
    with pytest.raises(UserError, match=r"must end a stage but the last \(after 2\)"):
        start(settings(sysu_tree, cache, f"train.start_from={tmp_path / 'x.pt'}"), tmp_path / "run")


def test_a_changed_data_set_is_noticed_on_resume(whole, sysu_tree, cache):
    with pytest.raises(UserError, match="the training images are not those this run was started with"):
        Trainer(settings(sysu_tree, cache, "data.split=val"), whole[0], resume=True).run()


def test_a_checkpoint_scores_as_the_run_did(whole):
    scores = evaluate_checkpoint(whole[0] / "last.pt")
    assert scores[0] == whole[1][3][1]
    assert [score.rerank for score in scores] == [""] * 4 + ["CMFP(te) k=3"] * 4


def test_scoring_identities_that_were_trained_on_is_refused(whole):
    with pytest.raises(UserError, match="the network was trained on the val identities"):
        evaluate_checkpoint(whole[0] / "last.pt", ["data.split=val"])


def test_scoring_with_another_network_is_refused(whole):
    with pytest.raises(UserError, match="the checkpoint is of another network"):
        evaluate_checkpoint(whole[0] / "last.pt", ["model.backbone=resnet18"])


def test_another_network_is_told_in_a_few_words(whole):
    with pytest.raises(UserError, match="use the configuration it was trained with$") as caught:
        checkpoint.load_network(torch.nn.Identity(), checkpoint.load(whole[0] / "last.pt"))
    assert "'name': 'salcr'" in str(caught.value) and len(str(caught.value)) < 600


def test_a_device_that_is_not_there_is_named(sysu_tree, cache, tmp_path):
    with pytest.raises(UserError, match=r"device: 'cuda:7' cannot be used .*device=auto or device=cpu"):
        start(settings(sysu_tree, cache, "device=cuda:7"), tmp_path)
    with pytest.raises(UserError, match="device: 'tpuu' cannot be used"):
        start(settings(sysu_tree, cache, "device=tpuu"), tmp_path)
