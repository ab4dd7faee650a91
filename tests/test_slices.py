"""Batches in slices: how they are cut and joined, and that the result is that of the whole batch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from small_runs import FIRM, settings
from torch import Tensor, nn

from engine import distributed, methods, shards
from engine.config import Config
from engine.errors import UserError
from engine.model.network import Network, Output
from engine.slices import Slices

BATCH = ("train.stages.0.images=4", "train.stages.1.images=4")  # 8 images of each kind


def run_settings(tmp_path, *overrides: str) -> Config:
    return settings(tmp_path, tmp_path, *BATCH, *overrides)


def slices(tmp_path, *overrides: str) -> Slices:
    loaded = run_settings(tmp_path, *overrides)
    return Slices(Network(loaded.model), loaded)


def test_runs_are_consecutive_and_as_equal_as_can_be():
    assert distributed.cut(7, 3) == [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert distributed.cut(2, 3) == [slice(0, 1), slice(1, 2), slice(2, 2)]
    assert distributed.cut(0, 1) == [slice(0, 0)]


def test_shares_are_of_whole_blocks(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 3)
    assert distributed.shares(10, 4) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert distributed.shares(3, 4) == [slice(0, 3), slice(3, 3), slice(3, 3)]


def test_rows_of_slices_join_to_the_whole_batch(tmp_path):
    """Also where kinds differ in size, where a slice is longer than the next, and with a sequence of pieces."""
    generator = torch.Generator().manual_seed(4)
    vis, ir = torch.randn(5, 3, generator=generator), torch.randn(10, 3, generator=generator)
    text = [torch.arange(5), torch.arange(5, 10)]

    def forward(vis, ir, vis_text):
        rows = torch.cat([vis, ir])
        assert torch.equal(vis_text[: len(vis)] + 5, vis_text[len(vis) :])
        return Output(rows, rows, classes=torch.stack([rows, -rows]), fused=None)

    cut = Slices(nn.Linear(1, 1), run_settings(tmp_path, "train.accumulate=3"))
    whole = cut.compute(forward, {"vis": vis, "ir": ir, "vis_text": text})
    rows = torch.cat([vis, ir])
    assert torch.equal(whole.features, rows) and torch.equal(whole.classes, torch.stack([rows, -rows]))
    assert len(whole.map) == 0 and whole.parts is None and whole.fused is None


def test_what_a_method_adds_to_the_output_is_joined_too(tmp_path):
    @dataclass(frozen=True)
    class Scored(Output):
        scores: Tensor | None = None

    def forward(vis):
        return Scored(vis, vis, scores=vis[:, :1])

    vis = torch.rand(5, 3)
    whole = Slices(nn.Linear(1, 1), run_settings(tmp_path, "train.accumulate=2")).compute(forward, {"vis": vis})
    assert isinstance(whole, Scored) and torch.equal(whole.scores, vis[:, :1])


def test_a_loss_that_uses_weights_is_refused_where_there_are_several_processes(monkeypatch):
    network = nn.Linear(3, 3)
    rows = distributed._Gather.apply(network(torch.rand(4, 3)), (4,))
    terms = {"good": rows.square().mean(), "bad": (rows @ network.weight).mean()}
    distributed.check_terms(terms, network)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    distributed.check_terms({"good": terms["good"], "constant": torch.zeros(())}, network)
    with pytest.raises(UserError, match="loss term 'bad' uses the weight 'weight', which several processes cannot"):
        distributed.check_terms(terms, network)


def test_what_a_part_draws_is_drawn_again_for_its_gradient(tmp_path):
    layer, loaded = nn.Linear(3, 4), run_settings(tmp_path, "train.accumulate=2")

    def forward(vis):
        return Output(vis, nn.functional.dropout(layer(vis), 0.5))

    output = Slices(layer, loaded).compute(forward, {"vis": torch.rand(6, 3)})
    output.features.sum().backward()
    assert torch.equal(layer.bias.grad, 2.0 * (output.features != 0).sum(0))


def test_batches_that_slices_or_groups_cannot_divide_are_refused(tmp_path, monkeypatch):
    for group in (5, 16):
        with pytest.raises(
            UserError, match=rf"model\.bn_group: a batch of 8 \+ 8 \+ 8 images .* into groups of {group}"
        ):
            slices(tmp_path, f"model.bn_group={group}")
    with pytest.raises(
        UserError, match=r"train\.accumulate=2: BatchNorm .* of 24 images of .* set model\.bn_group to 12, 6 or 3, "
    ):
        slices(tmp_path, "train.accumulate=2")
    with pytest.raises(
        UserError, match=r"of 8 \+ 8 \+ 8 images cannot be computed in 1 process, in 9 parts \(train\.accumu"
    ):
        slices(tmp_path, "train.accumulate=9")
    monkeypatch.setattr(distributed, "world", lambda: 3)
    with pytest.raises(UserError, match=r"groups of 12 of 8 \+ 8 \+ 8 images do not fit 3 processes; choose 0 for the"):
        slices(tmp_path, "model.bn_group=12")
    monkeypatch.setattr(distributed, "world", lambda: 4)
    with pytest.raises(UserError, match=r"of 12 images of .* set model\.bn_group to 3, which fit all"):
        slices(tmp_path, "model.bn_group=12", "train.accumulate=2")
    with pytest.raises(UserError, match=r"cannot be computed in 4 processes, each in 3 parts"):
        slices(tmp_path, "train.accumulate=3")


def test_what_a_refusal_recommends_is_accepted(tmp_path):
    """By all stages: with batches of 24 and of 16 images of a kind, few groups are."""
    stages = ("train.stages.0.images=12", "train.stages.1.images=8")
    with pytest.raises(UserError, match=r"groups of 10 .* set model\.bn_group to 24, 12, 6 or 3, which"):
        slices(tmp_path, *stages, "model.bn_group=10")
    with pytest.raises(UserError, match=r"set model\.bn_group to 6 or 3, which"):
        slices(tmp_path, *stages, "train.accumulate=4", "model.bn_group=24")
    with pytest.raises(UserError, match=r"no model\.bn_group fits .* train\.accumulate to one of 1, 2, 4, 8$"):
        slices(tmp_path, *stages, "train.accumulate=3")
    for group in (24, 12, 6, 3):
        slices(tmp_path, *stages, f"model.bn_group={group}")
    for group in (6, 3):
        slices(tmp_path, *stages, "train.accumulate=4", f"model.bn_group={group}")


def test_groups_lie_in_slices_or_span_them(tmp_path, monkeypatch):
    assert slices(tmp_path).groups([8, 8, 8]) == (1, 1)
    assert slices(tmp_path, "model.bn_group=6", "train.accumulate=2").groups([8, 8, 8]) == (2, 1)
    monkeypatch.setattr(distributed, "world", lambda: 4)
    assert slices(tmp_path).groups([8, 8, 16]) == (1, 4)
    assert slices(tmp_path, "model.bn_group=12").groups([8, 8, 8]) == (1, 2)
    assert slices(tmp_path, "model.bn_group=3").groups([8, 8, 8]) == (2, 1)
    monkeypatch.setattr(distributed, "world", lambda: 3)
    assert slices(tmp_path).groups([8, 8, 8]) == (1, 3)


@pytest.mark.parametrize("method", ["dcl", "firm"])
def test_methods_without_instance_memories_refuse_to_share_them_out(tmp_path, method):
    chosen = FIRM if method == "firm" else ("method.name=dcl",)
    loaded = run_settings(tmp_path, *chosen, "memory.shard=true")
    with pytest.raises(UserError, match=f"memory.shard: {method} has no memory with a row for every image"):
        methods.find(method)(loaded)


def test_a_memory_shared_out_among_one_is_whole():
    memories = {"bank": torch.arange(12.0).view(1, 4, 3), "other": torch.ones(2, 3)}
    shared = shards.share(memories, ["bank", "absent"])
    assert shards.equal(shared).keys() == {"other"}
    found = shards.whole(shared)
    assert all(torch.equal(found[name], bank) for name, bank in memories.items()) and found.keys() == memories.keys()
