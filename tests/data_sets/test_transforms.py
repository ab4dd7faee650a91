"""Augmentation: each operation against a plain formula, each probability against its count, each image on its own."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from engine.config import Augment
from engine.data import transforms

NONE = Augment(pad=0, flip=0, erase=0, jitter=0, grey=0, ltg=0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels(batch: int = 6, height: int = 12, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (batch, height, width, 3), generator=generator(seed), dtype=torch.uint8)


def planes(batch: int = 6, height: int = 12, width: int = 8) -> torch.Tensor:
    return pixels(batch, height, width).permute(0, 3, 1, 2) / 255


def same(batch: int, height: int = 6, width: int = 4) -> torch.Tensor:
    """The same image `batch` times: whatever differs in the output was drawn."""
    return pixels(1, height, width).expand(batch, -1, -1, -1)


def share(flags: torch.Tensor) -> float:
    return flags.double().mean().item()


def near(probability: float, count: int) -> float:
    """Five standard deviations of a share of `count` draws."""
    return 5 * math.sqrt(probability * (1 - probability) / count)


def views(images: torch.Tensor, settings: Augment, seed: int = 0, ltg: bool = True) -> list[torch.Tensor]:
    draws = generator(seed)
    original, augmented = transforms.augment_visible(images, settings, draws, ltg=ltg)
    return [original, augmented, transforms.augment_infrared(images, settings, draws)]


# The whole


def test_normalize_is_imagenets():
    images = pixels()
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (images.numpy() / 255 - mean) / std
    got = transforms.normalize(images)
    assert got.dtype == torch.float32 and got.is_contiguous()
    np.testing.assert_allclose(got.permute(0, 2, 3, 1).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_nothing_switched_on_is_normalisation_but_for_the_channels():
    images = pixels()
    original, augmented, infrared = views(images, NONE)
    plain = transforms.normalize(images)
    assert torch.equal(original, plain)
    for image, view in zip(plain, augmented, strict=True):
        assert any(torch.equal(view, channel.expand(3, -1, -1)) for channel in image)
    for image, view in zip(plain, infrared, strict=True):
        assert torch.equal(view, image) or any(torch.equal(view, channel.expand(3, -1, -1)) for channel in image)


def test_the_input_is_left_alone():
    images = pixels()
    before = images.clone()
    views(images, Augment(pad=2))
    assert torch.equal(images, before)


def test_a_generator_decides_everything():
    images = pixels()
    first, again, other = (views(images, Augment(pad=2), seed) for seed in (3, 3, 4))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert a.shape == (6, 3, 12, 8) and a.dtype == torch.float32 and torch.isfinite(a).all()


def test_global_random_state_is_neither_read_nor_changed():
    images = pixels()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = views(images, Augment(pad=2))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, views(images, Augment(pad=2)), strict=True))


def test_every_image_has_draws_of_its_own():
    for view in views(same(16, 24, 12), Augment(pad=2)):
        assert len({image.numpy().tobytes() for image in view}) == 16


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    images, others = pixels(), pixels(seed=9)
    others[2] = images[2]
    for a, b in zip(views(images, Augment(pad=2)), views(others, Augment(pad=2)), strict=True):
        assert torch.equal(a[2], b[2]) and not torch.equal(a[1], b[1])


def test_original_and_copy_are_cropped_and_flipped_apart():
    images = same(64, 12, 8)
    settings = Augment(pad=3, flip=0.5, erase=0, jitter=0, grey=0, ltg=0)
    original, augmented, _ = views(images, settings)
    pairs = zip(original, augmented, strict=True)
    agree = [any(torch.equal(copy[0], channel) for channel in view) for view, copy in pairs]
    assert sum(agree) < 16


def test_ltg_is_for_the_original_of_stage_one_only():
    images = pixels()
    settings = Augment(pad=0, flip=0, erase=0, jitter=0, grey=0, ltg=1)
    plain = transforms.normalize(images)
    with_it, _ = transforms.augment_visible(images, settings, generator(), ltg=True)
    without, _ = transforms.augment_visible(images, settings, generator(), ltg=False)
    assert not torch.equal(with_it, plain) and torch.equal(without, plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_sees_the_draws_of_the_cpu():
    images = pixels(32, 24, 12)
    moved = images.cuda()
    torch.cuda.set_sync_debug_mode("error")  # nothing may wait for the device
    try:
        on_gpu = views(moved, Augment(pad=2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for here, there in zip(views(images, Augment(pad=2)), on_gpu, strict=True):
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)


# Crop and flip


def test_crops_are_windows_of_the_zero_padded_image():
    image = pixels(1, 6, 4)
    settings = Augment(pad=2, flip=0.5)
    padded = np.pad(image[0].numpy(), ((2, 2), (2, 2), (0, 0)))
    windows = {}
    for top in range(5):
        for left in range(5):
            window = padded[top : top + 6, left : left + 4]
            windows[window.tobytes()] = (top, left, False)
            windows[np.ascontiguousarray(window[:, ::-1]).tobytes()] = (top, left, True)
    assert len(windows) == 50
    got = transforms._crop_and_flip(image.expand(5000, -1, -1, -1), settings, generator())
    found = [
        windows[view.tobytes()] for view in (got.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).contiguous().numpy()
    ]
    places = np.bincount([top * 5 + left for top, left, _ in found], minlength=25) / len(found)
    assert np.abs(places - 1 / 25).max() < near(1 / 25, 5000)
    assert abs(np.mean([flipped for *_, flipped in found]) - 0.5) < near(0.5, 5000)


@pytest.mark.parametrize("probability", [0.0, 0.2, 1.0])
def test_flips_come_with_their_probability(probability):
    images = same(2000)
    got = transforms._crop_and_flip(images, Augment(pad=0, flip=probability), generator())
    flipped = (got == got[0]).flatten(1).all(1)
    mirrored = transforms._to_planes(images).flip(3)
    assert abs(share((got == mirrored).flatten(1).all(1)) - probability) <= near(probability, 2000)
    assert probability in (0.0, 1.0) or 0 < share(flipped) < 1


# Colour jitter


ENHANCE = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


@pytest.mark.parametrize("operation", [0, 1, 2])
@pytest.mark.parametrize("factor", [0.5, 0.8, 1.0, 1.3, 1.5])
def test_blends_are_those_of_pillow(operation, factor):
    images = pixels(3)
    got = transforms._blend(transforms._to_planes(images), torch.full((3,), operation), torch.full((3, 1), factor))
    for image, view in zip(images, got, strict=True):
        expected = np.asarray(ENHANCE[operation](Image.fromarray(image.numpy())).enhance(factor))
        assert np.abs(view.permute(1, 2, 0).numpy() * 255 - expected).max() < 1.6  # Pillow rounds in between


def test_blends_differ_per_image():
    images = pixels(3)
    operations, factors = torch.tensor([2, 0, 1]), torch.tensor([[0.5], [1.5], [0.7]])
    got = transforms._blend(transforms._to_planes(images), operations, factors)
    for row in range(3):
        alone = transforms._to_planes(images[row : row + 1])
        alone = transforms._blend(alone, operations[row : row + 1], factors[row : row + 1])
        torch.testing.assert_close(got[row : row + 1], alone)


def test_hue_turns_as_in_hsv():
    images = planes(5, 7, 5)
    images[0] = images[0, :1]  # grey pixels have no hue
    images[1, :, 0] = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0]]).T
    turns = torch.tensor([0.3, -0.5, 0.5, 0.123, 0.0])
    got = transforms._turn_hue(images, turns)
    for image, turn, view in zip(images, turns.tolist(), got, strict=True):
        for before, after in zip(image.flatten(1).T.tolist(), view.flatten(1).T.tolist(), strict=True):
            hue, saturation, value = colorsys.rgb_to_hsv(*before)
            np.testing.assert_allclose(after, colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value), atol=2e-5)


def test_jitter_draws_factors_and_turns_from_their_ranges():
    """On one pixel, brightness can be read from the value where nothing clips, and hue from the hue."""
    batch = 4000
    pixel = torch.tensor([0.4, 0.2, 0.2]).view(1, 3, 1, 1).expand(batch, -1, -1, -1).clone()
    view = transforms._jitter(pixel, 0.5, generator())
    assert (view >= 0).all() and (view <= 1).all()
    hues = np.array([colorsys.rgb_to_hsv(*values)[0] for values in view.flatten(1).tolist()])
    counts = np.histogram(hues, bins=8, range=(0, 1))[0] / batch
    assert np.abs(counts - 1 / 8).max() < near(1 / 8, batch)
    assert view.amax((1, 2, 3)).max() > 0.55 and view.amax((1, 2, 3)).min() < 0.22


def test_jitter_orders_are_all_taken(monkeypatch):
    seen = []
    monkeypatch.setattr(transforms, "_blend", lambda _, operation, factor: seen.append(operation.clone()))
    monkeypatch.setattr(transforms, "_turn_hue", lambda planes, _: planes)
    transforms._jitter(torch.zeros(4800, 3, 1, 1), 0.5, generator())
    orders = torch.stack(seen, 1)
    assert torch.equal(orders.sort(1).values, torch.arange(4).expand(4800, -1))
    found, counts = orders.unique(dim=0, return_counts=True)
    assert len(found) == 24 and abs(counts / 4800 - 1 / 24).max() < near(1 / 24, 4800)


def test_jitter_equals_its_operations_one_by_one(monkeypatch):
    images = planes(5)
    steps = []
    blend, turn = transforms._blend, transforms._turn_hue

    def blend_and_note(planes, operation, factor):
        steps.append([operation.tolist(), factor.flatten().tolist(), []])
        return blend(planes, operation, factor)

    def turn_and_note(planes, turns):
        steps[-1][2] = turns.tolist()
        return turn(planes, turns)

    monkeypatch.setattr(transforms, "_blend", blend_and_note)
    monkeypatch.setattr(transforms, "_turn_hue", turn_and_note)
    got = transforms._jitter(images.clone(), 0.5, generator(5))
    for row in range(5):
        view = images[row : row + 1].clone()
        for operations, factors, turns in steps:
            if operations[row] == 3:
                hues = [index for index, operation in enumerate(operations) if operation == 3]
                view = turn(view, torch.tensor([turns[hues.index(row)]]))
                assert abs(turns[hues.index(row)]) <= 0.5
            else:
                assert 0.5 <= factors[row] <= 1.5
                blend(view, torch.tensor([operations[row]]), torch.tensor([[factors[row]]]))
        torch.testing.assert_close(got[row : row + 1], view)


def test_strong_jitter_keeps_factors_above_zero_and_hue_within_the_circle(monkeypatch):
    turns = []
    monkeypatch.setattr(transforms, "_turn_hue", lambda planes, turned: turns.append(turned) or planes)
    view = transforms._jitter(planes(500), 2.0, generator())
    assert (view >= 0).all() and torch.cat(turns).abs().max() <= 0.5


# Rectangles


def inside(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return rows[:, :, None] & columns[:, None, :]


def test_rectangles_have_the_areas_and_aspects_asked_for():
    height, width, count = 96, 48, 4000
    rows, columns = transforms._rectangles(count, (height, width), 1.0, generator())
    heights, widths = rows.sum(1).double(), columns.sum(1).double()
    assert (heights >= 1).all() and (widths >= 1).all() and (heights < height).all() and (widths < width).all()
    areas, aspects = heights * widths / (height * width), heights / widths
    assert 0.015 < areas.min() < 0.05 and 0.36 < areas.max() < 0.42
    assert 0.2 < aspects.min() < 0.5 and 2.9 < aspects.max() < 3.9
    for mask in (rows, columns):  # one run each, and every place reached
        assert (mask.int().diff(dim=1).abs().sum(1) <= 2).all() and mask.any(0).all()


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_rectangles_come_with_their_probability(probability):
    masks = inside(*transforms._rectangles(3000, (24, 12), probability, generator()))
    assert abs(share(masks.any(2).any(1)) - probability) <= near(probability, 3000)


def test_erased_pixels_are_imagenets_mean_and_the_others_untouched():
    before = planes(400, 24, 12)
    after = transforms._erase(before.clone(), 0.5, generator())
    changed = (after != before).any(1)
    fill = torch.tensor([0.485, 0.456, 0.406])
    assert torch.equal(after.permute(0, 2, 3, 1)[changed], fill.expand(int(changed.sum()), 3))
    erased = changed.flatten(1).any(1)
    assert abs(share(erased) - 0.5) < near(0.5, 400)
    assert torch.equal(after[~erased], before[~erased])


def test_erasing_follows_normalisation():
    original, _ = transforms.augment_visible(
        pixels(50, 24, 12), Augment(pad=0, flip=0, erase=1, jitter=0, ltg=0), generator(), ltg=False
    )
    assert (original == transforms.MEAN).all(1).flatten(1).any(1).all()


def test_tiny_images_are_never_overrun():
    for size in ((1, 1), (2, 1), (3, 50)):
        masks = inside(*transforms._rectangles(50, size, 1.0, generator()))
        assert masks.shape == (50, *size) and not masks.flatten(1).all(1).any()


# LTG


def test_ltg_scales_channels_apart_in_a_part_of_the_image():
    ones = torch.ones(1000, 3, 24, 12)
    scaled = transforms._scale_rectangles(ones.clone(), 0.5, generator())
    changed = (scaled != 1).any(1)
    chosen = changed.flatten(1).any(1)
    assert abs(share(chosen) - 0.5) < near(0.5, 1000)
    assert (scaled >= 0).all() and (scaled <= 1).all()
    assert 0.4 < share(changed[chosen]) < 0.75
    first = scaled[chosen].permute(0, 2, 3, 1)[changed[chosen]]
    assert share((first[:, 0] - first[:, 1]).abs() > 1e-3) > 0.9


def test_ltg_factors_are_beta_distributed(monkeypatch):
    monkeypatch.setattr(transforms, "LTG_RECTANGLES", 1)
    scaled = transforms._scale_rectangles(torch.ones(4000, 3, 24, 12), 1.0, generator())
    factors = scaled.amin((2, 3)).flatten()
    for level in (0.1, 0.5, 0.9):
        expected = 2 / math.pi * math.asin(math.sqrt(level))
        assert abs(share(factors < level) - expected) < near(expected, len(factors))


# Channels


def test_visible_copies_show_each_channel_equally_often():
    images = same(3000)
    plain = transforms.normalize(images)[0]
    _, augmented = transforms.augment_visible(images, NONE, generator(), ltg=False)
    shares = [share((augmented == channel).flatten(1).all(1)) for channel in plain]
    assert sum(shares) == pytest.approx(1) and max(abs(value - 1 / 3) for value in shares) < near(1 / 3, 3000)


@pytest.mark.parametrize("grey", [0.0, 0.5, 1.0])
def test_infrared_takes_one_of_four_channel_operations(grey):
    images = same(4000)
    plain = transforms.normalize(images)[0]
    mix = (plain * torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)).sum(0)
    got = transforms.augment_infrared(images, Augment(pad=0, flip=0, erase=0, jitter=0, grey=grey), generator())
    for expected, probability in (*((channel, 0.25) for channel in plain), (mix, grey / 4), (plain, (1 - grey) / 4)):
        close = torch.isclose(got, expected.expand(3, -1, -1), atol=1e-6).flatten(1).all(1)
        assert abs(share(close) - probability) <= near(probability, 4000)


def test_images_of_both_modalities_can_be_augmented_alike_and_keep_their_channels():
    images = pixels(6, 24, 12)
    plain = transforms.augment(images, Augment(pad=0, flip=0, erase=0, jitter=0), generator())
    torch.testing.assert_close(plain, transforms.normalize(images))
    flipped = transforms.augment(images, Augment(pad=0, flip=1, erase=0, jitter=0), generator())
    torch.testing.assert_close(flipped, transforms.normalize(images).flip(3))
    first, again = (transforms.augment(images, Augment(pad=2), generator()) for _ in range(2))
    assert torch.equal(first, again) and not torch.allclose(first, plain)
