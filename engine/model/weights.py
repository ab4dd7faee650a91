"""ImageNet initialisation from torchvision's state dicts, without torchvision."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from engine.errors import UserError
from engine.model.backbone import TwoStreamResNet

# Names under which torchvision publishes its ResNet V1 weights.
FILES = {"resnet50": "resnet50-0676ba61.pth", "resnet18": "resnet18-f37072fd.pth"}
ADDRESS = "https://download.pytorch.org/models/"


def load_imagenet(backbone: TwoStreamResNet, name: str, source: str, download: bool) -> None:
    """Initialise both stems and the shared layers from one single-stream state dict.

    Args:
        name: "resnet50" or "resnet18".
        source: "imagenet" for the hub cache's file, or the path of a state dict.
        download: fetch the hub's file when the cache does not hold it.

    Raises:
        UserError: no file, or a file that is not a state dict of this network.
    """
    state = _read(_locate(name, source, download))
    expected = backbone.state_dict()
    missing = []
    for key, value in expected.items():
        single = key.split(".", 2)[2] if key.startswith("stems.") else key
        if single in state and state[single].shape == value.shape:
            value.copy_(state[single])
        elif not key.endswith("num_batches_tracked"):
            missing.append(single)
    if missing:
        raise UserError(
            f"model.weights: {source} is not a state dict of {name}: {len(missing)} tensors are missing or have "
            f"another shape, first '{missing[0]}'; use torchvision's {name} V1 file ({FILES[name]})"
        )


def _locate(name: str, source: str, download: bool) -> Path:
    if name not in FILES:
        raise UserError(f"model.weights: there are no ImageNet weights for backbone '{name}'; set model.weights=none")
    if source != "imagenet":
        if not Path(source).is_file():
            raise UserError(f"model.weights: no file {source}; give the path of {FILES[name]}, 'imagenet' or 'none'")
        return Path(source)
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILES[name]
    if path.is_file():
        return path
    if not download:
        raise UserError(
            f"model.weights: no ImageNet weights for {name}. Put {ADDRESS}{FILES[name]} at {path}, or give its place "
            "by --set model.weights=PATH, or allow the download by --set model.download=true "
            "(or train from random weights: model.weights=none)"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(ADDRESS + FILES[name], str(path), hash_prefix=FILES[name].split("-")[1][:8])
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.weights: {ADDRESS}{FILES[name]} could not be fetched ({error}); put the file at {path}"
        ) from error
    return path


def _read(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways; all have one remedy
        raise UserError(f"model.weights: {path} cannot be read ({error}); fetch the file again") from error
    if not isinstance(state, dict):
        raise UserError(f"model.weights: {path} holds a {type(state).__name__}, expected a state dict")
    return state
