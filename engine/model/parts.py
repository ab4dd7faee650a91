"""Part features of FGSAL: queries that adapt to the image, and attention that they guide (SALCR Eq. 9-11)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.errors import UserError
from engine.model.norm import BatchNorm1d

# Maps that the queries of each kind look at, pass after pass: first every query its own map, then the two others. The
# BatchNorm takes the rows of a pass as one batch.
_PASSES = {1: ((0,),), 3: ((0, 1, 2), (2, 2, 0), (1, 0, 1))}


class PartHead(nn.Module):
    """Feature maps -> unit-length part features of every query on every map of its group.

    The `h w` positions of a map, row after row, are cut into `count` stripes. Each part has a learnable prototype that all
    modalities share.

    Args:
        channels: D, of the feature map.
        count: N_p, the number of parts.
        uneven: stripes of ceil(h w / N_p) positions, the last one shorter (the paper); else of floor(h w / N_p), the
            remainder dropped (the released code).
    """

    def __init__(self, channels: int, count: int, uneven: bool) -> None:
        super().__init__()
        self.uneven = uneven
        # Small enough that the sigmoid of a product with a feature of thousands of channels is not saturated.
        self.prototypes = nn.Parameter(torch.empty(count, channels).normal_(std=0.02))
        self.neck = BatchNorm1d(count * channels)
        self.neck.bias.requires_grad_(False)

    def forward(self, maps: Tensor, kinds: int) -> Tensor:
        """`[N_p, Q, M, s, D]`: part features by part, kind of the query, kind of the map, image.

        Args:
            maps: `[kinds s, D, h, w]` float, the images of one kind after the other. With three kinds (visible, augmented,
                infrared) the i-th images of all kinds attend to each other.
            kinds: 1 or 3.

        Raises:
            UserError: the map has too few positions for the parts.
        """
        rows = maps.float().flatten(2).unflatten(0, (kinds, -1))  # [kinds, s, D, h w]
        raw = torch.stack(
            [_attend(stripe, prototype) for stripe, prototype in zip(self._stripes(rows), self.prototypes, strict=True)]
        )
        seen: dict[tuple[int, int], Tensor] = {}
        for one_pass in _PASSES[kinds]:
            looks = list(enumerate(one_pass))
            found = self._normalise(torch.stack([raw[:, query, kind] for query, kind in looks], dim=1))
            seen |= dict(zip(looks, found.unbind(1), strict=True))
        return torch.stack([torch.stack([seen[q, m] for m in range(kinds)], dim=1) for q in range(kinds)], dim=1)

    def attention(self, maps: Tensor) -> Tensor:
        """`[s, N_p, h, w]`: where in its stripe every part of an image looks on the image's own map (Eq. 10); 0 elsewhere.

        Args:
            maps: `[s, D, h, w]` float.
        """
        stripes = self._stripes(maps.float().flatten(2).unsqueeze(0))
        seen = maps.new_zeros(len(maps), len(stripes), maps[0, 0].numel(), dtype=torch.float32)
        start = 0
        for part, (stripe, prototype) in enumerate(zip(stripes, self.prototypes, strict=True)):
            end = start + stripe.shape[3]
            seen[:, part, start:end] = _attention(stripe, prototype)[0, :, 0]
            start = end
        return seen.unflatten(2, maps.shape[2:])

    def _stripes(self, rows: Tensor) -> tuple[Tensor, ...]:
        count, positions = len(self.prototypes), rows.shape[3]
        length = -(-positions // count) if self.uneven else positions // count
        stripes = rows[..., : count * length].split(length, dim=3) if length else ()
        if len(stripes) < count:
            raise UserError(
                f"salcr.fgsal.parts: the feature map has {positions} positions, too few for {count} parts; use fewer "
                "parts, or larger images (data.size)"
            )
        return stripes

    def _normalise(self, part: Tensor) -> Tensor:
        """BatchNorm over the parts' concatenation, then unit length per part; `[N_p, kinds, s, D]` both ways."""
        count, kinds, size, channels = part.shape
        groups = self.neck.groups if self.training else 1
        # A group of the BatchNorm is a run of rows: the same part of each kind of image.
        rows = part.permute(1, 2, 0, 3).reshape(kinds, groups, size // groups, count * channels).transpose(0, 1)
        normal = self.neck(rows.reshape(kinds * size, -1)).view(groups, kinds, size // groups, count, channels)
        return F.normalize(normal.permute(3, 1, 0, 2, 4).reshape(part.shape), dim=-1)


def _attend(stripe: Tensor, prototype: Tensor) -> Tensor:
    """One part's features of every query on every map, `[Q, M, s, D]` (Eq. 11); arguments as for `_attention`."""
    return (_attention(stripe, prototype) @ stripe.transpose(2, 3)).permute(2, 0, 1, 3)


def _attention(stripe: Tensor, prototype: Tensor) -> Tensor:
    """Where on every map one part's queries look, `[M, s, Q, n]`.

    Args:
        stripe: `[kinds, s, D, n]`; prototype: `[D]`.
    """
    weights = torch.einsum("ksdn,d->ksn", stripe, prototype).sigmoid()
    total = weights.sum(2, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)  # a sigmoid can underflow
    queries = torch.einsum("ksdn,ksn->skd", stripe, weights / total)  # Eq. 9
    return (queries @ stripe / stripe.shape[2] ** 0.5).softmax(3)  # Eq. 10
