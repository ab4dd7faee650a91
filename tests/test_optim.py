"""The optimiser, its groups and its schedule."""

from __future__ import annotations

import pytest
import torch
from small_runs import settings, start
from torch import nn

from engine import config, optim
from engine.errors import UserError
from engine.model.network import Network


def network():
    return Network(config.Model(backbone="small", weights="none"), parts=2)


def test_rates_shrink_layer_by_layer_below_the_heads():
    made = optim.build(net := network(), config.Optim(layer_decay=0.5))
    scales = {id(item): group["scale"] for group in made.param_groups for item in group["params"]}
    found = {name: scales[id(item)] for name, item in net.named_parameters() if item.requires_grad}
    assert len(scales) == len(found)
    assert found["neck.weight"] == found["parts.prototypes"] == 1
    assert found["backbone.layer4.0.conv1.weight"] == 0.5
    assert found["backbone.layer1.0.conv1.weight"] == 0.5**4
    assert found["backbone.stems.vis.conv1.weight"] == 0.5**5


def test_without_decay_all_parameters_are_one_group_in_order():
    made = optim.build(net := network(), config.Optim())
    (group,) = made.param_groups
    assert [id(item) for item in group["params"]] == [id(item) for item in net.parameters() if item.requires_grad]


def test_kinds_differ_in_what_weight_decay_does():
    """Without a gradient of the loss, AdamW shrinks weights by lr times decay; Adam takes the decay for a gradient."""
    for kind, expected in (("adamw", 2 * (1 - 0.1 * 0.5)), ("adam", 2 - 0.1)):
        made = optim.build(one := nn.Linear(1, 1, bias=False), config.Optim(kind=kind, lr=0.1, weight_decay=0.5))
        nn.init.constant_(one.weight, 2.0)
        one.weight.grad = torch.zeros_like(one.weight)
        made.step()
        assert one.weight.item() == pytest.approx(expected)


def test_a_cosine_falls_from_the_full_rate_towards_zero():
    chosen = config.Optim(lr=2.0, schedule="cosine")
    assert [optim.learning_rate(chosen, epoch, 4) for epoch in (0, 2)] == pytest.approx([2.0, 1.0])
    assert optim.learning_rate(chosen, 3, 4) == pytest.approx(1 - 0.5**0.5)


def test_the_rate_warms_up_over_iterations_and_keeps_the_groups_scales():
    made = optim.build(network(), chosen := config.Optim(lr=1.0, warm_up=4, layer_decay=0.5))
    rates = []
    for iteration in range(6):
        optim.set_rate(made, chosen, 1.0, iteration)
        rates.append([group["lr"] for group in made.param_groups])
    assert [first for first, *_ in rates] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert rates[1] == [0.5 * 0.5**above for above in range(6)]


def test_a_long_gradient_is_scaled_down_and_a_short_one_is_not():
    made = optim.build(one := nn.Linear(2, 1, bias=False), config.Optim())
    for length, expected in ((10.0, 5.0), (1.0, 1.0)):
        one.weight.grad = torch.tensor([[0.6, 0.8]]) * length
        optim.clip(made, 5.0)
        assert one.weight.grad.norm().item() == pytest.approx(expected, rel=1e-5)


def test_a_network_that_does_not_tell_its_layers_is_refused():
    with pytest.raises(UserError, match=r"optim\.layer_decay: Linear has no layers_above"):
        optim.build(nn.Linear(1, 1), config.Optim(layer_decay=0.9))


@pytest.mark.filterwarnings("ignore:.*not the complete data set", "ignore:.*labels")
def test_a_run_follows_its_schedule(sysu_tree, tmp_path, monkeypatch):
    chosen = ("optim.kind=adamw", "optim.schedule=cosine", "optim.warm_up=3", "optim.layer_decay=0.5", "optim.clip=0.1")
    one_stage = ["train.stages=[{epochs: 2, iterations: 2, labels: 2, images: 2}]", "train.warm_up.iterations=0"]
    run = start(settings(sysu_tree, tmp_path / "cache", *chosen, *one_stage, "evaluate.every=9"), tmp_path / "run")
    rates, norms = [], []
    step = torch.optim.AdamW.step

    def recorded(optimizer, *arguments, **named):
        learning = [item for group in optimizer.param_groups for item in group["params"]]
        norms.append(torch.cat([item.grad.flatten() for item in learning if item.grad is not None]).norm().item())
        rates.append(optimizer.param_groups[0]["lr"] / 1e-3)
        return step(optimizer, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    run.run()
    assert rates == pytest.approx([1 / 3, 2 / 3, 0.5, 0.5])
    assert max(norms) <= 0.1001
