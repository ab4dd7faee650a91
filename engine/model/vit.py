"""Vision transformer of CLIP, for images of any shape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.data.transforms import MEAN, STD
from engine.model.transformer import Layer, initialise

CLIP_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
CLIP_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


@dataclass(frozen=True)
class Shape:
    """Of a vision transformer.

    Attributes:
        taps: the blocks, counted from 1, whose tokens are given out.
        convolutions: patches are embedded by convolutions of stride 2 instead of one linear layer, which lets a small network
            learn from few images.
    """

    width: int
    layers: int
    heads: int
    patch: int
    taps: tuple[int, int, int, int]
    convolutions: bool = False


SHAPES = {
    "vit_b16": Shape(768, 12, 12, 16, (2, 6, 10, 12)),
    "vit_small": Shape(128, 4, 4, 16, (1, 2, 3, 4), True),
}


class VisionTransformer(nn.Module):
    """Images -> tokens: a class token, then one per patch, row after row.

    Args:
        shape: of the network.
        size: height and width of the images in pixels; a last patch that would overhang is left out, or, by convolutions,
            filled with zeros.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, shape: Shape, size: tuple[int, int]) -> None:
        super().__init__()
        self.taps = shape.taps
        overhang = shape.patch - 1 if shape.convolutions else 0
        self.grid = ((size[0] + overhang) // shape.patch, (size[1] + overhang) // shape.patch)
        spread = shape.width**-0.5
        self.class_embedding = nn.Parameter(spread * torch.randn(shape.width))
        self.patch_embedding: nn.Module
        if shape.convolutions:
            self.patch_embedding = _convolutions(shape.width, shape.patch)
        else:
            self.patch_embedding = nn.Conv2d(3, shape.width, shape.patch, shape.patch, bias=False)
        self.position_embedding = nn.Parameter(spread * torch.randn(1 + self.grid[0] * self.grid[1], shape.width))
        self.pre_norm, self.post_norm = nn.LayerNorm(shape.width), nn.LayerNorm(shape.width)
        self.layers = nn.ModuleList(Layer(shape.width, shape.heads) for _ in range(shape.layers))
        initialise(self.layers, shape.width)
        # Images come standardised by ImageNet's mean and deviation, CLIP was trained with its own.
        self.register_buffer("scale", STD / CLIP_STD, persistent=False)
        self.register_buffer("shift", (MEAN - CLIP_MEAN) / CLIP_STD, persistent=False)

    def forward(self, images: Tensor, inject: Callable[[Tensor, int], Tensor]) -> list[Tensor]:
        """Tokens `[B, 1 + patches, width]` at the taps, the last ones behind the final norm.

        Args:
            images: `[B, 3, H, W]` float, standardised by `engine.data.transforms`.
            inject: given a tap's tokens and number (0, 1, ...), what goes on to the next block in their place.
        """
        patches = self.patch_embedding(images * self.scale + self.shift).flatten(2).transpose(1, 2)
        first = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        x = self.pre_norm(torch.cat([first, patches], dim=1) + self.position_embedding)
        found: list[Tensor] = []
        for depth, layer in enumerate(self.layers, start=1):
            x = layer(x)
            if depth in self.taps:
                x = inject(x, len(found))
                found.append(x)
        return [*found[:-1], self.post_norm(found[-1])]


def _convolutions(width: int, patch: int) -> nn.Sequential:
    """3x3 convolutions of stride 2, as many as make one place of a patch, each twice as wide as the one before."""
    layers: list[nn.Module] = []
    channels = 3
    for wide in (width * 2**i // patch for i in range(1, patch.bit_length())):
        layers += [nn.Conv2d(channels, wide, 3, 2, 1, bias=False), nn.GroupNorm(4, wide), nn.ReLU()]
        channels = wide
    return nn.Sequential(*layers[:-1])


def interpolate(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Position embeddings of a square grid, `[1 + n n, width]` with the class token's first, for another grid."""
    first, rest = positions[:1], positions[1:]
    side = round(len(rest) ** 0.5)
    square = rest.T.unflatten(1, (side, side)).unsqueeze(0)
    return torch.cat([first, F.interpolate(square, grid, mode="bicubic", antialias=True)[0].flatten(1).T])
