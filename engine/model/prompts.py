"""Vision-semantic prompt fusion: captions injected into a vision transformer (FIRM Eq. 1-10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import config
from engine.errors import UserError
from engine.model import clip, text, vit
from engine.model.network import Output
from engine.model.text import Text, TextTransformer
from engine.model.vit import VisionTransformer

HEADS = 4


@dataclass(frozen=True)
class Vspf:
    """Vision-semantic prompt fusion (Eq. 1-10).

    The paper's text cannot be run as printed; a switch left empty follows `firm.literal`.

    Attributes:
        enabled: whether text is fused at all; without it captions are not read.
        blocks: those that text is injected at: "all" four (2, 6, 10, 12 of ViT-B/16) or the "last".
        residual: gated residuals at the first two blocks (Eq. 5); without them nothing is injected there.
        mixing: how text comes in at the last two: cross-attention (Eq. 6), or a linear layer of token and text, concatenated.
        keys: what the cross-attention looks at: all "tokens" of the caption, or one "vector", as printed, which makes it an
            addition.
        prefix: learnable tokens before the caption (Eq. 2).
        text_layers: layers of the text encoder, from the last, that learn; 0 as printed in sec. 3.2.2; more than it has:
            all of it, its words too, for encoders that start at random.
        compensation: the difference of texts is added to infrared features (Eq. 7-10).
    """

    enabled: bool = True
    blocks: Literal["all", "last"] = "all"
    residual: bool = True
    mixing: Literal["attention", "concat"] = "attention"
    keys: Literal["tokens", "vector"] | None = None
    prefix: int = 8
    text_layers: int | None = None
    compensation: bool = True


class GatedResidual(nn.Module):
    """`V' = V + sigmoid(t W_g) * (t W_t)` (Eq. 5); W_t is shared, and given applied."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(text_width, width, bias=False)

    def forward(self, x: Tensor, vector: Tensor, projected: Tensor) -> Tensor:
        """Tokens `[B, T, d]`, t `[B, d_t]`, t W_t `[B, d]` -> `[B, T, d]`."""
        return x + (self.gate(vector).sigmoid() * projected).unsqueeze(1)


class CrossAttention(nn.Module):
    """`V' = V + softmax(V W_Q (t W_K)^T / sqrt(d)) t W_V` in four heads (Eq. 6). W_V starts at 0: at first nothing changes."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(text_width, width, bias=False) for _ in range(2))
        nn.init.zeros_(self.value.weight)

    def forward(self, x: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """Tokens `[B, T, d]`, text `[B, K, d_t]` and which of it counts `[B, K]` bool -> `[B, T, d]`."""
        parts = (self.query(x), self.key(keys), self.value(keys))
        query, key, value = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in parts)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        return x + found.transpose(1, 2).flatten(2)


class Concat(nn.Module):
    """`V' = V + [V ; t] W`, what the ablation puts in the place of cross-attention. W starts at 0."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.mix = nn.Linear(width + text_width, width, bias=False)
        nn.init.zeros_(self.mix.weight)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """Tokens `[B, T, d]`, t `[B, d_t]` -> `[B, T, d]`."""
        return x + self.mix(torch.cat([x, vector.unsqueeze(1).expand(-1, x.shape[1], -1)], dim=2))


class Prompts(nn.Module):
    """The text encoder and all that brings its output to images."""

    def __init__(self, shape: text.Shape, width: int, settings: Vspf) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = TextTransformer(shape, settings.prefix, settings.text_layers or 0)
        self.project = nn.Linear(shape.width, width, bias=False)  # W_t
        nn.init.normal_(self.project.weight, std=0.02)
        self.gates = nn.ModuleList(GatedResidual(shape.width, width) for _ in range(2))
        kind = CrossAttention if settings.mixing == "attention" else Concat
        self.mixers = nn.ModuleList(kind(shape.width, width) for _ in range(2))
        self.levels = nn.Parameter(torch.zeros(3))  # alpha, before the softmax
        # Without biases, texts that do not differ compensate nothing.
        self.compensate = nn.Sequential(
            nn.Linear(width, width, bias=False),
            nn.GELU(),
            nn.Linear(width, width, bias=False),
            nn.LayerNorm(width, elementwise_affine=False),
        )
        self.strength = nn.Parameter(torch.tensor(0.1).logit())  # gamma, before the sigmoid that keeps it in [0, 1]

    def inject(self, x: Tensor, tap: int, seen: Text) -> Tensor:
        """Text into the tokens `[B, T, d]` of tap 0 to 3 (Eq. 4-6)."""
        settings = self.settings
        if settings.blocks == "last" and tap < 3:
            return x
        if tap < 2:
            vector = seen.vectors[tap]
            return self.gates[tap](x, vector, self.project(vector)) if settings.residual else x
        mixer = self.mixers[tap - 2]
        if settings.mixing == "concat":
            return mixer(x, seen.vectors[2])
        if settings.keys == "vector":
            keys = seen.vectors[2].unsqueeze(1)
            return mixer(x, keys, keys.new_ones(keys.shape[:2], dtype=torch.bool))
        return mixer(x, seen.tokens, seen.mask)

    def content(self, seen: Text) -> Tensor:
        """`sum_k alpha_k t_k W_t`, `[B, d]`: two captions' difference of it is Delta t (Eq. 7)."""
        return (self.levels.softmax(0).view(3, 1, 1) * self.project(seen.vectors)).sum(0)

    def fuse(self, features: Tensor, difference: Tensor) -> Tensor:
        """`f + gamma LN(MLP(Delta t))` (Eq. 8-10), both of unit length before the sum, and the sum after it.

        Args:
            features: `[B, d]` unit rows; difference: `[B, d]`.
        """
        shift = self.compensate(difference) / difference.shape[1] ** 0.5
        return F.normalize(features + self.strength.sigmoid() * shift)


class PromptNetwork(nn.Module):
    """Images and their captions -> unit-length features.

    Args:
        settings: the `model` section, with a vision transformer as backbone.
        size: of the images.
        vspf: without it captions are not looked at.
    """

    def __init__(self, settings: config.Model, size: tuple[int, int], vspf: Vspf) -> None:
        super().__init__()
        if settings.backbone not in vit.SHAPES:
            raise UserError(
                f"model.backbone: firm needs one of {', '.join(vit.SHAPES)}, got {settings.backbone}; "
                "see demo_firm.yaml and sysu_firm.yaml"
            )
        shape = vit.SHAPES[settings.backbone]
        self.vision = VisionTransformer(shape, size)
        self.depth = shape.layers
        prompts = Prompts(text.SHAPES[settings.backbone], shape.width, vspf)
        if settings.weights != "none":
            clip.load(self.vision, prompts.encoder, settings)
        self.prompts = prompts if vspf.enabled else None
        self.head = nn.Linear(2 * shape.width, shape.width, bias=False)  # W_o
        self.compensation = vspf.compensation

    def forward(
        self,
        vis: Tensor | None = None,
        aug: Tensor | None = None,
        ir: Tensor | None = None,
        *,
        vis_text: Tensor | None = None,
        ir_text: Tensor | None = None,
        paired: Tensor | None = None,
        stage: int = 0,
    ) -> Output:
        """Rows of `Output`: visible images, then other views of them, then infrared images.

        Args:
            vis, aug, ir: `[B, 3, H, W]` float images; None = none.
            vis_text, ir_text: `[B, L]` int64 tokens of the captions of visible images and other views, and of infrared ones;
                without them nothing is injected.
            paired: `[B]` bool, whether the i-th visible and the i-th infrared image are taken for one person. Then the
                visible caption says what the infrared one is compensated by; otherwise fused features are the plain ones.
            stage: not looked at.
        """
        images = torch.cat([part for part in (vis, aug, ir) if part is not None])
        texts = [part for part in (vis_text, ir_text) if part is not None]
        prompts, seen = self.prompts, None
        if prompts is not None and texts:
            seen = prompts.encoder(_stack(texts))
        tokens = self.vision(
            images, lambda x, tap: x if prompts is None or seen is None else prompts.inject(x, tap, seen)
        )
        last = tokens[-1]
        with torch.autocast(images.device.type, enabled=False):
            both = torch.cat([last[:, 0], last[:, 1:].mean(1)], dim=1).float()
            features = F.normalize(self.head(both))  # f^I, Eq. 9
            classes = torch.stack([part[:, 0] for part in tokens]).float()
            if prompts is None or seen is None:
                return Output(last, features, fused=features, classes=classes)
            content = prompts.content(seen)
            fused = features
            if paired is not None and self.compensation:
                vis_content, ir_content = content.chunk(2)
                difference = (vis_content - ir_content) * paired.unsqueeze(1)
                plain_vis, plain_ir = features.chunk(2)
                fused = torch.cat([plain_vis, prompts.fuse(plain_ir, difference)])
            return Output(last, features, fused=fused, classes=classes, content=content)

    def layers_above(self, name: str) -> int:
        """Layers between a parameter and the features: 0 for the heads' and the prompts', 1 for the last block's, ..."""
        parts = name.split(".")
        if parts[0] != "vision" or parts[1] == "post_norm":
            return 0
        return self.depth - int(parts[2]) if parts[1] == "layers" else self.depth + 1


def _stack(texts: list[Tensor]) -> Tensor:
    """Captions of both modalities in one batch, the shorter rows padded."""
    longest = max(part.shape[1] for part in texts)
    return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=-1) for part in texts])
