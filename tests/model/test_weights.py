"""Networks that others released: names, wrappings, what is told and what is refused."""

from __future__ import annotations

import re
import runpy
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import settings, write_settings

from engine import trained
from engine.config import Model, to_dict
from engine.errors import UserError
from engine.model import weights
from engine.model.backbone import ARCHITECTURES, Relation, TwoStreamResNet
from engine.model.network import Network

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.filterwarnings("ignore:.*not the complete data set")
THERE = {
    r"backbone\.stems\.vis\.": "visible_module.visible.",
    r"backbone\.stems\.ir\.": "thermal_module.thermal.",
    r"backbone\.layer(\d)_relations\.(\d)\.g\.": r"NL_\1.\2.g.0.",
    r"backbone\.layer(\d)_relations\.(\d)\.out\.": r"NL_\1.\2.W.0.",
    r"backbone\.layer(\d)_relations\.(\d)\.norm\.": r"NL_\1.\2.W.1.",
    r"backbone\.layer(\d)_relations\.": r"NL_\1.",
    r"backbone\.": "base_resnet.base.",
    r"parts\.prototypes": "attn_pool.part_tokens",
    r"parts\.neck": "bottleneck_part",
    r"neck\.": "bottleneck.",
}
"""Names here, and what ADCA, PGM and SALCR call them."""


def build(seed: int, parts: int = 0, **changes: object) -> Network:
    """A network whose every tensor, statistics too, is drawn at random."""
    torch.manual_seed(seed)
    network = Network(Model(**{"backbone": "small", "weights": "none"} | changes), parts)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) + 0.5 if "var" in name else 0.2 * torch.randn_like(value))
    return network.eval()


def released(network: Network) -> dict[str, torch.Tensor]:
    """Its state dict as such a release has it: each modality has a whole ResNet, of which the stem alone is used."""
    state = {}
    for name, value in network.state_dict().items():
        pattern = next(pattern for pattern in THERE if re.match(pattern, name))
        state[re.sub(f"^{pattern}", THERE[pattern], name)] = value
    for place in ("visible_module.visible", "thermal_module.thermal"):
        state[f"{place}.layer1.0.conv1.weight"] = torch.rand(16, 16, 3, 3)
    return state | {"base_resnet.base.conv1.weight": torch.rand(16, 3, 3, 3), "classifier.weight": torch.rand(395, 128)}


def features(network: Network) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return network(vis=torch.randn(2, 3, 48, 24), ir=torch.randn(2, 3, 48, 24)).features


WRAPPINGS = {
    "bare": lambda state: state,
    "ordered": OrderedDict,
    "data parallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "checkpoint": lambda state: {
        "state_dict": {f"module.{name}": value for name, value in state.items()},
        "epoch": 50,
        "best_mAP": np.float64(0.5),
    },
    "net": lambda state: {"net": state, "cmc": np.float32(0.4)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_released_network_gives_the_features_it_was_released_with(tmp_path, wrapping, capsys):
    network = build(0)
    torch.save(WRAPPINGS[wrapping](released(network)), tmp_path / "released.pth.tar")
    torch.manual_seed(5)
    loaded = Network(Model("small", str(tmp_path / "released.pth.tar"))).eval()
    assert torch.equal(features(loaded), features(network))
    told = capsys.readouterr().err
    assert f"released.pth.tar: {len(network.state_dict())} tensors taken" in told
    unused = ["visible_module.visible.layer1 (1)", "thermal_module.thermal.layer1 (1)", "base_resnet.base.conv1 (1)"]
    assert f"not used: {', '.join(unused)}, classifier (1)" in told


def test_non_local_blocks_come_along_or_are_asked_for(tmp_path):
    network = build(0, non_local=True)
    names = set(released(network))
    # A sample of the names in the published code: two blocks in layer 2, three in layer 3, counted from 0.
    assert {"NL_2.0.g.0.weight", "NL_2.0.theta.bias", "NL_3.0.W.0.weight", "NL_3.0.W.1.running_mean"} <= names
    torch.save(released(network), tmp_path / "agw.pth")
    source = str(tmp_path / "agw.pth")
    assert torch.equal(features(Network(Model("small", source, non_local=True)).eval()), features(network))
    with pytest.raises(
        UserError, match=r"agw\.pth has non-local blocks, this network has none; set model\.non_local=true"
    ):
        Network(Model("small", source))
    torch.save(released(build(0)), tmp_path / "agw.pth")
    with pytest.raises(UserError, match=r"has no non-local blocks, this network has some; set model\.non_local=false"):
        Network(Model("small", source, non_local=True))


def test_non_local_blocks_relate_all_positions():
    with torch.device("meta"):
        backbone = TwoStreamResNet(ARCHITECTURES["resnet50"], True)
    assert [len(getattr(backbone, f"layer{i}_relations")) for i in (2, 3)] == [2, 3]
    relation, x = Relation(6), torch.randn(2, 6, 4, 3)
    assert torch.equal(relation.eval()(x), x)
    relation.norm.weight.data.normal_()
    theta, phi, g = (layer(x).flatten(2).transpose(1, 2) for layer in (relation.theta, relation.phi, relation.g))
    y = (theta @ phi.transpose(1, 2) / 12) @ g  # the N x N affinities, as they are defined
    expected = x + relation.norm(relation.out(y.transpose(1, 2).unflatten(2, (4, 3))))
    torch.testing.assert_close(relation(x), expected, atol=1e-5, rtol=1e-5)


def test_a_network_with_non_local_blocks_takes_imagenet_weights_and_knows_their_depth(tmp_path):
    network = Network(Model("small", "none", non_local=True))
    names = [name for name, _ in network.named_parameters() if "_relations" in name]
    assert {network.layers_above(name) for name in names} == {2, 3}
    state = {
        name.removeprefix("stems.vis."): torch.rand_like(value.float())
        for name, value in network.backbone.state_dict().items()
        if "_relations" not in name and not name.startswith("stems.ir")
    }
    torch.save(state, tmp_path / "single.pth")
    loaded = Network(Model("small", str(tmp_path / "single.pth"), non_local=True))
    assert torch.equal(loaded.backbone.stems["ir"].conv1.weight, state["conv1.weight"])


def test_parts_are_taken_where_there_are_as_many(tmp_path, capsys):
    network, path = build(0, parts=3), tmp_path / "salcr.pth"
    torch.save(released(network), path)
    loaded = Network(Model("small", str(path)), 3)
    assert torch.equal(loaded.parts.prototypes, network.parts.prototypes)
    assert torch.equal(loaded.parts.neck.running_mean, network.parts.neck.running_mean)
    capsys.readouterr()
    Network(Model("small", str(path)), 2)
    told = capsys.readouterr().err
    assert "left as they were: parts (1), parts.neck (4)" in told
    assert "parts.prototypes: shape [3, 128] in the file, [2, 128] here" in told


def test_another_network_is_refused_with_a_report(tmp_path):
    path = tmp_path / "released.pth"
    torch.save(released(build(0)), path)
    with pytest.raises(
        UserError, match=r"does not fit this network: \d+ tensors .*check model\.backbone\. .*tensors taken"
    ):
        Network(Model("resnet18", str(path)))
    state = released(build(0))
    del state["bottleneck.running_var"]
    torch.save(state, path)
    with pytest.raises(UserError, match="1 tensors are missing or have another shape, first 'neck.running_var'"):
        Network(Model("small", str(path)))


class Score:
    """Something that only its own code can load."""


def test_what_needs_code_to_load_is_refused_and_explained(tmp_path, sysu_tree):
    path = tmp_path / "released.pth"
    torch.save({"state_dict": released(build(0)), "score": Score()}, path)
    with pytest.raises(
        UserError, match=r"holds Python objects \(.*Score\).*any code, so it is refused.*state dict alone"
    ):
        weights.read(path)
    torch.save(build(0), path)
    with pytest.raises(UserError, match="holds Python objects"):
        weights.read(path)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read .*; fetch the file again"):
        weights.read(path)
    torch.save({"network": {}, "config": to_dict(settings(sysu_tree, tmp_path))}, path)
    with pytest.raises(UserError, match="is a checkpoint of this engine; name it as RUN without --cfg"):
        weights.read(path)


def test_names_without_a_meaning_here_have_none():
    for name in (
        "visible_module.visible.fc.weight",
        "base_resnet.base.bn1.weight",
        "adnet.x",
        "attn_pool.pos_embeding",
    ):
        assert weights.translate(name) is None
    assert weights.translate("thermal_module.thermal.bn1.weight") == "backbone.stems.ir.bn1.weight"


def test_a_released_network_is_scored_and_searched_with_without_a_run(sysu_tree, tmp_path, monkeypatch, capsys):
    def tool(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        assert runpy.run_path(str(ROOT / "tools" / name))["main"]() == 0
        return capsys.readouterr().out

    page, path = write_settings(sysu_tree, tmp_path / "cache", tmp_path / "own.yaml"), tmp_path / "released.pth"
    torch.save(released(build(0)), path)
    assert "| released.pth " in tool("evaluate.py", "--weights", path, "--cfg", page)
    camera, out = sysu_tree / "cam1", tmp_path / "features.npz"
    assert "128 dimensions" in tool("extract.py", path, camera, "--cfg", page, "--modality", "vis", "--out", out)
    with np.load(out) as file:
        images = trained.released(path, str(page)).network
        assert len(file["features"]) == len(list(camera.rglob("*.jpg"))) and not images.training
    for arguments in (["--weights", path], ["runs", "--cfg", page]):
        with pytest.raises(UserError, match="--weights and --cfg belong together"):
            tool("evaluate.py", *arguments)
