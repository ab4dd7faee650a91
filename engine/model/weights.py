"""Weights from elsewhere: ImageNet's from torchvision's state dicts, and two-stream networks that others released."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from engine import config
from engine.errors import UserError

# Names under which torchvision publishes its ResNet V1 weights.
FILES = {"resnet50": "resnet50-0676ba61.pth", "resnet18": "resnet18-f37072fd.pth"}
ADDRESS = "https://download.pytorch.org/models/"
RELEASED = {
    r"visible_module\.visible\.(conv1|bn1)\.": r"backbone.stems.vis.\1.",
    r"thermal_module\.thermal\.(conv1|bn1)\.": r"backbone.stems.ir.\1.",
    r"base_resnet\.base\.(layer[1-4])\.": r"backbone.\1.",
    r"NL_([1-4])\.(\d+)\.(theta|phi)\.": r"backbone.layer\1_relations.\2.\3.",
    r"NL_([1-4])\.(\d+)\.g\.0\.": r"backbone.layer\1_relations.\2.g.",
    r"NL_([1-4])\.(\d+)\.W\.0\.": r"backbone.layer\1_relations.\2.out.",
    r"NL_([1-4])\.(\d+)\.W\.1\.": r"backbone.layer\1_relations.\2.norm.",
    r"bottleneck\.": "neck.",
    r"bottleneck_part\.": "parts.neck.",
    r"attn_pool\.part_tokens$": "parts.prototypes",
}
"""Beginnings of parameter names in releases that build on AGW (ADCA, PGM, SALCR), and what they are here."""
WRAPPINGS = ("state_dict", "net", "model")
# A score or an epoch beside the weights is often NumPy's, which is no code.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMPY: list[Any] = [(_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
_NUMPY += [np.dtype, *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4"))]


def load(network: nn.Module, settings: config.Model) -> None:
    """Initialise a `Network` as `model.weights` says, and tell what was taken of a released network.

    Raises:
        UserError: no file, or one that is neither a single-stream state dict nor one of such a two-stream network.
    """
    path = _locate(settings)
    state = read(path)
    if any(name.startswith(("visible_module.", "base_resnet.")) for name in state):
        report = load_released(network, state, str(path))
        tqdm.write(str(report), file=sys.stderr)
    else:
        load_imagenet(network.get_submodule("backbone"), settings.backbone, state, settings.weights)


def load_imagenet(backbone: nn.Module, name: str, state: dict[str, Tensor], source: str) -> None:
    """Initialise both stems and the shared layers from one single-stream state dict.

    Args:
        name: of the backbone.
        source: of the state dict, for errors.

    Raises:
        UserError: it is not a state dict of this network.
    """
    missing = []
    for key, value in backbone.state_dict().items():
        single = key.split(".", 2)[2] if key.startswith("stems.") else key
        if single in state and state[single].shape == value.shape:
            value.copy_(state[single])
        elif not key.endswith("num_batches_tracked") and "_relations." not in key:
            missing.append(single)
    if missing:
        raise UserError(
            f"model.weights: {source} is not a state dict of {name}: {len(missing)} tensors are missing or have "
            f"another shape, first '{missing[0]}'; use torchvision's V1 file ({FILES.get(name, 'of another backbone')}), or "
            "weights that an AGW-style two-stream network was released with"
        )


@dataclass(frozen=True)
class Report:
    """What became of a released network's tensors.

    Attributes:
        source: the file.
        taken: names here.
        unused: names there that mean nothing here, or nothing in evaluation.
        fresh: names here that the file does not have, or has in another shape; they stay as they are.
        differing: of both, the shapes there and here, by name here.
    """

    source: str
    taken: list[str]
    unused: list[str]
    fresh: list[str]
    differing: dict[str, tuple[list[int], list[int]]]

    def __str__(self) -> str:
        lines = [f"{self.source}: {len(self.taken)} tensors taken"]
        for title, names in (("not used", self.unused), ("left as they were", self.fresh)):
            groups = Counter(".".join(name.split(".")[:3][: max(1, name.count("."))]) for name in names)
            if groups:
                lines.append(f"  {title}: " + ", ".join(f"{group} ({count})" for group, count in groups.items()))
        lines += [f"  {name}: shape {there} in the file, {here} here" for name, (there, here) in self.differing.items()]
        return "\n".join(lines)


@torch.no_grad()
def load_released(network: nn.Module, state: dict[str, Tensor], source: str) -> Report:
    """Initialise a `Network` from the state dict of an AGW-style two-stream ResNet.

    Part features, which evaluation does not look at, are taken where both have as many; all else must be there.

    Args:
        state: as `read` gives it.
        source: of the state dict, for the report and for errors.

    Raises:
        UserError: a tensor that the network needs is missing or has another shape, or one side has non-local blocks only.
    """
    given = {translate(name): name for name in state}
    own = network.state_dict()
    there, here = (any("_relations." in str(name) for name in names) for names in (given, own))
    if there != here:
        has = (
            "has non-local blocks, this network has none" if there else "has no non-local blocks, this network has some"
        )
        raise UserError(f"model.weights: {source} {has}; set model.non_local={str(there).lower()}")
    taken = [name for name, value in own.items() if name in given and state[given[name]].shape == value.shape]
    both = [name for name in own if name in given and name not in taken]
    differing = {name: (list(state[given[name]].shape), list(own[name].shape)) for name in both}
    fresh = [name for name in own if name not in taken and not name.endswith("num_batches_tracked")]
    unused = [name for name in state if translate(name) not in taken]
    report = Report(source, taken, unused, fresh, differing)
    missing = [name for name in fresh if not name.startswith("parts.")]
    if missing:
        raise UserError(
            f"model.weights: {source} does not fit this network: {len(missing)} tensors are missing or have another shape, "
            f"first '{missing[0]}'; check model.backbone. {report}"
        )
    for name in taken:
        own[name].copy_(state[given[name]])
    return report


def translate(name: str) -> str | None:
    """The name here of a released network's tensor; None where it has none."""
    for pattern, here in RELEASED.items():
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", here, name)
    return None


def _locate(settings: config.Model) -> Path:
    name, source = settings.backbone, settings.weights
    if source != "imagenet":
        if not Path(source).is_file():
            raise UserError(f"model.weights: no file {source}; give the path of a state dict, 'imagenet' or 'none'")
        return Path(source)
    if name not in FILES:
        raise UserError(f"model.weights: there are no ImageNet weights for backbone '{name}'; set model.weights=none")
    path = Path(torch.hub.get_dir()) / "checkpoints" / FILES[name]
    if path.is_file():
        return path
    if not settings.download:
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


def read(path: Path) -> dict[str, Tensor]:
    """A state dict on the CPU, out of what it is wrapped in. Nothing in the file is executed.

    Raises:
        UserError: it cannot be read so, or holds no state dict.
    """
    try:
        with torch.serialization.safe_globals(_NUMPY):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in many ways; all have one remedy
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error))
        if foreign:
            raise UserError(
                f"model.weights: {path} holds Python objects ({foreign[1]}), not tensors alone: loading them can run any code, "
                "so it is refused. Where you trust the file, save its state dict alone: "
                "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW), with the code that it comes from at hand"
            ) from error
        raise UserError(
            f"model.weights: {path} cannot be read ({type(error).__name__}); fetch the file again"
        ) from error
    if isinstance(content, dict) and {"network", "config"} <= content.keys():
        raise UserError(
            f"model.weights: {path} is a checkpoint of this engine; name it as RUN without --cfg, or in train.start_from"
        )
    for key in WRAPPINGS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"model.weights: {path} holds a {type(content).__name__}, expected a state dict")
    # DataParallel puts its own name before all.
    return {str(name).removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)}
