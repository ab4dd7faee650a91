"""Pre-norm transformer layers with CLIP's parameter names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """`[B, T, width]` both ways; `causal`: a token sees itself and those before it."""
        query, key, value = (self._heads(layer, x) for layer in (self.q_proj, self.k_proj, self.v_proj))
        found = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.out_proj(found.transpose(1, 2).flatten(2))

    def weights(self, x: Tensor) -> Tensor:
        """How much each token looks at each, `[B, heads, T, T]`, rows sum to 1; of tokens that see all."""
        query, key = (self._heads(layer, x) for layer in (self.q_proj, self.k_proj))
        return (query @ key.transpose(2, 3) / query.shape[3] ** 0.5).softmax(3)

    def _heads(self, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)


class Mlp(nn.Module):
    """Two linear layers around CLIP's quick GELU, `x sigmoid(1.702 x)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., width]` both ways."""
        hidden = self.fc1(x)
        return self.fc2(hidden * torch.sigmoid(1.702 * hidden))


class Layer(nn.Module):
    """`x + attention(norm x)`, then `x + mlp(norm x)`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.layer_norm1, self.self_attn = nn.LayerNorm(width), Attention(width, heads)
        self.layer_norm2, self.mlp = nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """`[B, T, width]` both ways."""
        x = x + self.self_attn(self.layer_norm1(x), causal)
        return x + self.mlp(self.layer_norm2(x))


def initialise(layers: nn.ModuleList, width: int) -> None:
    """CLIP's random start: sums over the depth keep their scale."""
    inner = width**-0.5 * (2 * len(layers)) ** -0.5
    scales = {"q_proj": width**-0.5, "k_proj": width**-0.5, "v_proj": width**-0.5, "out_proj": inner}
    scales |= {"fc1": (2 * width) ** -0.5, "fc2": inner}
    for name, module in layers.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=scales[name.rpartition(".")[2]])
            nn.init.zeros_(module.bias)
