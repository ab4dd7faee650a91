"""Text transformer of CLIP with a learnable prefix (FIRM Eq. 2, 3), and words as its tokens."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.model.transformer import Layer, initialise

START, END, OTHERS = 0, 1, 2
Tokenizer = Callable[[Sequence[str]], list[list[int]]]
"""Texts -> their tokens, a start token first and an end token last."""


@dataclass(frozen=True)
class Shape:
    """Of a text transformer: `vocabulary` tokens, sequences of at most `positions`."""

    width: int
    layers: int
    heads: int
    vocabulary: int
    positions: int = 77


SHAPES = {"vit_b16": Shape(512, 12, 8, 49408), "vit_small": Shape(64, 3, 4, 8192)}


@dataclass(frozen=True)
class Text:
    """What the encoder tells of B captions.

    Attributes:
        vectors: `[3, B, d_t]` t_1, t_2, t_3: the state of the end token, which has seen all others, after a third, two thirds
            and all of the layers, behind the final norm.
        tokens: `[B, T, d_t]` all states after the last layer, behind the final norm.
        mask: `[B, T]` bool, whether a token is one of the caption's.
    """

    vectors: Tensor
    tokens: Tensor
    mask: Tensor


class TextTransformer(nn.Module):
    """Captions -> `Text`.

    Args:
        shape: of the network.
        prefix: number of learnable tokens between the start token and the caption.
        learning: layers, counted from the last, that learn besides the prefix; all other parameters stay as they are. More
            than there are: everything learns.
    """

    def __init__(self, shape: Shape, prefix: int, learning: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.position_embedding = nn.Parameter(torch.empty(shape.positions, shape.width).normal_(std=0.01))
        self.prefix = nn.Parameter(torch.empty(prefix, shape.width).normal_(std=0.02))
        self.layers = nn.ModuleList(Layer(shape.width, shape.heads) for _ in range(shape.layers))
        self.final_norm = nn.LayerNorm(shape.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        initialise(self.layers, shape.width)
        self.requires_grad_(learning > shape.layers)
        self.prefix.requires_grad_(True)
        self.layers[max(0, shape.layers - learning) :].requires_grad_(True)

    def forward(self, tokens: Tensor) -> Text:
        """`[B, L]` int64, each row a start token, the caption's and an end token, then -1."""
        batch, count = len(tokens), len(self.prefix)
        words = self.token_embedding(tokens.clamp(min=0))
        x = torch.cat([words[:, :1], self.prefix.expand(batch, -1, -1), words[:, 1:]], dim=1)
        x = x + self.position_embedding[: x.shape[1]]
        mask = torch.cat([tokens.new_ones(batch, count, dtype=torch.bool), tokens >= 0], dim=1)
        end = mask.sum(1) - 1
        rows = torch.arange(batch, device=tokens.device)
        vectors = []
        for depth, layer in enumerate(self.layers, start=1):
            x = layer(x, causal=True)  # no token sees the empty places behind the last one
            if 3 * depth % len(self.layers) == 0:
                vectors.append(self.final_norm(x[rows, end]))
        return Text(torch.stack(vectors), self.final_norm(x), mask)


def hashed_words(vocabulary: int, longest: int) -> Tokenizer:
    """A tokenizer that needs no list of words: a word's token is its checksum. Punctuation marks are words."""

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        found = (re.findall(r"\w+|[^\w\s]", text.lower())[: longest - 2] for text in texts)
        return [
            [START, *(OTHERS + zlib.crc32(word.encode()) % (vocabulary - OTHERS) for word in words), END]
            for words in found
        ]

    return tokenize


def encode(texts: Sequence[Sequence[str]], tokenize: Tokenizer) -> Tensor:
    """Tokens of captions, `[N, variants, L]` int64, -1 behind each.

    Args:
        texts: per variant (description, paraphrase) the N captions.
    """
    rows = [tokenize([f": {caption} ." for caption in captions]) for captions in texts]
    longest = max((len(row) for variant in rows for row in variant), default=2)
    found = torch.full((len(texts[0]), len(texts), longest), -1)
    for i_variant, variant in enumerate(rows):
        for i_row, row in enumerate(variant):
            found[i_row, i_variant, : len(row)] = torch.tensor(row)
    return found
