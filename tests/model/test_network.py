"""The network: shapes, stems, BatchNorm groups, ImageNet weights."""

from __future__ import annotations

import pytest
import torch

from engine.config import Model
from engine.errors import UserError
from engine.model import norm, weights
from engine.model.backbone import ARCHITECTURES, TwoStreamResNet
from engine.model.network import Network
from engine.model.pooling import GeM


def build(groups: int = 1, backbone: str = "small") -> Network:
    torch.manual_seed(0)
    network = Network(Model(backbone, "none"))
    norm.set_groups(norm.layers(network), groups)
    return network


def images(count: int = 4, size: tuple[int, int] = (32, 16)) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(count, 3, *size) for _ in range(3)]


@pytest.mark.parametrize(
    ("backbone", "shape"), [("resnet50", (2048, 4, 2)), ("resnet18", (512, 4, 2)), ("small", (128, 8, 4))]
)
def test_last_stride_is_one(backbone, shape):
    output = build(backbone=backbone).eval()(vis=torch.randn(1, 3, 64, 32))
    assert output.map.shape == (1, *shape)
    assert output.features.shape == (1, shape[0])
    torch.testing.assert_close(output.features.norm(dim=1), torch.ones(1))


def test_rows_are_visible_then_augmented_then_infrared():
    network, (vis, aug, ir) = build().eval(), images()
    together = network(vis, aug, ir).features
    apart = [network(vis=vis).features, network(vis=aug).features, network(ir=ir).features]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-5, rtol=1e-5)


def test_stems_start_equal_and_are_each_modalitys_own():
    network, (vis, _, _) = build().eval(), images()
    before = network(vis=vis).features
    assert torch.equal(before, network(ir=vis).features)
    with torch.no_grad():
        network.backbone.stems["ir"].conv1.weight.neg_()
    assert torch.equal(before, network(vis=vis).features)
    assert not torch.allclose(before, network(ir=vis).features)


@pytest.mark.parametrize("groups", [2, 4])
def test_a_batch_norm_group_is_what_one_of_several_devices_would_see(groups):
    vis, aug, ir = images(4)
    grouped = build(groups).train()(vis, aug, ir)
    step = 4 // groups
    parts = [build().train()(vis[i : i + step], aug[i : i + step], ir[i : i + step]) for i in range(0, 4, step)]
    for name in ("map", "features"):
        kinds = zip(*(getattr(part, name).chunk(3) for part in parts), strict=True)
        expected = torch.cat([torch.cat(kind) for kind in kinds])
        torch.testing.assert_close(getattr(grouped, name), expected, atol=1e-5, rtol=1e-4)


def test_groups_do_not_matter_in_evaluation():
    vis, aug, ir = images(4)
    torch.testing.assert_close(build(2).eval()(vis, aug, ir).features, build().eval()(vis, aug, ir).features)


def test_gem_of_a_constant_map_is_the_constant():
    torch.testing.assert_close(GeM()(torch.full((2, 3, 4, 2), 0.7)), torch.full((2, 3), 0.7))
    x = torch.rand(2, 3, 4, 2)
    torch.testing.assert_close(GeM()(x), ((x**3).mean((2, 3)) + 1e-12) ** (1 / 3))
    assert GeM()(torch.zeros(1, 1, 2, 2)).isfinite().all()


def single_stream(name: str) -> dict[str, torch.Tensor]:
    """A state dict with torchvision's names for a ResNet, random values."""
    state = {}
    for key, value in TwoStreamResNet(ARCHITECTURES[name]).state_dict().items():
        if not key.startswith("stems.ir"):
            state[key.removeprefix("stems.vis.")] = torch.rand_like(value.float()).to(value.dtype)
    return state | {"fc.weight": torch.rand(1000, ARCHITECTURES[name].channels), "fc.bias": torch.rand(1000)}


def test_names_are_those_of_torchvision():
    keys = set(single_stream("resnet50"))
    # A sample of the public file's keys: the stem, a bottleneck, a projection shortcut.
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv3.weight", "layer4.0.downsample.0.weight"} <= keys
    assert {"layer3.5.bn2.bias", "layer2.0.downsample.1.running_mean", "layer4.2.conv1.weight"} <= keys
    assert len([key for key in keys if "num_batches" not in key]) == 267  # 320 tensors with the 53 counters


def test_imagenet_weights_fill_both_stems(tmp_path, monkeypatch):
    state = single_stream("resnet18")
    path = tmp_path / "checkpoints" / weights.FILES["resnet18"]
    path.parent.mkdir()
    torch.save(state, path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for source in ("imagenet", str(path)):
        backbone = Network(Model("resnet18", source)).backbone.state_dict()
        for key, value in backbone.items():
            if not key.endswith("num_batches_tracked"):
                torch.testing.assert_close(value, state[key.split(".", 2)[2] if key.startswith("stems") else key])


def test_missing_weights_name_the_file_and_both_remedies(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"resnet50-0676ba61\.pth at .*model\.weights=PATH.*model\.download=true"):
        Network(Model("resnet50", "imagenet"))
    with pytest.raises(UserError, match="no file /nowhere"):
        Network(Model("resnet50", "/nowhere"))
    with pytest.raises(UserError, match="no ImageNet weights for backbone 'small'"):
        Network(Model("small", "imagenet"))


def test_a_failed_download_names_the_file(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UserError, match=r"could not be fetched \(no route\); put the file at"):
        Network(Model("resnet50", "imagenet", download=True))


def test_a_foreign_or_damaged_file_is_refused(tmp_path):
    damaged, foreign, other = tmp_path / "damaged.pth", tmp_path / "foreign.pth", tmp_path / "other.pth"
    damaged.write_bytes(b"nothing")
    torch.save({"conv1.weight": torch.zeros(3)}, foreign)
    torch.save([1, 2], other)
    with pytest.raises(UserError, match="cannot be read"):
        Network(Model("resnet18", str(damaged)))
    with pytest.raises(UserError, match=r"not a state dict of resnet18: \d+ tensors are missing"):
        Network(Model("resnet18", str(foreign)))
    with pytest.raises(UserError, match="holds a list"):
        Network(Model("resnet18", str(other)))
