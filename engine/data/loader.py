"""Batches: rows of the decoded images, augmented on the device, with their pseudo-labels."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from engine import config, seeds
from engine.cluster import Labels
from engine.data import transforms
from engine.pair import Modality, Pair


@dataclass(frozen=True)
class Batch:
    """One training step's images and labels; s rows of each modality.

    Attributes:
        vis, aug, ir: `[s, 3, H, W]` float32: visible images, their channel-augmented copies (None without
            `augment.channels`), infrared images.
        own: `[s]` int64 labels of the images in their own modality's label space.
        cross: `[s]` int64 labels in the other modality's space, or None.
        generator: CPU generator for whatever the step still draws.
        texts: `[s, L]` int64 tokens of a caption of each image, -1 behind them, or None.
    """

    vis: Tensor
    aug: Tensor | None
    ir: Tensor
    own: Pair[Tensor]
    cross: Pair[Tensor] | None
    generator: torch.Generator
    texts: Pair[Tensor] | None = None

    def labels(self, space: Modality) -> Tensor:
        """`[3s]` labels of the rows [vis; aug; ir] in one modality's label space; -1 where a row has none there."""
        cross = self.cross or self.own.map(lambda labels: torch.full_like(labels, -1))
        vis, ir = (self.own.vis, cross.ir) if space == "vis" else (cross.vis, self.own.ir)
        return torch.cat([vis, vis, ir])


@dataclass(frozen=True)
class Views:
    """Two augmented views of the same images, on the device, for the warm-up.

    Attributes:
        first, second: `[B, 3, H, W]` float images per modality; the second of a visible image is its channel-augmented copy,
            where there are copies.
        texts: `[B, L]` int64 tokens of captions per modality, of the first views and of the second ones; none where
            images have none.
    """

    first: Pair[Tensor]
    second: Pair[Tensor]
    texts: tuple[Pair[Tensor], ...] = ()


class Loader:
    """Turns index batches into `Batch`es. Reading runs one batch ahead in a thread; augmentation runs on the device.

    Args:
        pixels: `[N, H, W, 3]` uint8 per modality, typically memory-mapped.
        key: seeds of the augmentation draws; step i of `batches` draws from `(*key, epoch, i)` alone.
        texts: `[N, variants, L]` int64 tokens of the images' captions, of which a batch has a random one each (FIRM Eq. 1).
    """

    def __init__(
        self,
        pixels: Pair[np.ndarray],
        settings: config.Augment,
        device: torch.device,
        key: tuple[int, ...],
        texts: Pair[Tensor] | None = None,
    ) -> None:
        self.pixels, self.settings, self.device, self.key, self.texts = pixels, settings, device, key, texts

    def batches(
        self, plan: Iterable[Pair[np.ndarray]], labels: Labels, epoch: int, *, ltg: bool, start: int = 0
    ) -> Iterator[Batch]:
        """One `Batch` per entry of `plan` from the `start`-th on; visible images see the LTG only when `ltg`."""
        host_own, host_cross = labels.own.map(Tensor.cpu), labels.cross and labels.cross.map(Tensor.cpu)
        for step, rows, images in self._read(plan, start):
            generator = seeds.generator(*self.key, epoch, step)
            aug: Tensor | None = None
            if self.settings.channels:
                vis, aug = transforms.augment_visible(images.vis, self.settings, generator, ltg=ltg)
                ir = transforms.augment_infrared(images.ir, self.settings, generator)
            else:
                vis, ir = images.map(lambda part: transforms.augment(part, self.settings, generator))  # noqa: B023
            index = rows.map(torch.from_numpy)
            own = host_own.map(lambda part, chosen: self._send(part[chosen]), index)
            cross = host_cross and host_cross.map(lambda part, chosen: self._send(part[chosen]), index)
            texts = self._draw_texts(index, generator, 1)
            yield Batch(vis, aug, ir, own, cross, generator, texts[0] if texts else None)

    def views(self, plan: Iterable[Pair[np.ndarray]]) -> Iterator[Views]:
        """Two augmented views of every image. They read different variants of its caption, where it has some."""
        for step, rows, images in self._read(plan, 0):
            generator = seeds.generator(*self.key, step)
            if self.settings.channels:
                vis, other = transforms.augment_visible(images.vis, self.settings, generator, ltg=True)
                infrared = transforms.augment_infrared
            else:
                vis, other = (transforms.augment(images.vis, self.settings, generator) for _ in range(2))
                infrared = transforms.augment
            ir, again = (infrared(images.ir, self.settings, generator) for _ in range(2))
            index = rows.map(torch.from_numpy)
            yield Views(Pair(vis, ir), Pair(other, again), self._draw_texts(index, generator, 2))

    def _draw_texts(self, rows: Pair[Tensor], generator: torch.Generator, count: int) -> tuple[Pair[Tensor], ...]:
        """`count` variants of each image's caption, a random one and those after it; nothing where there are none."""
        if self.texts is None:
            return ()
        variants = self.texts.map(
            lambda tokens, chosen: torch.randint(tokens.shape[1], chosen.shape, generator=generator), rows
        )

        def draw(after: int) -> Pair[Tensor]:
            assert self.texts is not None

            def read(tokens: Tensor, chosen: Tensor, variant: Tensor) -> Tensor:
                return self._send(tokens[chosen, (variant + after) % tokens.shape[1]])

            return self.texts.map(read, rows, variants)

        return tuple(draw(after) for after in range(count))

    def _read(
        self, plan: Iterable[Pair[np.ndarray]], start: int
    ) -> Iterator[tuple[int, Pair[np.ndarray], Pair[Tensor]]]:
        """(step, rows, images on the device) from the `start`-th entry on; the next images are read meanwhile."""

        def gather(rows: Pair[np.ndarray]) -> Pair[Tensor]:
            images = self.pixels.map(lambda pixels, chosen: torch.from_numpy(pixels[chosen]), rows)
            return images.map(Tensor.pin_memory) if self.device.type == "cuda" else images

        with ThreadPoolExecutor(1) as reader:
            ahead: deque[tuple[int, Pair[np.ndarray], Future[Pair[Tensor]]]] = deque()
            for step, rows in islice(enumerate(plan), start, None):
                ahead.append((step, rows, reader.submit(gather, rows)))
                if len(ahead) > 1:
                    yield self._deliver(*ahead.popleft())
            while ahead:
                yield self._deliver(*ahead.popleft())

    def _deliver(
        self, step: int, rows: Pair[np.ndarray], images: Future[Pair[Tensor]]
    ) -> tuple[int, Pair[np.ndarray], Pair[Tensor]]:
        return step, rows, images.result().map(self._send)

    def _send(self, part: Tensor) -> Tensor:
        return part.to(self.device, non_blocking=True)
