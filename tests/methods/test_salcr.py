"""SALCR's second stage: the release's recorded step, both readings, switches, memories and updates."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine import config, memory, methods, ops
from engine.cluster import Labels
from engine.data.loader import Batch
from engine.errors import UserError
from engine.features import Features
from engine.methods.salcr import Salcr
from engine.model.network import Output
from engine.pair import Pair

DATA = Path(__file__).parents[1] / "data"
PASSES = {"_pg": (0, 1, 2), "_pg1": (2, 2, 0), "_pg2": (1, 0, 1)}
INPUTS = ("feat1", "feat2", *(f"feat{i}{name}" for i in (1, 2) for name in PASSES))


def build(*overrides: str) -> Salcr:
    loaded = config.load("demo.yaml", ["salcr.gpcr.k=5", *overrides])
    return methods.find("salcr")(loaded)


class Step:
    """The recorded step: 8 visible, augmented and infrared rows, 3 parts, 9 visible and 7 infrared clusters."""

    def __init__(self) -> None:
        self.data = {name: torch.from_numpy(np.asarray(x)) for name, x in np.load(DATA / "salcr_step.npz").items()}
        self.inputs = {name: self.data[name].clone().requires_grad_() for name in INPUTS}
        whole = torch.cat([self.inputs["feat1"], self.inputs["feat2"]])
        grid: dict[tuple[int, int], Tensor] = {}
        for name, seen in PASSES.items():
            rows = torch.cat([self.inputs[f"feat{i}{name}"] for i in (1, 2)])[:, :96]
            by_query = rows.view(3, 8, 3, 32).permute(2, 0, 1, 3)  # [part, query, image, channel]
            grid |= {(query, kind): by_query[:, query] for query, kind in enumerate(seen)}
        parts = torch.stack([torch.stack([grid[q, m] for m in range(3)], 1) for q in range(3)], 1)
        self.output = Output(whole, F.normalize(whole), F.normalize(parts, dim=-1))
        image = torch.zeros(8, 3, 1, 1)
        own = Pair(self.data["label1"], self.data["label2"])
        cross = Pair(self.data["cm_label1"], self.data["cm_label2"])
        self.batch = Batch(image, image, image, own, cross, torch.Generator().manual_seed(0))
        self.memories = {
            "vis": self.data["mem0_v"].repeat(7, 1, 1),
            "ir": self.data["mem0_r"].repeat(7, 1, 1),
            "instances.vis": torch.cat([self.data["inst_v"].unsqueeze(0), self.data["inst_pv"]]),
            "instances.ir": torch.cat([self.data["inst_r"].unsqueeze(0), self.data["inst_pr"]]),
        }

    def losses(self, *overrides: str) -> dict[str, Tensor]:
        return build(*overrides).losses(self.output, self.batch, self.memories)


@pytest.fixture
def step() -> Step:
    return Step()


def members(sets: Tensor, count: int) -> Tensor:
    """Padded index sets as a `[R, count]` mask."""
    mask = torch.zeros(len(sets), count + 1, dtype=torch.bool)
    return mask.scatter(1, torch.where(sets < 0, count, sets), True)[:, :count]


def test_losses_and_gradients_equal_the_release(step):
    terms, data = step.losses(), step.data
    near = {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(terms["dagl.vis"] + terms["dagl.ir"], data["loss_g"].float(), **near)
    torch.testing.assert_close(terms["fgsal.vis"], data["loss_pv"].float(), **near)
    torch.testing.assert_close(terms["fgsal.ir"], data["loss_pr"].float(), **near)
    torch.testing.assert_close(terms["gpcr.global"], 0.5 * data["loss_gi"].float(), **near)
    torch.testing.assert_close(terms["gpcr.part"], 0.5 * data["loss_pi"].float(), **near)
    total = torch.stack(list(terms.values())).sum()
    torch.testing.assert_close(total, data["loss"].float(), **near)
    total.backward()
    for name, rows in step.inputs.items():
        torch.testing.assert_close(rows.grad, data[f"grad_{name}"], atol=1e-6, rtol=1e-5)


def test_positive_sets_equal_the_release(step, monkeypatch):
    seen, contrast = [], ops.neighbor_contrast

    def recorded(rows, bank, positives, temperature):
        seen.append(positives)
        return contrast(rows, bank, positives, temperature)

    monkeypatch.setattr(ops, "neighbor_contrast", recorded)
    step.losses()
    assert len(seen) == 4
    for (whole, parts), space, count in ((seen[:2], "v", 60), (seen[2:], "r", 45)):
        assert torch.equal(members(whole, count), step.data[f"P_{space}_global"].bool())
        for i, part in enumerate(parts):
            # Recorded rows go by map, then query; ours by query, then map.
            ours = members(part, count).view(3, 3, 8, count).transpose(0, 1).flatten(0, 2)
            assert torch.equal(ours, step.data[f"part{i}_P_{space}"].bool())


def test_memories_after_the_update_equal_the_release(step, monkeypatch):
    """All prototypes are updated in one call; the recorded orders are those of each memory on its own."""
    calls = []
    monkeypatch.setattr(memory, "update", lambda *arguments: calls.append(arguments))
    build().update(step.output, step.batch, step.memories)
    assert len(calls) == 2
    for (bank, rows, labels, momentum, generator), space in zip(calls, "vr", strict=True):
        assert generator is step.batch.generator
        count = len(bank) // 7
        groups = [(f"m_{space}", [(kind, 0) for kind in range(3)], 1)]
        groups += [(f"m_{space}p{i}", [(q, seen[q]) for seen in PASSES.values() for q in (0, 1)], 3) for i in range(3)]
        groups += [(f"m_{space}pa{i}", [(0, seen[2]) for seen in PASSES.values()], 3) for i in range(3)]
        for slot, (name, runs, maps) in enumerate(groups):
            ours = (labels // count == slot).nonzero().view(-1, maps, 8)  # by query, map, image; theirs: by pass, query
            order = torch.cat([ours[query, kind] for query, kind in runs])[step.data[f"perm_{name}"]]
            bank = ops.memory_update_(bank.clone(), rows[order], labels[order], momentum)
            expected = step.data[f"after_{name}"]
            torch.testing.assert_close(bank[slot * count :][:count], expected, atol=1e-5, rtol=1e-5)


def test_the_update_reaches_every_group_of_prototypes(step):
    before = {name: bank.clone() for name, bank in step.memories.items()}
    build().update(step.output, step.batch, step.memories)
    for space in ("vis", "ir"):
        touched = (before[space] != step.memories[space]).any(2)
        labels = step.batch.labels(space)
        assert torch.equal(touched[0], members(labels.unsqueeze(0), touched.shape[1])[0])
        assert touched[1:].any(1).all()
        torch.testing.assert_close(step.memories[space].norm(dim=2), torch.ones(touched.shape))
        assert torch.equal(before[f"instances.{space}"], step.memories[f"instances.{space}"])


def test_the_papers_global_positives_leave_out_the_augmented_copy(step):
    paper = step.losses("salcr.gpcr.views=pair", "salcr.gpcr.mean=kind")
    torch.testing.assert_close(paper["gpcr.global"], 0.5 * step.data["paper_L_g"].float(), atol=1e-5, rtol=1e-5)


def cross_entropy(rows: Tensor, bank: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(rows @ bank.T / 0.05, labels)


def test_fgsal_by_kind_sums_a_mean_per_query_and_map(step):
    terms = step.losses("salcr.fgsal.mean=kind")
    step.memories["vis"][1:4] = F.normalize(torch.randn(3, 9, 32), dim=2)
    terms = step.losses("salcr.fgsal.mean=kind")
    expected = torch.zeros(())
    for part in range(3):
        for query in (0, 1):
            for space in ("vis", "ir"):
                labels = step.batch.labels(space).view(3, 8)[query]
                for kind in range(3):
                    rows = step.output.parts[part, query, kind]
                    expected = expected + cross_entropy(rows, step.memories[space][1 + part], labels) / 3
    torch.testing.assert_close(terms["fgsal.vis"], expected)


def test_gpcr_by_kind_sums_a_mean_per_query_and_map(step):
    by_bank, by_kind = step.losses(), step.losses("salcr.gpcr.mean=kind")
    expected = torch.zeros(())
    for space, letter in (("vis", "v"), ("ir", "r")):
        for part in range(3):
            mask = step.data[f"part{part}_P_{letter}"].bool().view(3, 3, 8, -1)  # by map, query, image
            for query in range(3):
                for kind in range(3):
                    rows, kept = step.output.parts[part, query, kind], mask[kind, query]
                    logits = rows @ step.memories[f"instances.{space}"][1 + part].T / 0.05
                    losses = logits.logsumexp(1) - logits.masked_fill(~kept, -torch.inf).logsumexp(1)
                    if kept.any():
                        expected = expected + losses[kept.any(1)].mean() / 3
    torch.testing.assert_close(by_kind["gpcr.part"], 0.5 * expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(by_kind["gpcr.part"], by_bank["gpcr.part"])


def test_the_slip_of_the_release_is_a_switch(step):
    slipped = Step()
    slipped.output.parts.data[:, 1, 2] = step.output.parts[:, 1, 0].detach()
    expected = slipped.losses()
    found = step.losses("salcr.fgsal.augmented_query_on_infrared=false")
    assert found.keys() == expected.keys()
    for name, term in found.items():
        torch.testing.assert_close(term, expected[name])
    assert not torch.allclose(found["fgsal.vis"], step.losses()["fgsal.vis"])
    torch.stack(list(found.values())).sum().backward()
    assert not step.inputs["feat1_pg1"].grad[8:, :96].any()  # augmented queries on infrared maps


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ((), ["dagl.vis", "dagl.ir", "fgsal.vis", "fgsal.ir", "gpcr.global", "gpcr.part"]),
        (("salcr.gpcr.level=global",), ["dagl.vis", "dagl.ir", "fgsal.vis", "fgsal.ir", "gpcr.global"]),
        (("salcr.gpcr.level=part",), ["dagl.vis", "dagl.ir", "fgsal.vis", "fgsal.ir", "gpcr.part"]),
        (("salcr.gpcr.enabled=false",), ["dagl.vis", "dagl.ir", "fgsal.vis", "fgsal.ir"]),
    ],
)
def test_modules_and_levels_are_switches(step, overrides, names):
    assert list(step.losses(*overrides)) == names
    assert list(step.losses(*overrides)) == names


def test_without_parts_gpcr_refines_global_features(step):
    step.output = replace(step.output, parts=None)
    step.memories = {name: bank[:1] for name, bank in step.memories.items()}
    assert list(step.losses()) == ["dagl.vis", "dagl.ir", "gpcr.global"]


def test_lambda_weighs_gpcr(step):
    light, heavy = step.losses("salcr.gpcr.weight=0.5"), step.losses("salcr.gpcr.weight=1.5")
    for name in ("gpcr.global", "gpcr.part"):
        torch.testing.assert_close(heavy[name], 3 * light[name])


def test_images_too_small_for_the_parts_are_noticed_when_the_network_is_built():
    assert build("data.size=[32,16]", "salcr.fgsal.parts=8").build().training
    with pytest.raises(UserError, match=r"salcr\.fgsal\.parts: the feature map has 8 positions, too few for 9 parts"):
        build("data.size=[32,16]", "salcr.fgsal.parts=9").build()


def test_no_positive_anywhere_is_zero_and_no_nan(step):
    """One neighbour each of a memory in which all views lie apart: nothing is shared."""
    rows = torch.eye(32)
    step.output = Output(rows[:24], rows[:24].clone().requires_grad_(), step.output.parts)
    step.memories["instances.vis"][0, :32], step.memories["instances.ir"][0, :32] = rows, rows
    terms = step.losses("salcr.gpcr.k=1")
    assert terms["gpcr.global"] == 0 and terms["gpcr.part"].isfinite()
    terms["gpcr.global"].backward()
    assert not step.output.features.grad.any()


def features(count: int = 12, width: int = 8) -> Features:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: F.normalize(torch.randn(*shape, generator=generator), dim=-1)
    return Features(
        Pair(draw(count, width), draw(count + 2, width)), Pair(draw(3, count, width), draw(3, count + 2, width))
    )


def labels() -> Labels:
    vis, ir = torch.arange(12) % 4 - 1, torch.arange(14) % 3 - 1
    return Labels(Pair(vis, ir), Pair(vis, ir), Pair(vis.clamp_max(1), ir))


def test_memories_hold_means_of_clusters_and_all_images_in_clusters():
    given, found = features(), labels()
    banks = build().memories(given, found)
    assert {name: tuple(bank.shape) for name, bank in banks.items()} == {
        "vis": (7, 3, 8),
        "instances.vis": (4, 9, 8),
        "ir": (7, 2, 8),
        "instances.ir": (4, 9, 8),
    }
    for space in ("vis", "ir"):
        own, count = found.clusters[space], found.counts[space]
        torch.testing.assert_close(banks[space][0], memory.cluster_memory(given.whole[space], own, count))
        for part in range(3):
            expected = memory.cluster_memory(given.parts[space][part], own, count)
            torch.testing.assert_close(banks[space][1 + part], expected)
            torch.testing.assert_close(banks[space][4 + part], expected)
            assert torch.equal(banks[f"instances.{space}"][1 + part], given.parts[space][part][own >= 0])
        assert torch.equal(banks[f"instances.{space}"][0], given.whole[space][own >= 0])


def test_a_module_that_is_off_has_no_memories():
    whole = Features(features().whole)
    assert set(build("salcr.gpcr.enabled=false").memories(features(), labels())) == {"vis", "ir"}
    assert build("salcr.gpcr.level=global").memories(features(), labels())["instances.vis"].shape == (1, 9, 8)
    banks = build("salcr.fgsal.enabled=false").memories(whole, labels())
    assert banks["vis"].shape == (1, 3, 8) and banks["instances.vis"].shape == (1, 9, 8)


@pytest.mark.parametrize("module", ["fgsal", "dagl"])
def test_a_network_without_fgsal_or_its_pairs_has_no_part_head(module):
    assert build().build().parts is not None
    assert build(f"salcr.{module}.enabled=false").build().parts is None


def test_the_readings_set_the_switches_that_are_left_empty():
    assert build().settings.fgsal.stripes == "floor" and build().settings.gpcr.views == "all"
    paper = build("salcr.reading=paper", "salcr.gpcr.views=all").settings
    assert (paper.fgsal.stripes, paper.fgsal.mean, paper.gpcr.mean) == ("ceil", "kind", "kind")
    assert paper.gpcr.views == "all" and paper.fgsal.augmented_query_on_infrared
    assert build("salcr.reading=paper").build().parts.uneven


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fgsal.parts=0", "fgsal.parts: expected at least 1 (for none, salcr.fgsal.enabled=false), got 0"),
        ("gpcr.k=0", "gpcr.k: expected at least 1, got 0"),
        ("gpcr.weight=-1", "gpcr.weight: expected at least 0, got -1"),
        ("cmfp.k=0", "cmfp.k: expected at least 1, got 0"),
        ("transport.reg=0", "transport.reg: expected a number above 0, got 0"),
        ("transport.tol=-1", "transport.tol: expected at least 0, got -1"),
        ("transport.max_iter=0", "transport.max_iter: expected at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused_before_a_run_begins(override, message):
    with pytest.raises(UserError, match=re.escape(f"salcr.{message}")):
        build(f"salcr.{override}")
