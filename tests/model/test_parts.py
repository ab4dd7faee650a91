"""The part head: the release's outputs and gradients, stripes, BatchNorm groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.config import Model
from engine.errors import UserError
from engine.model import norm
from engine.model.network import Network
from engine.model.norm import BatchNorm1d
from engine.model.parts import PartHead
from engine.model.pooling import GeM

DATA = Path(__file__).parents[1] / "data"


def maps(size: int = 4, channels: int = 8, height: int = 6, width: int = 3) -> Tensor:
    return torch.rand(3 * size, channels, height, width, generator=torch.Generator().manual_seed(0))


def head(count: int = 3, uneven: bool = False, channels: int = 8) -> PartHead:
    torch.manual_seed(1)
    found = PartHead(channels, count, uneven)
    torch.nn.init.normal_(found.prototypes)
    return found


RELEASED_PASSES = {"pg": (0, 1, 2), "pg1": (2, 2, 0), "pg2": (1, 0, 1)}


@pytest.fixture
def recorded() -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(DATA / "h1_fgsal_head_P3.npz").items()}


def released_head(recorded: dict[str, Tensor]) -> PartHead:
    found = PartHead(32, 3, uneven=False)
    with torch.no_grad():
        found.prototypes.copy_(recorded["part_tokens"])
        found.neck.weight.copy_(recorded["bnp_w"])
        found.neck.running_mean.copy_(recorded["bnp_mean0"])
        found.neck.running_var.copy_(recorded["bnp_var0"])
    return found


def by_query(rows: Tensor) -> Tensor:
    """Recorded `[3 s, 3 parts * 32]` rows of a pass -> `[part, query, image, channel]`."""
    return rows.view(3, 4, 3, 32).permute(2, 0, 1, 3)


def test_part_features_equal_the_release(recorded):
    released = released_head(recorded)
    own = released.eval()(recorded["x"], 1)[:, 0, 0]
    expected = recorded["eval_feat_pg"][:, :96].unflatten(1, (3, 32)).transpose(0, 1)
    torch.testing.assert_close(own, F.normalize(expected, dim=-1), atol=1e-5, rtol=1e-5)
    found = released.train()(recorded["x"], 3)
    for name, seen in RELEASED_PASSES.items():
        rows = by_query(recorded[f"feat_{name}"][:, :96])
        for query, kind in enumerate(seen):
            expected = F.normalize(rows[:, query], dim=-1)
            torch.testing.assert_close(found[:, query, kind], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(released.neck.running_mean, recorded["bnp_mean1"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(released.neck.running_var, recorded["bnp_var1"], atol=1e-5, rtol=1e-5)


def test_gradients_equal_the_release(recorded, monkeypatch):
    """The recorded loss weighs BatchNorm's outputs, of the global feature too, before they are scaled to unit length."""
    monkeypatch.setattr("engine.model.parts.F.normalize", lambda rows, dim: rows)
    released, pool, neck = released_head(recorded), GeM(), BatchNorm1d(32)
    with torch.no_grad():
        neck.weight.copy_(recorded["bng_w"])
    x = recorded["x"].clone().requires_grad_()
    found, whole = released(x, 3), neck(pool(x))
    loss = (recorded["w_g"] * whole).sum()
    for name, seen in RELEASED_PASSES.items():
        weights = recorded[f"w_{name}"]
        loss = loss + (weights[:, 96:] * whole).sum()
        for query, kind in enumerate(seen):
            loss = loss + (by_query(weights[:, :96])[:, query] * found[:, query, kind]).sum()
    loss.backward()
    torch.testing.assert_close(x.grad, recorded["grad_x"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(released.prototypes.grad, recorded["grad_part_tokens"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(released.neck.weight.grad, recorded["grad_bnp_w"], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(neck.weight.grad, recorded["grad_bng_w"], atol=1e-4, rtol=1e-4)


def by_hand(found: PartHead, x: Tensor, part: int, query: int, kind: int, image: int, length: int) -> Tensor:
    """Eq. 9-11 of one query on one map, position by position, before the BatchNorm."""
    rows = x.flatten(2).unflatten(0, (3, -1))[:, image, :, part * length : (part + 1) * length]
    own, other, prototype = rows[query].T, rows[kind].T, found.prototypes[part].detach()
    weights = [float(torch.sigmoid(position @ prototype)) for position in own]
    wanted = sum(weight * position for weight, position in zip(weights, own, strict=True)) / sum(weights)
    attention = torch.softmax(torch.stack([wanted @ position for position in other]) / len(prototype) ** 0.5, 0)
    return sum(weight * position for weight, position in zip(attention, other, strict=True))


@pytest.mark.parametrize(("uneven", "length"), [(False, 4), (True, 5)])
def test_stripes_drop_the_remainder_or_end_with_a_shorter_one(uneven, length, monkeypatch):
    """18 positions in 4 stripes: 4 each, or 5, 5, 5 and 3."""
    monkeypatch.setattr("engine.model.parts.F.normalize", lambda rows, dim: rows)
    cut, x = head(4, uneven), maps()
    monkeypatch.setattr(cut, "neck", Unchanged())
    features = cut(x, 3)
    assert features.shape == (4, 3, 3, 4, 8)
    for part, query, kind, image in [(0, 0, 0, 0), (3, 1, 2, 3), (3, 2, 0, 1), (2, 1, 0, 2)]:
        expected = by_hand(cut, x, part, query, kind, image, length)
        torch.testing.assert_close(features[part, query, kind, image], expected, atol=1e-5, rtol=1e-5)


class Unchanged(torch.nn.Module):
    """In place of a BatchNorm."""

    groups = 1

    def forward(self, rows: Tensor) -> Tensor:
        return rows


def test_one_kind_alone_looks_at_itself():
    cut, x = head().eval(), maps()
    alone, together = cut(x, 1), cut(x, 3)
    own = torch.stack([together[:, kind, kind] for kind in range(3)], dim=1).flatten(1, 2)
    assert alone.shape == (3, 1, 1, 12, 8)
    torch.testing.assert_close(alone[:, 0, 0], own, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("count", "uneven"), [(7, False), (4, True)])
def test_more_parts_than_a_map_has_room_for_are_refused(count, uneven):
    with pytest.raises(
        UserError, match=rf"salcr\.fgsal\.parts: the feature map has 6 positions, too few for {count} parts"
    ):
        head(count, uneven)(maps(height=2, width=3), 3)


def test_a_query_that_nothing_matches_is_no_nan():
    cut = head()
    with torch.no_grad():
        cut.prototypes.fill_(-1e4)
    assert cut(maps(), 3).isfinite().all()


def test_parts_come_from_stage_two_on_and_leave_the_rest_as_it_is():
    torch.manual_seed(0)
    plain = Network(Model("small", "none"))
    torch.manual_seed(0)
    network = Network(Model("small", "none"), parts=3)
    images = [torch.rand(4, 3, 48, 24, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    without = network(*images)
    torch.testing.assert_close(without.features, plain(*images).features, atol=0, rtol=0)
    assert without.parts is None and int(network.parts.neck.num_batches_tracked) == 0
    output = network(*images, stage=1)
    assert output.parts.shape == (3, 3, 3, 4, 128)
    torch.testing.assert_close(output.parts.norm(dim=-1), torch.ones(3, 3, 3, 4))
    assert network(vis=images[0], stage=1).parts.shape == (3, 1, 1, 4, 128)


def test_a_batch_norm_group_of_parts_is_what_one_of_several_devices_would_see():
    images = [torch.rand(4, 3, 48, 24, generator=torch.Generator().manual_seed(i)) for i in range(3)]

    def build(groups: int) -> Network:
        torch.manual_seed(0)
        network = Network(Model("small", "none"), parts=2)
        norm.set_groups(norm.layers(network), groups)
        return network.train()

    grouped = build(2)(*images, stage=1)
    halves = [build(1)(*(kind[i : i + 2] for kind in images), stage=1) for i in (0, 2)]
    torch.testing.assert_close(grouped.parts, torch.cat([half.parts for half in halves], 3), atol=1e-4, rtol=1e-4)
