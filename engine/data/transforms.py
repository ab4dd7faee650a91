"""Augmentation of whole batches on their device, each image with its own random draws (SALCR, sec. 4.2).

All draws are made on the CPU from the generator that is given, as small tensors with a row per image that are then moved:
CPU and GPU see the same draws, and nothing waits for the device. The order of operations is that of the public code that
the paper builds on, and the paper's text names no other: pad and crop, flip, colour jitter, LTG, normalise, erase, channel
operation. So erased pixels get ImageNet's mean, and channels are exchanged and mixed, after normalisation. The private
functions change the float planes in place: fresh memory costs a CPU more than the arithmetic.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional

from engine.config import Augment

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # of ImageNet
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
GREY = (0.2989, 0.587, 0.114)  # luma weights of ITU-R BT.601
ERASED_AREA = (0.02, 0.4)
ERASED_ASPECT = (0.3, 1 / 0.3)
RECTANGLE_ATTEMPTS = 10
LTG_RECTANGLES = 4


def normalize(images: Tensor) -> Tensor:
    """Pixels as the network takes them: scaled to [0, 1], then by ImageNet's mean and standard deviation.

    Args:
        images: [B, H, W, 3] uint8.

    Returns:
        [B, 3, H, W] float32.
    """
    return _standardize(_to_planes(images))


def augment_visible(images: Tensor, settings: Augment, generator: Generator, *, ltg: bool) -> tuple[Tensor, Tensor]:
    """Two views of each visible image, drawn independently: the original and the channel-augmented copy.

    Both are cropped, flipped and erased. The original goes through LTG with probability `settings.ltg` when `ltg` is set
    (stage 1). The copy is colour-jittered and shows one random channel three times.

    Args:
        images: [B, H, W, 3] uint8.
        generator: on the CPU.

    Returns:
        Two [B, 3, H, W] float32, normalised.
    """
    original = _crop_and_flip(images, settings, generator)
    if ltg:
        original = _scale_rectangles(original, settings.ltg, generator)
    original = _erase(_standardize(original), settings.erase, generator)
    augmented = augment(images, settings, generator)
    channels = torch.randint(3, (len(images), 1), generator=generator).expand(-1, 3)
    return original, _pick_planes(augmented, channels)


def augment_infrared(images: Tensor, settings: Augment, generator: Generator) -> Tensor:
    """One view of each infrared image: cropped, flipped, colour-jittered, erased, and one of four channel operations.

    These have equal chances: channel 0, 1 or 2 three times, or, with probability `settings.grey`, the grey mix of the
    channels, else no change.

    Args:
        images: [B, H, W, 3] uint8.
        generator: on the CPU.

    Returns:
        [B, 3, H, W] float32, normalised.
    """
    planes = augment(images, settings, generator)
    grey = _grey(planes)
    choice = torch.randint(4, (len(images),), generator=generator)
    unchanged = torch.rand(len(images), generator=generator) >= settings.grey
    table = torch.tensor([[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3], [0, 1, 2]])
    return _pick_planes(torch.cat([planes, grey], dim=1), table[choice + ((choice == 3) & unchanged)])


def augment(images: Tensor, settings: Augment, generator: Generator) -> Tensor:
    """One view of each image of either modality: cropped, flipped, colour-jittered and erased; channels stay as they are.

    Args:
        images: [B, H, W, 3] uint8.
        generator: on the CPU.

    Returns:
        [B, 3, H, W] float32, normalised.
    """
    planes = _jitter(_crop_and_flip(images, settings, generator), settings.jitter, generator)
    return _erase(_standardize(planes), settings.erase, generator)


def _to_planes(images: Tensor) -> Tensor:
    return images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _standardize(planes: Tensor) -> Tensor:
    return planes.sub_(_beside(planes, MEAN)).div_(_beside(planes, STD))


def _beside(planes: Tensor, draws: Tensor) -> Tensor:
    """A small CPU tensor on the images' device, without waiting for it."""
    return draws.to(planes.device, non_blocking=True)


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _pick_planes(planes: Tensor, index: Tensor) -> Tensor:
    """[B, P, H, W] and the planes [B, 3] that each image takes -> [B, 3, H, W]."""
    count = planes.shape[1]
    flat = (index + count * torch.arange(len(index)).view(-1, 1)).flatten()
    return planes.flatten(0, 1).index_select(0, _beside(planes, flat)).view(-1, 3, *planes.shape[2:])


def _crop_and_flip(images: Tensor, settings: Augment, generator: Generator) -> Tensor:
    """Zero-pad, crop at a random place, flip at random; [B, H, W, 3] uint8 -> [B, 3, H, W] float32 in [0, 1]."""
    batch, height, width, _ = images.shape
    pad = settings.pad
    top, left = torch.randint(2 * pad + 1, (2, batch, 1), generator=generator)
    flipped = torch.rand(batch, 1, generator=generator) < settings.flip
    rows = torch.arange(height) + top
    columns = torch.where(flipped, torch.arange(width).flip(0), torch.arange(width)) + left
    padded = functional.pad(images, (0, 0, pad, pad, pad, pad))
    first = torch.arange(batch).view(-1, 1, 1) * padded.shape[1] * padded.shape[2]
    starts = first + rows.unsqueeze(2) * padded.shape[2]
    pixels = _beside(images, starts) + _beside(images, columns.unsqueeze(1))
    return _to_planes(padded.flatten(0, 2).index_select(0, pixels.flatten()).view(images.shape))


def _grey(planes: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 1, H, W] luma."""
    red, green, blue = planes.unbind(1)
    return (red * GREY[0]).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2]).unsqueeze(1)


def _jitter(planes: Tensor, strength: float, generator: Generator) -> Tensor:
    """Brightness, contrast, saturation and hue changes in a random order per image, as torchvision's ColorJitter.

    The first three blend the image with black, its mean grey and its grey version by a factor in
    [1 - strength, 1 + strength]; the hue turns by at most `strength` of the circle, [-.5, .5] at most. Input and output
    are in [0, 1].
    """
    if strength == 0:
        return planes
    batch = len(planes)
    factors = _uniform(max(0.0, 1 - strength), 1 + strength, (batch, 3), generator)
    turns = _uniform(-min(strength, 0.5), min(strength, 0.5), (batch,), generator)
    order = torch.rand(batch, 4, generator=generator).argsort(1)
    for operation in order.unbind(1):
        hue = operation == 3
        factor = factors.gather(1, operation.clamp(max=2).view(-1, 1)).masked_fill(hue.view(-1, 1), 1)
        _blend(planes, operation, factor)
        rows = _beside(planes, hue.nonzero().flatten())
        planes.index_copy_(0, rows, _turn_hue(planes.index_select(0, rows), turns[hue]))
    return planes


def _blend(planes: Tensor, operation: Tensor, factor: Tensor) -> Tensor:
    """`factor * image + (1 - factor) * other`, clipped; other is black, mean grey or grey for operation 0, 1 or 2."""

    def weight(of: int) -> Tensor:
        return _beside(planes, ((1 - factor) * (operation == of).view(-1, 1)).view(-1, 1, 1, 1))

    grey = _grey(planes)
    other = grey.mean((2, 3), keepdim=True) * weight(1) + grey * weight(2)
    return planes.mul_(_beside(planes, factor.view(-1, 1, 1, 1))).add_(other).clamp_(0, 1)


def _turn_hue(planes: Tensor, turns: Tensor) -> Tensor:
    """Add `turns` of the circle to the hue in HSV space.

    With value v, chroma c and hue h in sixths, the channels are v - c clip(min(k, 4 - k), 0, 1), k = (n + h) mod 6, for
    n = 5, 3, 1.
    """
    red, green, blue = planes.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    is_red, is_green = (value == red).float(), (value == green).float()
    difference = torch.lerp(torch.lerp(red - green, blue - red, is_green), green - blue, is_red)  # where() is slow
    hue = difference.div_(chroma.clamp(min=1e-12))  # where chroma is 0, any hue will do
    hue += (4 - 2 * is_green).mul_(1 - is_red)
    hue += _beside(planes, (6 * turns).view(-1, 1, 1))
    turned = torch.empty_like(planes)
    for channel, n in zip(turned.unbind(1), (5, 3, 1), strict=True):
        place = hue + n
        place -= torch.floor(place / 6).mul_(6)  # remainder() is several times slower
        torch.minimum(place, 4 - place, out=place).clamp_(0, 1)
        torch.addcmul(value, place, chroma, value=-1, out=channel)
    return turned


def _rectangles(count: int, size: tuple[int, int], probability: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Random rectangles as masks of rows [count, H] and of columns [count, W], empty with probability 1 - `probability`.

    Area and aspect ratio are uniform; what does not fit the image is drawn again, a few times.
    """
    height, width = size
    area = _uniform(*ERASED_AREA, (count, RECTANGLE_ATTEMPTS), generator) * height * width
    aspect = _uniform(*ERASED_ASPECT, (count, RECTANGLE_ATTEMPTS), generator)
    heights, widths = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (heights < height) & (widths < width)
    chosen = fits.to(torch.uint8).argmax(1, keepdim=True)
    exists = fits.gather(1, chosen) & (torch.rand(count, 1, generator=generator) < probability)

    def mask(lengths: Tensor, length: int) -> Tensor:
        extent = lengths.gather(1, chosen)
        start = (torch.rand(count, 1, generator=generator) * (length - extent + 1)).floor()
        place = torch.arange(length)
        return (place >= start) & (place < start + extent) & exists

    return mask(heights, height), mask(widths, width)


def _erase(planes: Tensor, probability: float, generator: Generator) -> Tensor:
    """Fill a random rectangle with ImageNet's mean, which the release does after normalisation."""
    rows, columns = _rectangles(len(planes), (planes.shape[2], planes.shape[3]), probability, generator)
    tall, wide = rows[:, None, :, None].float(), columns[:, None, None, :].float()
    return planes.lerp_(_beside(planes, MEAN), _beside(planes, tall) * _beside(planes, wide))


def _scale_rectangles(planes: Tensor, probability: float, generator: Generator) -> Tensor:
    """Linear transformation generator (Tan et al., arXiv 2302.00884), on pixels in [0, 1].

    A surface answers another wavelength with another linear factor. So in a few random rectangles, sized as erased ones,
    each channel is scaled by a factor of its own from Beta(.5, .5), overlaps by both.
    """
    batch, count, size = len(planes), LTG_RECTANGLES, (planes.shape[2], planes.shape[3])
    rows, columns = _rectangles(batch * count, size, 1.0, generator)
    chosen = torch.rand(batch, 1, 1, generator=generator) < probability
    uniform = torch.rand(batch, count, 3, generator=generator)
    factors = (uniform * (math.pi / 2)).sin().square()  # Beta(.5, .5) is the arcsine law
    change = torch.where(chosen, factors - 1, 0)
    for i_rectangle in range(count):
        tall = rows.view(batch, count, 1, -1, 1)[:, i_rectangle] * change[:, i_rectangle, :, None, None]
        wide = columns.view(batch, count, 1, 1, -1)[:, i_rectangle].float()
        planes.addcmul_(planes, _beside(planes, tall) * _beside(planes, wide))
    return planes
