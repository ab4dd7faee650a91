"""Two-stream ResNet: a stem per modality, all further layers shared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.model.norm import BatchNorm2d


@dataclass(frozen=True)
class Architecture:
    """Shape of a ResNet. Parameter names are torchvision's, so its state dicts fit."""

    bottleneck: bool
    blocks: tuple[int, int, int, int]
    width: int = 64
    kernel: int = 7
    max_pool: bool = True

    @property
    def channels(self) -> int:
        """Channels of the last feature map."""
        return self.width * 8 * (4 if self.bottleneck else 1)


ARCHITECTURES = {
    "resnet50": Architecture(True, (3, 4, 6, 3)),
    "resnet18": Architecture(False, (2, 2, 2, 2)),
    "small": Architecture(False, (1, 1, 1, 1), width=16, kernel=3, max_pool=False),
}


RELATIONS = (0, 2, 3, 0)
"""How many of the last blocks of each layer a `Relation` follows."""


class _Block(nn.Module):
    """Residual block of torchvision's ResNet V1.5: two 3x3 convolutions, or 1x1 - 3x3 - 1x1 when `bottleneck`."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = width * (4 if bottleneck else 1)
        if bottleneck:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            shapes = [(inputs, width, 3, stride), (width, outputs, 3, 1)]
        self.depth = len(shapes)
        for i, (ins, outs, kernel, step) in enumerate(shapes, 1):
            self.add_module(f"conv{i}", nn.Conv2d(ins, outs, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{i}", BatchNorm2d(outs))
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i in range(1, self.depth + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.depth:
                y = torch.relu(y)
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class _Stem(nn.Module):
    """conv1, bn1, relu and max-pool: the part that each modality has of its own."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        kernel = architecture.kernel
        self.conv1 = nn.Conv2d(3, architecture.width, kernel, 2, kernel // 2, bias=False)
        self.bn1 = BatchNorm2d(architecture.width)
        self.pool = nn.MaxPool2d(3, 2, 1) if architecture.max_pool else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(torch.relu(self.bn1(self.conv1(x))))


class Relation(nn.Module):
    """AGW's non-local block (Ye et al., TPAMI 2021) with one inner channel, which is how releases that build on it have it.

    `y_i = sum_j theta_i phi_j g_j / N` over the N positions of a map, then `x + norm(out(y))`. With one channel the affinities
    of all pairs factor, and `y = theta mean(phi g)`. The norm starts at 0: at first nothing changes.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta, self.phi, self.g = (nn.Conv2d(channels, 1, 1) for _ in range(3))
        self.out, self.norm = nn.Conv2d(1, channels, 1), BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, D, h, w]` both ways."""
        y = self.theta(x) * (self.phi(x) * self.g(x)).mean((2, 3), keepdim=True)
        return x + self.norm(self.out(y))


class TwoStreamResNet(nn.Module):
    """`stems.vis`, `stems.ir` and shared `layer1` ... `layer4`, the last with stride 1.

    A 288x144 image gives an 18x9 map. BatchNorm after the stems is shared and sees the modalities in one batch.

    Args:
        relations: a `Relation` follows each of the last two blocks of layer2 and the last three of layer3.
    """

    def __init__(self, architecture: Architecture, relations: bool = False) -> None:
        super().__init__()
        self.stems = nn.ModuleDict({modality: _Stem(architecture) for modality in ("vis", "ir")})
        inputs = architecture.width
        for i, count in enumerate(architecture.blocks):
            width, layer = architecture.width * 2**i, []
            for j in range(count):
                block = _Block(inputs, width, 2 if j == 0 and i in (1, 2) else 1, architecture.bottleneck)
                inputs = width * (4 if architecture.bottleneck else 1)
                layer.append(block)
            self.add_module(f"layer{i + 1}", nn.Sequential(*layer))
        for i, count in enumerate(RELATIONS if relations else (), start=1):
            blocks = architecture.blocks[i - 1]
            width = architecture.channels // 2 ** (4 - i)
            self.add_module(f"layer{i}_relations", nn.ModuleList(Relation(width) for _ in range(min(count, blocks))))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # As from ImageNet weights, both stems start equal: like edges then look alike to the shared layers at once.
        self.stems["ir"].load_state_dict(self.stems["vis"].state_dict())

    def forward(self, stems: dict[str, Tensor], order: Tensor | None = None) -> Tensor:
        """Feature map of all images.

        Args:
            stems: images `[B, 3, H, W]` float by stem name ("vis", "ir").
            order: `[sum of B]` int64 order in which the shared layers see the rows; None = as they come.

        Returns:
            `[sum of B, D, H / 16, W / 16]` (H / 8 without a max-pool).
        """
        x = torch.cat([self.stems[name](images) for name, images in stems.items()])
        if order is not None:
            x = x[order]
        for i in range(1, 5):
            layer, relations = getattr(self, f"layer{i}"), getattr(self, f"layer{i}_relations", ())
            if not relations:
                x = layer(x)
                continue
            for j, block in enumerate(layer, start=len(relations) - len(layer)):
                x = block(x) if j < 0 else relations[j](block(x))
        return x
