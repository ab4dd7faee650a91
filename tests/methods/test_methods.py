"""DCL and SALCR's dual association: labels, losses, updates, readings, and how methods are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from engine import config, methods, ops
from engine.cluster import Labels
from engine.data.loader import Batch
from engine.errors import UserError
from engine.features import Features
from engine.model.network import Output
from engine.pair import Pair
from engine.phases import Phases

TIMES = Phases(torch.device("cpu"))
DATA = Path(__file__).parents[1] / "data"


def build(*overrides: str):
    loaded = config.load("demo.yaml", ["cluster.k1=6", "cluster.k2=3", "cluster.min_samples=2", *overrides])
    return methods.find(loaded.method.name)(loaded)


def unit(count: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)))


def people(per_person: int = 6, count: int = 5, apart: float = 0.5) -> Features:
    """Unit rows of `count` people, person after person; infrared ones lie off by a shared shift."""
    means, shift = unit(count, seed=1).repeat_interleave(per_person, 0), apart * unit(1, seed=2)
    vis, ir = (0.1 * torch.randn(len(means), 16, generator=torch.Generator().manual_seed(i)) for i in (3, 4))
    return Features(Pair(F.normalize(means + vis), F.normalize(means + shift + ir)))


def batch(size: int = 4, clusters: int = 3, cross: bool = True) -> Batch:
    labels = torch.arange(size) % clusters
    image = torch.zeros(size, 3, 1, 1)
    other = Pair((labels + 1) % clusters, (labels + 2) % clusters) if cross else None
    return Batch(image, image, image, Pair(labels, labels), other, torch.Generator().manual_seed(5))


def output(size: int = 4) -> Output:
    return Output(torch.zeros(3 * size, 16, 1, 1), unit(3 * size, seed=9).requires_grad_())


BANKS = {"vis": unit(3, seed=6), "ir": unit(3, seed=7)}
PAIRED = {name: bank.unsqueeze(0).clone() for name, bank in BANKS.items()}
DAGL = ("salcr.fgsal.enabled=false", "salcr.gpcr.enabled=false")


def cross_entropy(rows, bank, labels):
    return F.cross_entropy(rows @ bank.T / 0.05, labels)


def test_dcl_contrasts_each_kind_with_its_own_memory():
    terms = build("method.name=dcl").losses(out := output(), this := batch(cross=False), BANKS)
    vis, aug, ir = out.features.chunk(3)
    assert list(terms) == ["vis", "aug", "ir"]
    torch.testing.assert_close(terms["vis"], cross_entropy(vis, BANKS["vis"], this.own.vis))
    torch.testing.assert_close(terms["aug"], cross_entropy(aug, BANKS["vis"], this.own.vis))
    torch.testing.assert_close(terms["ir"], cross_entropy(ir, BANKS["ir"], this.own.ir))


def test_dagl_contrasts_all_rows_with_both_memories():
    out, this = output(), batch()
    vis_labels = torch.cat([this.own.vis, this.own.vis, this.cross.ir])
    ir_labels = torch.cat([this.cross.vis, this.cross.vis, this.own.ir])
    released = build(*DAGL).losses(out, this, PAIRED)
    torch.testing.assert_close(released["dagl.vis"], cross_entropy(out.features, BANKS["vis"], vis_labels))
    torch.testing.assert_close(released["dagl.ir"], cross_entropy(out.features, BANKS["ir"], ir_labels))
    paper = build("salcr.reading=paper", *DAGL).losses(out, this, PAIRED)
    kinds = zip(out.features.chunk(3), vis_labels.chunk(3), strict=True)
    torch.testing.assert_close(paper["dagl.vis"], sum(cross_entropy(x, BANKS["vis"], y) for x, y in kinds))


def test_stage_one_updates_augmented_rows_first_and_stage_two_in_a_drawn_order():
    method, out = build(), output()
    rows = out.features.detach()
    one = {name: bank.clone() for name, bank in BANKS.items()}
    this = batch(cross=False)
    method.update(out, this, one)
    expected = BANKS["vis"].clone()
    ops.memory_update_(expected, torch.cat([rows[4:8], rows[:4]]), this.own.vis.repeat(2), 0.1)
    torch.testing.assert_close(one["vis"], expected)
    two = {name: bank.clone() for name, bank in PAIRED.items()}
    method.update(out, this := batch(), two)
    generator = torch.Generator().manual_seed(5)
    for space in ("vis", "ir"):
        order, expected = torch.randperm(12, generator=generator), BANKS[space].clone()
        ops.memory_update_(expected, rows[order], this.labels(space)[order], 0.1)
        torch.testing.assert_close(two[space][0], expected)


@pytest.mark.parametrize("reading", ["released", "paper"])
def test_association_finds_the_same_people(reading):
    features = people()
    labels = build(f"salcr.reading={reading}", "salcr.cmfp.k=4").label(features, 1, TIMES)
    person = torch.arange(30) // 6
    for own, cross in zip(labels.own, labels.cross.swap(), strict=True):
        kept = (own >= 0) & (cross >= 0)
        assert kept.all()
        for label in own.unique():
            assert len(person[own == label].unique()) == 1
            assert person[own == label][0] == person[cross == label].mode().values


def test_stage_one_and_a_switched_off_module_do_not_associate():
    assert build().label(people(), 0, TIMES).cross is None
    assert build("salcr.dagl.enabled=false").label(people(), 1, TIMES).cross is None
    assert build("method.name=dcl").label(people(), 1, TIMES).cross is None


def test_outliers_carry_no_label_in_any_space():
    features = people()
    lonely = F.normalize(torch.randn(1, 16, generator=torch.Generator().manual_seed(11)))
    features = Features(Pair(torch.cat([lonely, features.whole.vis]), features.whole.ir))
    labels = build("cluster.eps=0.4").label(features, 1, TIMES)
    assert labels.clusters.vis[0] == labels.own.vis[0] == labels.cross.vis[0] == -1
    assert (labels.own.vis[1:] >= 0).any()


@pytest.mark.parametrize(("branch", "unused", "used"), [("visible", "vis", "ir"), ("infrared", "ir", "vis")])
def test_one_branch_links_in_one_label_space(branch, unused, used):
    labels = build(f"salcr.dagl.branch={branch}").label(people(), 1, TIMES)
    assert (labels.cross[unused] == -1).all()
    assert (labels.cross[used] >= 0).any()
    terms = build(f"salcr.dagl.branch={branch}", *DAGL).losses(output(), batch(), PAIRED)
    assert all(term.isfinite() for term in terms.values())


def test_relabel_is_a_switch(monkeypatch):
    features = people(apart=1.5)
    first = lambda rows, labels, means: torch.where(labels >= 0, 0, labels)
    monkeypatch.setattr("engine.methods.salcr.relabel_nearest", first)
    moved, kept = (build(f"salcr.dagl.relabel={on}").label(features, 1, TIMES) for on in ("true", "false"))
    assert (moved.own.vis == 0).all() and torch.equal(moved.clusters.vis, kept.clusters.vis)
    assert torch.equal(kept.own.vis, kept.clusters.vis) and torch.equal(kept.own.ir, kept.clusters.ir)


def test_cmfp_before_the_association_is_a_switch(monkeypatch):
    seen, cmfp = [], ops.cmfp

    def recorded(vis, ir, k):
        seen.append(k)
        return cmfp(vis, ir, k)

    monkeypatch.setattr(ops, "cmfp", recorded)
    build("salcr.cmfp.k=3").label(people(), 1, TIMES)
    assert seen == [3]
    build("salcr.cmfp.enabled=false").label(people(), 1, TIMES)
    assert seen == [3]


def test_memories_are_means_of_the_clusters_not_of_moved_labels():
    features = people()
    clusters = Pair(torch.arange(30) // 6, torch.arange(30) // 6)
    moved = clusters.map(lambda labels: torch.zeros_like(labels))
    banks = build().memories(features, Labels(clusters, moved, moved))
    torch.testing.assert_close(banks["vis"][0, 3], F.normalize(features.whole.vis[18:24].mean(0), dim=0))
    assert banks["ir"].shape == (1, 5, 16)


def test_describe_counts_clusters_and_outliers():
    found = Pair(torch.tensor([0, 1, -1, -1]), torch.tensor([0, 0]))
    numbers = build().describe(Labels(found, found))
    assert numbers == {"clusters.vis": 2, "outliers.vis": 2, "clusters.ir": 1, "outliers.ir": 0}


def test_a_researchers_own_method_is_one_file(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "softer.py").write_text(
        "from dataclasses import dataclass\nfrom engine.methods.base import Method\n\n"
        "class Softer(Method):\n    @dataclass(frozen=True)\n    class Settings:\n        weight: float = 0.5\n\n"
        "    def losses(self, output, batch, memories):\n"
        "        terms = super().losses(output, batch, memories)\n"
        "        return {name: self.settings.weight * term for name, term in terms.items()}\n"
    )
    (folder / "two.py").write_text(
        "from engine.methods.base import Method\nclass A(Method): pass\nclass B(Method): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    method = build("method.name=mine.softer", "softer.weight=0.25")
    this, out = batch(cross=False), output()
    plain = build("method.name=dcl").losses(out, this, BANKS)
    for name, term in method.losses(out, this, BANKS).items():
        torch.testing.assert_close(term, 0.25 * plain[name])
    with pytest.raises(UserError, match="softer.wait: no such setting"):
        build("method.name=mine.softer", "softer.wait=1")
    with pytest.raises(UserError, match="must define exactly one Method, found 2"):
        build("method.name=mine.two")
