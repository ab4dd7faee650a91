"""FIRM: labels, losses, updates, decisions, and runs of seconds."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from small_runs import FIRM, assert_same_run, interrupted_after, settings, start, write_captions
from torch.nn import functional as F

from engine import config, evolve, methods
from engine.cluster import Labels
from engine.data.loader import Batch, Loader, Views
from engine.errors import UserError
from engine.evolve import FUSED, IR, VIS
from engine.features import Features
from engine.losses import instance_contrast
from engine.methods import firm
from engine.model.network import Output
from engine.pair import Pair
from engine.phases import Phases
from engine.trained import evaluate_checkpoint
from engine.trainer import Trainer

TIMES = Phases(torch.device("cpu"))
PAGE = {
    "data": {"name": "sysu", "root": "nowhere", "size": [32, 16]},
    "augment": {"channels": False},
    "model": {"backbone": "vit_small", "weights": "none"},
    "cluster": {"k1": 8, "k2": 3, "eps": 0.5, "min_samples": 2},
    "train": {"stages": [{"epochs": 2, "iterations": 5, "labels": 2, "images": 2}]},
    "method": {"name": "firm"},
}


def build(*overrides: str):
    loaded = config.parse(config.override(PAGE, overrides))
    return methods.find("firm")(loaded)


def unit(count: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


def people(apart: float = 0.0, count: int = 4, each: int = 5) -> Features:
    """Unit rows of people, person after person; infrared ones lie off by a shared shift."""
    means = torch.eye(8)[:count].repeat_interleave(each, 0)
    shift = apart * torch.eye(8)[7]
    return Features(Pair(*(F.normalize(means + i * shift + 0.1 * unit(len(means), seed=i)) for i in (0, 1))))


def memory(method, features: Features | None = None) -> dict[str, torch.Tensor]:
    features = features or people()
    labels = method.label(features, 0, TIMES)
    method.memory = method.memories(features, labels)
    return method.memory


def batch(vis=(0, 5), ir=(1, 11), features: Features | None = None) -> tuple[Output, Batch]:
    """Rows of `people`, with their persons as labels."""
    features = features or people()
    rows = [features.whole.vis[list(vis)], features.whole.ir[list(ir)]]
    found = torch.cat(rows).clone().requires_grad_()
    fused = found * 1.0
    image = torch.zeros(len(vis), 3, 1, 1)
    own = Pair(torch.tensor(vis) // 5, torch.tensor(ir) // 5)
    classes = torch.randn(4, 2 * len(vis), 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
    made = Output(torch.zeros(1), found, fused=fused, classes=classes)
    return made, Batch(image, None, image, own, own, torch.Generator())


def test_modalities_are_clustered_together():
    method = build()
    labels = method.label(people(), 0, TIMES)
    person = torch.arange(20) // 5
    assert torch.equal(labels.own.vis, labels.own.ir) and torch.equal(labels.cross.vis, labels.own.vis)
    for label in range(4):
        assert len(person[labels.own.vis == label].unique()) == 1
    assert method.describe(labels)["clusters.both"] == 4


def test_clusters_are_made_anew_at_their_period_and_evolve_at_theirs(monkeypatch):
    done = []
    for name in ("rebuild", "relabel", "merge", "split"):
        plain = getattr(evolve, name)
        monkeypatch.setattr(evolve, name, lambda *a, name=name, plain=plain: done.append(name) or plain(*a))
    for every, expected in (
        (2, ["rebuild", "", "rebuild", "relabel merge split", "rebuild"]),
        (0, ["rebuild", "", "", "relabel merge split", ""]),
        (3, ["rebuild", "", "", "rebuild merge split", ""]),
    ):
        method, seen = build(f"firm.bootstrap.every={every}", "firm.period=3"), []
        for _ in range(5):
            done.clear()
            memory(method)
            seen.append(" ".join(done))
        assert seen == expected


def test_a_memory_outlives_features_without_clusters():
    method = build("firm.bootstrap.every=1")
    before = memory(method)["labels.vis"]
    method.config = config.parse(config.override(PAGE, ["cluster.min_samples=40"]))
    assert torch.equal(method.label(people(), 0, TIMES).own.vis, before)


def test_the_contrast_is_that_of_three_views_weighted_by_their_confidence():
    method = build("firm.losses.proto=0", "firm.losses.density=0", "firm.losses.align=0")
    banks = memory(method)
    output, rows = batch()
    terms, weights = [], []
    for view, part in ((FUSED, slice(0, 4)), (VIS, slice(0, 2)), (IR, slice(2, 4))):
        bank = F.normalize(banks["prototypes"][view])
        features = output.features[part]
        plan = evolve.transport(features, bank, banks["counts"], method.settings.transport)
        terms.append(-(plan * (features @ bank.T / 0.05).log_softmax(1)).sum(1).mean())
        weights.append((plan.amax(1).sum() + 1).log())
    expected = sum(w * term for w, term in zip(weights, terms, strict=True)) / sum(weights)
    found = method.losses(output, rows, banks)
    assert list(found) == ["con"]
    torch.testing.assert_close(found["con"], expected)


def test_prototype_loss_leaves_out_what_a_cluster_lacks():
    prototypes = torch.tensor([[[1.0, 0], [1, 0]], [[0, 1], [0, 3]], [[2, 0], [0, 0]]])
    present = torch.tensor([[True, True], [True, True], [True, False]])
    # Cluster 0: 2 + 1, as a child .5 * 5 more; cluster 1: 1 + 9.
    for split, expected in ((False, 13.0), (True, 15.5)):
        assert firm.prototype_loss(prototypes, present, torch.tensor([split, split])).item() == expected


def test_looking_ahead_is_a_step_towards_the_mean_of_the_rows():
    bank, rows = unit(3, seed=1), unit(3, seed=2).requires_grad_()
    found = firm.look_ahead(bank, rows, torch.tensor([0, 0, -1]), torch.tensor([0.1, 0.2, 0.9]))
    torch.testing.assert_close(found[0], 0.85 * bank[0] + 0.15 * (rows[0] + rows[1]) / 2)
    assert torch.equal(found[1:], bank[1:])
    found.sum().backward()
    assert (rows.grad[:2] != 0).all() and (rows.grad[2] == 0).all()


@pytest.mark.parametrize("ahead", [True, False])
def test_prototypes_have_a_gradient_only_where_that_is_decided(ahead):
    method = build(f"firm.losses.look_ahead={str(ahead).lower()}", "firm.losses.align=0")
    banks = memory(method)
    banks["step"] += 100
    output, rows = batch()
    terms = method.losses(output, rows, banks)
    assert list(terms) == ["con", "proto", "density"]
    assert terms["proto"].requires_grad == terms["density"].requires_grad == ahead
    assert not any(bank.requires_grad for bank in banks.values())


def test_the_weight_of_the_density_grows_over_the_first_fifth_of_all_steps():
    method = build()
    banks, (output, rows) = memory(method), batch()
    found = []
    for step in (0, 1, 2, 7):
        banks["step"].fill_(step)
        found.append(method.losses(output, rows, banks)["density"].item())
    assert found[0] == 0 and found[1] == pytest.approx(found[2] / 2) and found[3] == pytest.approx(found[2])


def test_alignment_draws_directions_to_the_fused_prototype_or_vectors_as_printed():
    for literal, weight in ((False, 0.1), (True, 1.0)):
        method = build(f"firm.literal={str(literal).lower()}")
        banks, (output, rows) = memory(method), batch()
        target = banks["prototypes"][FUSED][torch.cat([rows.own.vis, rows.own.ir])]
        tokens = output.classes
        if not literal:
            tokens = F.normalize(F.layer_norm(tokens, (8,)), dim=2)
            target = F.normalize(target)
        expected = weight * sum((tokens[i] - target).square().sum(1).mean() for i in range(4))
        torch.testing.assert_close(method.losses(output, rows, banks)["align"], expected)


def test_confident_rows_move_prototypes_in_both_of_their_views():
    method = build()
    banks, (output, rows) = memory(method), batch()
    before = banks["prototypes"].clone()
    views = method._views(output, rows, banks)
    assert (views[FUSED].confidence > 0.5).all()
    method.update(output, rows, banks)
    clusters = views[FUSED].clusters
    assert torch.equal(clusters, torch.cat([rows.own.vis, rows.own.ir]))
    step = 0.2 * views[VIS].confidence[1]
    vis = int(clusters[1])
    torch.testing.assert_close(
        banks["prototypes"][VIS, vis], (1 - step) * before[VIS, vis] + step * output.features[1].detach()
    )
    assert torch.equal(banks["prototypes"][IR, vis], before[IR, vis])
    counted = method.describe(Labels(*(Pair(banks["labels.vis"], banks["labels.ir"]),) * 2))
    assert counted["accepted"] == 4 and counted["births"] == 4 and banks["step"] == 1


def test_without_the_evolving_memory_labels_are_the_targets_and_every_row_moves_its_prototype():
    method = build("firm.evolving=false", "firm.losses.align=0")
    banks, (output, rows) = memory(method), batch()
    terms = method.losses(output, rows, banks)
    assert list(terms) == ["con"]
    bank = [F.normalize(banks["prototypes"][view]) for view in range(3)]
    labels = torch.cat([rows.own.vis, rows.own.ir])
    parts = (output.features, output.features[:2], output.features[2:])
    each = [F.cross_entropy(f @ b.T / 0.05, y) for f, b, y in zip(parts, bank, (labels, *rows.own), strict=True)]
    weights = torch.tensor([5.0, 3.0, 3.0]).log()
    torch.testing.assert_close(terms["con"], (weights / weights.sum() * torch.stack(each)).sum())
    method.update(output, rows, banks)
    assert method.memory["events"][evolve.EVENTS.index("accepted")] == 4


def test_clusters_of_one_modality_never_give_nan():
    method = build()
    features = people()
    only = Features(Pair(features.whole.vis[:10], features.whole.ir[10:]))
    banks = memory(method, only)
    assert evolve.present(banks)[1:].sum() == 4
    image = torch.zeros(2, 3, 1, 1)
    rows = torch.cat([only.whole.vis[[0, 5]], only.whole.ir[[0, 5]]]).requires_grad_()
    own = Pair(banks["labels.vis"][[0, 5]], banks["labels.ir"][[0, 5]])
    output = Output(torch.zeros(1), rows, fused=rows * 1.0, classes=torch.randn(4, 4, 8))
    this = Batch(image, None, image, own, own, torch.Generator())
    banks["step"] += 9
    terms = method.losses(output, this, banks)
    sum(terms.values()).backward()
    assert all(term.isfinite() for term in terms.values()) and rows.grad.isfinite().all()
    method.update(output, this, banks)
    assert all(bank.isfinite().all() for bank in banks.values())


def test_children_of_a_split_are_one_label_for_batches():
    method = build()
    banks = memory(method)
    banks["groups"] = torch.tensor([0, 0, 1, 2])
    labels = Pair(torch.tensor([0] * 4 + [2] * 4), torch.tensor([1] * 4 + [3] * 4))
    plan = method.batches(Labels(labels, labels), config.Stage(1, 20, 2, 2), np.random.RandomState(0))
    for rows in plan:
        for i in (0, 2):
            vis, ir = labels.vis[rows.vis[i]], labels.ir[rows.ir[i]]
            assert (vis == 0) == (ir == 1)  # clusters 0 and 1 are a pair, of 2 and 3 each is alone
    _, this = batch(vis=(0, 10), ir=(6, 10))
    this = Batch(
        this.vis, None, this.ir, this.own, None, this.generator, Pair(*(torch.zeros(2, 3, dtype=torch.int64),) * 2)
    )
    assert method.inputs(this)["paired"].tolist() == [True, True]


def test_fusion_features_take_the_text_of_the_same_label_or_of_the_nearest_image():
    method = build()
    method.build()
    content = Pair(*(torch.randn(20, 128, generator=torch.Generator().manual_seed(i)) for i in (4, 5)))
    wide = people().whole.map(lambda rows: F.pad(rows, (0, 120)))
    features = Features(wide, content=content)
    nearest = (wide.ir @ wide.vis.T).argmax(1)
    fuse = method.network.prompts.fuse
    found = method._fused(features)
    assert found.vis is wide.vis
    torch.testing.assert_close(found.ir, fuse(wide.ir, content.vis[nearest] - content.ir))
    banks = memory(method, features)
    banks["labels.ir"][0] = -1
    again = method._fused(features).ir
    same = content.vis[banks["labels.vis"] == banks["labels.ir"][6]].mean(0)
    torch.testing.assert_close(again[6:7], fuse(wide.ir[6:7], same - content.ir[6:7]))
    torch.testing.assert_close(again[0], found.ir[0])


def test_literal_switches_back_every_decision_and_each_switch_stands_alone():
    printed = build("firm.literal=true").settings
    assert (printed.vspf.keys, printed.vspf.text_layers) == ("vector", 0)
    assert (printed.transport.relax, printed.transport.marginal) == (0, "uniform")
    assert (printed.split.criterion, printed.losses.look_ahead) == ("conf_var", False)
    assert (printed.losses.align, printed.losses.align_directions) == (1.0, False)
    mixed = build("firm.literal=true", "firm.split.criterion=conf_std", "firm.losses.align=0.2").settings
    assert (mixed.split.criterion, mixed.losses.align, mixed.vspf.keys) == ("conf_std", 0.2, "vector")
    default = build().settings
    assert (default.vspf.keys, default.transport.relax, default.losses.align) == ("tokens", 0.01, 0.1)
    assert default.split.criterion == "dispersion" and default.losses.look_ahead


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("firm.period=0", "firm.period: expected at least 1, got 0"),
        ("firm.transport.reg=0", "firm.transport.reg: expected a number above 0"),
        ("firm.split.least=0", "firm.split.least"),
        ("augment.channels=true", "augment.channels: firm needs false, got true"),
        ("firm.split.criterion=size", "firm.split.criterion: expected one of dispersion"),
    ],
)
def test_settings_out_of_range_are_refused(override, message):
    with pytest.raises(UserError, match=message):
        build(override)


def test_other_methods_need_the_copies():
    with pytest.raises(UserError, match="augment.channels: salcr needs true, got false"):
        methods.find("salcr")(config.load("demo.yaml", ["augment.channels=false"]))


CHOSEN = (
    *FIRM,
    "train.stages=[{epochs: 3, iterations: 3, labels: 2, images: 2}]",
    "train.warm_up.iterations=1",
    "evaluate.every=9",
    "firm.period=1",
    "firm.bootstrap.every=2",
    "optim.kind=adamw",
    "optim.layer_decay=0.9",
    "optim.clip=5",
)


@pytest.fixture(scope="module")
def described(sysu_tree, tmp_path_factory):
    return [write_captions(sysu_tree, tmp_path_factory.mktemp("captions"))]


@pytest.fixture(scope="module")
def whole(sysu_tree, described, tmp_path_factory):
    folder, cache = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cache")
    return folder, cache, start(settings(sysu_tree, cache, *CHOSEN, *described), folder).run()


NOISE = pytest.mark.filterwarnings("ignore:.*not the complete data set", "ignore:.*labels", "ignore:.*no description")


@NOISE
def test_a_run_logs_what_happened_to_the_memory(whole):
    folder, _, table = whole
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert set(rows[0]["losses"]) == {"con", "proto", "density", "align"}
    for row in rows:
        assert set(evolve.EVENTS) < set(row["labels"])
        assert row["labels"]["accepted"] + row["labels"]["rejected"] == 3 * 8
    assert (
        rows[0]["labels"]["births"]
        == rows[0]["labels"]["clusters.vis"] + rows[0]["labels"]["clusters.ir"] - rows[0]["labels"]["clusters.both"]
    )
    assert "memory     " in (folder / "log.txt").read_text()
    assert table[0][0] == "untrained"


@NOISE
def test_both_views_of_the_warm_up_come_with_captions_of_their_image(sysu_tree, whole, described, tmp_path):
    run = start(settings(sysu_tree, whole[1], *CHOSEN, *described), tmp_path)
    rows = Pair(np.array([3, 0]), np.array([1, 2]))
    loader = Loader(run.pixels, run.config.augment, run.device, (1,), run.texts)
    drawn = [views.texts for views in loader.views([rows] * 20)]
    for texts in drawn:
        for found, every, chosen in zip(zip(*texts, strict=True), run.texts, rows, strict=True):
            for one, other, row in zip(*found, chosen, strict=True):
                pair = [torch.equal(one, variant) for variant in every[row]]
                assert pair in ([True, False], [False, True])
                assert torch.equal(other, every[row][pair.index(False)])
    assert any(not torch.equal(texts[0].vis[0], drawn[0][0].vis[0]) for texts in drawn)
    silent = Loader(run.pixels, run.config.augment, run.device, (1,))
    assert next(iter(silent.views([rows]))).texts == ()


def test_the_warm_up_draws_images_captions_and_paraphrases_together():
    """In each modality: two views with their captions; the captions; and images alone with their captions."""
    method = build("train.warm_up.temperature=0.2")
    rows, content, alone = (unit(8, seed=i) for i in range(3))
    calls = []

    def forward(**given):
        calls.append(set(given))
        both = "vis_text" in given
        return Output(rows, rows if both else alone[:4], content=3 * content if both else None)

    images, tokens = torch.zeros(2, 3, 1, 1), torch.zeros(2, 5, dtype=torch.int64)
    views = Views(Pair(images, images), Pair(images, images), (Pair(tokens, tokens), Pair(tokens, tokens)))
    found = method.warm_up(forward, views)
    expected = {
        name: instance_contrast(one, other, 0.2)
        for name, one, other in (
            ("vis", rows[:2], rows[2:4]),
            ("ir", rows[4:6], rows[6:]),
            ("captions.vis", content[:2], content[2:4]),
            ("captions.ir", content[4:6], content[6:]),
            ("clip.vis", alone[:2], content[:2]),
            ("clip.ir", alone[2:4], content[4:6]),
        )
    }
    assert calls == [{"vis", "aug", "ir", "vis_text", "ir_text"}, {"vis", "ir"}]
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


@NOISE
def test_a_stopped_run_resumes_to_the_same_bits(whole, sysu_tree, described, tmp_path):
    loaded = settings(sysu_tree, whole[1], *CHOSEN, *described, "train.checkpoint_steps=2")
    with interrupted_after(5), pytest.raises(KeyboardInterrupt):
        start(loaded, tmp_path).run()
    Trainer(loaded, tmp_path, resume=True).run()
    assert_same_run(tmp_path, whole[0])


@NOISE
def test_a_checkpoint_is_scored_with_its_captions(whole):
    folder, _, table = whole
    final = next(score for label, score in table if label.startswith("after stage 1"))
    assert evaluate_checkpoint(folder / "last.pt")[0].values == final.values


@NOISE
def test_oracle_text_has_rows_of_its_own(whole):
    plain = evaluate_checkpoint(whole[0] / "last.pt")
    scores = evaluate_checkpoint(whole[0] / "last.pt", ["firm.oracle_text=true"])
    assert [row.values for row in scores[: len(plain)]] == [row.values for row in plain]
    others = scores[len(plain) :]
    assert [row.protocol for row in others] == [row.protocol for row in plain if not row.rerank]
    assert {row.rerank for row in others} == {"oracle-text"}


@NOISE
def test_accumulation_keeps_rows_in_their_place(sysu_tree, whole, described, tmp_path):
    chosen = ("train.accumulate=2", "train.stages.0.epochs=1", "train.warm_up.iterations=0")
    start(settings(sysu_tree, whole[1], *CHOSEN, *described, *chosen), tmp_path).run()


@NOISE
@pytest.mark.parametrize("override", ["firm.vspf.enabled=false", "firm.literal=true"])
def test_switches_give_runs(sysu_tree, whole, described, tmp_path, override):
    chosen = ("train.stages.0.epochs=1", "train.warm_up.iterations=0")
    start(settings(sysu_tree, whole[1], *CHOSEN, *described, *chosen, override), tmp_path).run()


@NOISE
def test_captions_that_are_not_there_are_named(sysu_tree, whole, tmp_path):
    chosen = (*CHOSEN, "firm.captions={vis: nowhere/vis.json, ir: nowhere/ir.json}")
    with pytest.raises(UserError, match=r"nowhere/vis\.json not found: expected captions"):
        start(settings(sysu_tree, whole[1], *chosen), tmp_path)
