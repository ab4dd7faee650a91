"""The gallery images that are most like given ones, and a picture of them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from engine import ops
from engine.data.cache import open_image
from engine.data.dataset import Images
from engine.errors import UserError
from engine.index import Index
from engine.rerank import Reranker

Nearest = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(queries `[Q, D]`, k) -> scores and rows `[Q, k]` of the gallery, best first, -1 where there are no more."""
TILE = (96, 192)  # width and height of an image in the picture
TEXT = 14  # height of a line of text
GAP = 8
COLOURS = {"right": "#0072b2", "wrong": "#d55e00"}  # blue and vermilion: the colour-blind tell them apart
EMPTY = "#e4e4e4"


@dataclass(frozen=True)
class Found:
    """The matches of one query, best first.

    Attributes:
        rows: `[k]` int64 rows of the gallery, fewer where there are no more.
        scores: `[k]` float, larger is more alike: cosine similarities, or 1 - a re-ranker's distances.
    """

    rows: np.ndarray
    scores: np.ndarray


def search(query: Index, gallery: Index, k: int, nearest: Nearest, rule: str = "plain") -> list[Found]:
    """The k best matches of every query.

    Args:
        nearest: `exact(gallery)`, `approximate(gallery, ...)` or `reranked(gallery, ...)`.
        rule: which gallery images a query does not see: "plain", "sysu" or "llcm", as for `engine.ops.rank`.

    Raises:
        UserError: the two have features of different widths, or the gallery has fewer than k images.
    """
    if query.features.shape[1] != gallery.features.shape[1]:
        widths = f"{query.features.shape[1]} and {gallery.features.shape[1]}"
        raise UserError(f"features of queries and gallery have {widths} dimensions; extract both with one network")
    if not 1 <= k <= len(gallery):
        raise UserError(f"-k {k}: expected 1 to {len(gallery)}, the images of the gallery")
    seen = [] if rule == "plain" else [visible(rule, query.images, row, gallery.images) for row in range(len(query))]
    hidden = max((len(gallery) - int(mask.sum()) for mask in seen), default=0)
    scores, rows = (part.cpu().numpy() for part in nearest(query.features, min(k + hidden, len(gallery))))
    found = []
    for number, (own, score) in enumerate(zip(rows, scores, strict=True)):
        keep = (own >= 0) & seen[number][own] if seen else own >= 0
        found.append(Found(own[keep][:k], score[keep][:k]))
    return found


def visible(rule: str, query: Images, row: int, gallery: Images) -> np.ndarray:
    """`[G]` bool: which gallery images a query may be matched with."""
    if rule == "sysu" and query.cams[row] == 3:
        return gallery.cams != 2
    if rule == "llcm" and query.ids[row] >= 0:
        return (gallery.ids != query.ids[row]) | (gallery.cams != query.cams[row])
    return np.ones(len(gallery), bool)


def first_right(query: Images, gallery: Images, found: Sequence[Found], rule: str = "plain") -> tuple[int, int]:
    """Of how many queries the first match is of their identity, and how many could have one."""
    right = known = 0
    for row, matches in enumerate(found):
        same = gallery.ids == query.ids[row]
        if query.ids[row] >= 0 and bool((same & visible(rule, query, row, gallery)).any()):
            known += 1
            right += int(same[matches.rows[:1]].any())
    return right, known


def exact(gallery: Index, device: torch.device) -> Nearest:
    """All similarities, by `engine.ops.topk`."""
    bank = gallery.features.to(device)
    return lambda queries, k: ops.topk(queries.to(device), bank, k)


def reranked(gallery: Index, reranker: Reranker, device: torch.device) -> Nearest:
    """By a re-ranker's distances, of which most look at all queries at once."""
    bank = gallery.features.to(device)

    def nearest(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        distance, rows = reranker(queries.to(device), bank).sort(dim=1, stable=True)
        return 1 - distance[:, :k], rows[:, :k]

    return nearest


def approximate(gallery: Index, kind: str, file: Path | None = None) -> Nearest:
    """By FAISS.

    Args:
        kind: "flat" compares with all; "ivf", "ivf:LISTS" or "ivf:LISTS,PROBES" sorts the gallery into lists around
            centres and looks into those of the nearest few.
        file: of the gallery's features; the sorted lists are kept beside it.

    Raises:
        UserError: FAISS is not installed, or there is no such kind.
    """
    name, _, values = kind.partition(":")
    given = values.split(",") if values else []
    known = name in ("flat", "ivf") and len(given) <= (2 if name == "ivf" else 0)
    if not known or not all(value.isdecimal() and int(value) for value in given):
        raise UserError(
            f"--faiss {kind}: expected flat, ivf, or ivf with numbers of lists and of those looked into: ivf:256,16"
        )
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            '--faiss: FAISS is not installed; run: pip install "vireid-engine[faiss]", or leave --faiss away: the search without '
            "it is exact"
        ) from error
    rows = gallery.features.numpy()
    count, width = rows.shape
    # FAISS asks for at least 39 images around a centre.
    lists = min(int(given[0]) if given else round(4 * math.sqrt(count)), max(1, count // 39))
    probes = int(given[1]) if len(given) > 1 else max(1, lists // 16)
    if name == "flat":
        engine = faiss.IndexFlatIP(width)
        engine.add(rows)
    else:
        engine = _sorted_lists(faiss, gallery, lists, file)
        engine.nprobe = probes

    def nearest(queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, found = engine.search(queries.numpy(), k)
        return torch.from_numpy(scores), torch.from_numpy(found)

    return nearest


def _sorted_lists(faiss: Any, gallery: Index, lists: int, file: Path | None) -> Any:
    made_of = hashlib.sha256(json.dumps([gallery.about, len(gallery), lists]).encode()).hexdigest()[:12]
    kept = file.with_name(f"{file.stem}-ivf{lists}-{made_of}.faiss") if file else None
    if kept and kept.is_file():
        with contextlib.suppress(RuntimeError):  # a damaged file is made again
            return faiss.read_index(str(kept))
    rows = gallery.features.numpy()
    engine = faiss.IndexIVFFlat(faiss.IndexFlatIP(rows.shape[1]), rows.shape[1], lists, faiss.METRIC_INNER_PRODUCT)
    engine.train(rows)
    engine.add(rows)
    if kept:
        part = kept.with_name(f".{kept.name}.part")
        try:
            faiss.write_index(engine, str(part))
        except RuntimeError as error:
            part.unlink(missing_ok=True)
            raise UserError(f"{kept}: cannot be written ({error}); make room") from error
        os.replace(part, kept)
    return engine


def names(images: Images) -> list[str]:
    """The images' paths from the folder on that they have in common, printable."""
    folder = os.path.commonpath([os.path.dirname(path) for path in images.paths])
    relative = (os.path.relpath(path, folder) for path in images.paths)
    return ["".join(letter if letter.isprintable() else "?" for letter in path) for path in relative]


def sheet(query: Images, gallery: Images, found: Sequence[Found]) -> Image.Image:
    """A picture with a row per query: the query, then its matches with their scores.

    Where identities are known, right matches have a solid blue frame, wrong ones a broken red one, and both say so.
    """
    query_names, gallery_names = names(query), names(gallery)
    columns = 1 + max((len(matches.rows) for matches in found), default=0)
    width, height = TILE[0] + 2 * GAP, TILE[1] + 3 * TEXT + 2 * GAP
    picture = Image.new("RGB", (columns * width + 2 * GAP, len(found) * height + GAP), "white")
    for number, matches in enumerate(found):
        identity, top = int(query.ids[number]), GAP + number * height
        about = f"identity {identity}" if identity >= 0 else ""
        _tile(picture, (GAP, top), query.paths[number], ["query", query_names[number], about], "")
        for place, (row, score) in enumerate(zip(matches.rows.tolist(), matches.scores.tolist(), strict=True), start=1):
            other = int(gallery.ids[row])
            mark = "" if min(identity, other) < 0 else "right" if identity == other else "wrong"
            about = f"{other} {mark}" if other >= 0 else ""
            left = 2 * GAP + place * width
            _tile(picture, (left, top), gallery.paths[row], [f"{place}   {score:.3f}", gallery_names[row], about], mark)
    return picture


def _tile(picture: Image.Image, corner: tuple[int, int], path: str, lines: Sequence[str], mark: str) -> None:
    left, top = corner
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT - 3)
    try:
        tile = ImageOps.pad(open_image(path), TILE, color=EMPTY)
    except Exception:  # noqa: BLE001  an index outlives its images, and Pillow's decoders raise much more than OSError
        tile = Image.new("RGB", TILE, EMPTY)
    picture.paste(tile, corner)
    right, bottom = left + TILE[0], top + TILE[1]
    draw.rectangle((left - 3, top - 3, right + 2, bottom + 2), outline=COLOURS.get(mark, EMPTY), width=3)
    if mark == "wrong":  # broken, for prints without colours
        for y in range(top, bottom, 16):
            draw.rectangle((left - 3, y, left - 1, y + 7), "white")
            draw.rectangle((right, y, right + 2, y + 7), "white")
    for number, line in enumerate(lines):
        while draw.textlength(line, font) > TILE[0]:  # of a path the end tells most
            line = f"…{line.lstrip('…')[1:]}"
        draw.text((left, bottom + 4 + number * TEXT), line, "black", font)
