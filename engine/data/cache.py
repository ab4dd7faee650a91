"""Images decoded once, to a memory-mapped file that a changed data set no longer matches."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import uuid
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from engine.data import layout
from engine.data.dataset import Images
from engine.errors import UserError, command
from engine.folders import cache_folder, writable

# What a file may hold, whatever its name: Pillow would start other programs for some formats.
KINDS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")
MAX_PIXELS = 2**26
FORMAT = 2  # part of every key: raise it when the same files would be decoded to other pixels
BLOCK = 256  # images decoded before they are written, which bounds the memory


class Unreadable(UserError):
    """Images that cannot be decoded.

    Attributes:
        files: a line for each: the path, and what is wrong.
    """

    def __init__(self, files: Sequence[str], count: int) -> None:
        super().__init__(
            f"cannot read {layout.some(files)} of {count} images; replace or remove them ({command('prepare')} names all)"
        )
        self.files = files


def decode(
    images: Images,
    size: tuple[int, int],
    *,
    folder: str = "",
    workers: int = 0,
    label: str = "visible",
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """The pixels of `images`, from the cache or decoded into it.

    The cached file is named by a hash of the paths, their sizes and times of change, `size` and the format's version. It
    appears whole or not at all: it is written under another name first. Processes that decode the same images at the
    same time each write their own and one of them stays. One that is not whole is made anew.

    Args:
        images: N > 0 image files, of any size and mode.
        size: height and width, resized to by Lanczos.
        folder: of the cache; empty = $XDG_CACHE_HOME/vireid-engine or ~/.cache/vireid-engine.
        workers: threads, which decode side by side as Pillow releases the interpreter; 0 = one per core.
        label: what the images are, for the progress bar and the file's name.
        max_pixels: of a file; larger ones are refused before they are decoded.

    Returns:
        [N, H, W, 3] uint8 RGB, memory-mapped, read-only.

    Raises:
        Unreadable: images are missing, empty, truncated, unreadable or too large.
        UserError: the cache's folder is full or not writable.
    """
    if not images.paths:
        raise UserError(f"no {label} images to decode")
    cache = cache_folder(folder)
    shape = (len(images), *size, 3)
    file = cache / f"{label.replace(' ', '-')}-{_key(images.paths, size)}.npy"
    pixels = _open(file, shape)
    if pixels is None:
        with writable(cache, int(np.prod(shape))):
            _clean(cache)
            with _temporary(file) as output:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(output, header)
                bad: list[str] = []  # all files are tried before the bad ones are named together
                title = f"decoding {label} images"
                for block in decode_blocks(images.paths, size, workers=workers, title=title, max_pixels=max_pixels):
                    bad += [result for result in block if isinstance(result, str)]
                    if not bad:
                        output.write(np.stack(block).data)
                _refuse(bad, len(images))
        pixels = _open(file, shape)
    if pixels is None:
        raise UserError(
            f"{file}: it was damaged while it was written; see to the disk, or name another one in data.cache"
        )
    return pixels


def open_image(path: str) -> Image.Image:
    """The image of a file, in RGB, upright as its EXIF tells. Errors are Pillow's, of any kind on damaged files.

    Grey values of more than 8 bits, as thermal cameras have them, are stretched: black is the image's 1st percentile, white
    its 99th.
    """
    with Image.open(path, formats=KINDS) as image:
        with contextlib.suppress(SyntaxError):  # EXIF that is damaged tells nothing
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            return _stretch(np.asarray(image, np.float64)).convert("RGB")
        return image.convert("RGB")


def _stretch(values: np.ndarray) -> Image.Image:
    if not np.isfinite(values).all():
        raise ValueError("has values that are NaN or infinite")
    low, high = np.percentile(values, (1, 99))
    return Image.fromarray(np.uint8(((values - low) / max(high - low, 1e-9)).clip(0, 1) * 255 + 0.5))


def _open(file: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The pixels in a file of the cache, or None where there is no such file, or not a whole one."""
    try:
        pixels = np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    return pixels if pixels.shape == shape and pixels.dtype == np.uint8 else None


@contextlib.contextmanager
def _no_larger_than(pixel_count: int) -> Iterator[None]:
    """Inside, Pillow decodes no image of more pixels; it looks before it takes the memory."""
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # they name no file, and the image is read
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        Image.MAX_IMAGE_PIXELS = pixel_count
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _core_count() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _key(paths: tuple[str, ...], size: tuple[int, int]) -> str:
    digest = hashlib.sha256(f"{FORMAT} {size}".encode())
    for path in paths:
        with contextlib.suppress(OSError):  # what is missing is named with all else that cannot be decoded
            stat = os.stat(path)
            digest.update(os.fsencode(f"\0{path}\0{stat.st_size}\0{stat.st_mtime_ns}"))
    return digest.hexdigest()[:32]


def decode_blocks(
    paths: Sequence[str],
    size: tuple[int, int],
    *,
    workers: int = 0,
    title: str = "",
    count: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[list[np.ndarray | str]]:
    """Blocks of images in order: of each its pixels, `[H, W, 3]` uint8 RGB, or what is wrong with its file.

    Args:
        size, workers, max_pixels: as for `decode`.
        title: of the progress bar.
        count: images of a block; 0 = `BLOCK`.
    """
    count = count or BLOCK
    progress = tqdm(total=len(paths), desc=title, unit="image", disable=None)
    with ThreadPool(workers or _core_count()) as pool, progress:
        for start in range(0, len(paths), count):
            with _no_larger_than(max_pixels):
                results = pool.map(lambda path: _decode_one(path, size), paths[start : start + count])
            progress.update(len(results))
            yield results


def _decode_one(path: str, size: tuple[int, int]) -> np.ndarray | str:
    """The pixels of one file, or what is wrong with it."""
    try:
        return np.asarray(open_image(path).resize(size[::-1], Image.Resampling.LANCZOS))
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return f"{path}: has more than {Image.MAX_IMAGE_PIXELS:,} pixels (data.max_pixels)"
    except Exception as error:  # noqa: BLE001  Pillow's decoders raise much more than OSError on damaged files
        empty = os.path.exists(path) and os.path.getsize(path) == 0
        reason = "is empty" if empty else getattr(error, "strerror", None) or str(error) or type(error).__name__
        return f"{path}: {reason}"


def _refuse(bad: list[str], count: int) -> None:
    if bad:
        raise Unreadable(bad, count)


@contextlib.contextmanager
def _temporary(file: Path) -> Iterator[IO[bytes]]:
    """A locked file beside `file`, renamed to it when the block ends well and removed when it does not."""
    while True:
        with open(file.with_name(f"{file.stem}-{uuid.uuid4().hex}.tmp"), "xb") as output:
            try:
                fcntl.flock(output, fcntl.LOCK_EX)
                if os.fstat(output.fileno()).st_nlink == 0:  # another process cleaned it away before it was locked
                    continue
                yield output
                output.flush()
                os.fsync(output.fileno())
                os.replace(output.name, file)
                return
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(output.name)
                raise


def _clean(folder: Path) -> None:
    """Remove the temporary files of killed processes: those that nobody holds locked."""
    for path in folder.glob(f"*-{'[0-9a-f]' * 32}-{'[0-9a-f]' * 32}.tmp"):
        with contextlib.suppress(OSError), open(path, "rb") as leftover:
            fcntl.flock(leftover, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
