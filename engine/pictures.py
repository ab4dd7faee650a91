"""Pictures of what `engine.analysis` found, by matplotlib: for print, and for people who see colours differently.

What colour tells, a mark, a line's style or a number tells too.
"""

from __future__ import annotations

import importlib.util
import io
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from engine.analysis import Attention, Bars, Chart, Distances, Embedding, Rankings, Shot
from engine.data.cache import open_image
from engine.errors import UserError
from engine.features import NAMES
from engine.pair import Pair

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Of Okabe and Ito; their yellow is too pale for lines on paper."""
RIGHT, WRONG = ("#009E73", "solid", "✓"), ("#D55E00", (0, (3, 2)), "✗")
MODALITIES = Pair("o", "x")
_MARKERS = "osD^vPX<>"
_STYLES = ("solid", "dashed", "dotted", "dashdot")
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "+++", "ooo")
_SHOT = (192, 96)
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "vireid-engine",
}
FORMATS = ("png", "svg", "pdf", "webp")


def demand_matplotlib() -> None:
    """Raise a `UserError` where there is no matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('pictures need matplotlib, which is not installed; run: pip install "vireid-engine[viz]"')


def draw(found: Any, titled: bool = True) -> Any:
    """The figure of whatever `engine.analysis` found: one of its classes, or a list of charts.

    Args:
        titled: whether its caption stands above the figure; charts and distances have titles anyhow.
    """
    if isinstance(found, list):
        return charts(found)
    if isinstance(found, Distances):
        return distances(found)
    kinds: dict[type, Callable[[Any, str], Any]] = {Rankings: rankings, Embedding: embedding, Attention: attention}
    return kinds[type(found)](found, found.caption if titled else "")


def encode(figure: Any, kind: str, dpi: int = 150) -> bytes:
    """A figure as the content of a file, the same whenever it is drawn.

    Args:
        kind: one of `FORMATS`.
    """
    content = io.BytesIO()
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind, {})
    options = {"pil_kwargs": {"quality": 85}} if kind == "webp" else {}
    with _style():
        figure.savefig(
            content, format=kind, dpi=dpi, bbox_inches="tight", pad_inches=0.06, metadata=dates or None, **options
        )
    return content.getvalue()


def rankings(found: Rankings, title: str = "") -> Any:
    """Queries, framed in black, and their answers: right ones in a solid frame with a tick, wrong ones in a dashed one, crossed."""
    columns = 1 + max(len(one.answers) for one in found.lists)
    step, height = (1.12, 2.5)
    width = 1.5 + (columns - 1) * step
    figure, axes = _canvas(width, height * len(found.lists) + 0.05, 0.78, _wrapped(title, width * 0.78))
    for row, one in enumerate(found.lists):
        top = 0.25 + row * height
        axes.imshow(_pixels(one.query), extent=(0.1, 1.1, top + 2, top), aspect="auto", interpolation="bilinear")
        _frame(axes, 0.1, top, "black", "solid")
        axes.text(0.6, top - 0.06, f"query, {NAMES[found.query]}", ha="center", va="bottom", fontsize=7, weight="bold")
        _below(axes, 0.1, top, one.query, f", {one.matches} to find")
        for i, (shot, right) in enumerate(zip(one.answers, one.right, strict=True)):
            left = 1.5 + i * step
            axes.imshow(_pixels(shot), extent=(left, left + 1, top + 2, top), aspect="auto", interpolation="bilinear")
            colour, style, mark = RIGHT if right else WRONG
            _frame(axes, left, top, colour, style)
            axes.text(left + 0.5, top - 0.06, f"{i + 1} {mark}", ha="center", va="bottom", fontsize=8, color=colour)
            _below(axes, left, top, shot)
    return figure


def embedding(found: Embedding, title: str = "") -> Any:
    """Identities by colour and number, modalities by mark."""
    with _style():
        from matplotlib.patheffects import withStroke

        figure = _figure(5, 4.5)
        axes = figure.add_subplot()
        for number, who in enumerate(np.unique(found.identities)):
            colour = COLOURS[number % len(COLOURS)]
            for infrared, marker in enumerate(MODALITIES):
                points = found.points[(found.identities == who) & (found.infrared == bool(infrared))]
                face = {"facecolors": "none", "edgecolors": colour} if marker == "o" else {"color": colour}
                axes.scatter(*points.T, marker=marker, s=22, linewidths=1, **face)
            points = found.points[found.identities == who]
            apart = np.linalg.norm(points - np.median(points, axis=0), axis=1)
            near = points[apart <= 2 * np.median(apart)]
            top = (np.median(near[:, 0]), near[:, 1].max())
            place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
            halo = [withStroke(linewidth=2.5, foreground="white")]
            axes.annotate(str(who), top, color=colour, fontsize=9, weight="bold", path_effects=halo, **place)
        grey = {"color": "#444444", "linestyle": "none", "fillstyle": "none"}
        keys = [
            _key(marker=marker, label=name, **grey) for marker, name in zip(MODALITIES, NAMES.values(), strict=True)
        ]
        axes.legend(handles=keys, loc="upper left", bbox_to_anchor=(0, -0.02), ncol=2)
        axes.set(xticks=[], yticks=[])
        axes.margins(0.08)
        axes.spines[["top", "right"]].set_visible(True)
        axes.set_title(_wrapped(title, 5), fontsize=8, weight="normal", loc="left")
    return figure


def distances(found: Distances) -> Any:
    """Both histograms, with their means."""
    with _style():
        figure = _figure(5, 3.2)
        axes = figure.add_subplot()
        kinds = (("one identity", found.positive, found.means[0]), ("two identities", found.negative, found.means[1]))
        for i, (label, shares, mean) in enumerate(kinds):
            look = {"color": COLOURS[i], "linestyle": _STYLES[i]}
            axes.stairs(100 * shares, found.edges, fill=True, color=COLOURS[i], alpha=0.25)
            axes.stairs(100 * shares, found.edges, label=f"{label}, mean {mean:.3f}", linewidth=1.4, **look)
            axes.axvline(mean, linewidth=1, **look)
        filled = np.flatnonzero(found.positive + found.negative > 1e-5)
        axes.set_xlim(found.edges[max(filled[0] - 2, 0)], found.edges[min(filled[-1] + 3, len(found.edges) - 1)])
        axes.set(xlabel="cosine distance of a visible and an infrared image", ylabel="percent of pairs per 0.01")
        axes.set_title(f"overlap {100 * found.overlap:.1f} %", loc="left")
        axes.legend()
    return figure


def attention(found: Attention, title: str = "") -> Any:
    """Images, and beside each what of it every map looks at."""
    step, height, gap = 1.1, 2.35, 0.3
    block = (1 + len(found.titles)) * step
    width = 2 * block + gap
    figure, axes = _canvas(width, height * len(found.rows) + 0.25, 0.75, _wrapped(title, width * 0.75))
    for row, (shots, maps) in enumerate(found.rows):
        top = 0.3 + row * height
        for side, (shot, seen) in enumerate(zip(shots, maps, strict=True)):
            start, pixels = side * (block + gap), _pixels(shot)
            for i, head in enumerate((list(NAMES.values())[side], *found.titles)):
                left = start + i * step
                place = (left, left + 1, top + 2, top)
                shown = pixels if i == 0 else _lit(pixels, seen[i - 1])
                axes.imshow(shown, extent=place, aspect="auto", interpolation="bilinear")
                if row == 0:
                    axes.text(left + 0.5, top - 0.06, head, ha="center", va="bottom", fontsize=7.5, weight="bold")
            _below(axes, start, top, shot)
    return figure


def charts(found: Sequence[Chart | Bars], columns: int = 3) -> Any:
    """Charts side by side, row by row."""
    rows = -(-len(found) // columns)
    columns = -(-len(found) // rows)
    runs = next((chart.runs for chart in found if isinstance(chart, Chart)), ())
    with _style():
        figure = _figure(4 * columns, 2.9 * rows + (0.3 if len(runs) > 1 else 0))
        for number, chart in enumerate(found, start=1):
            axes = figure.add_subplot(rows, columns, number)
            if isinstance(chart, Bars):
                _bars(axes, chart)
            else:
                _lines(axes, chart)
        if len(runs) > 1:
            keys = [
                _key(color=_cycled(COLOURS, i), marker=_cycled(_MARKERS, i), label=run) for i, run in enumerate(runs)
            ]
            figure.legend(handles=keys, loc="outside upper left", ncol=min(len(runs), columns + 1))
    return figure


def _lines(axes: Any, chart: Chart) -> None:
    several = len(chart.runs) > 1
    kinds = list(dict.fromkeys(line.label for line in chart.lines))
    for line in chart.lines:
        kind = kinds.index(line.label)
        number = line.run if several else kind
        look: dict[str, Any] = {"color": _cycled(COLOURS, number), "linestyle": _cycled(_STYLES, kind)}
        label = None if several else line.label
        if chart.steps:
            axes.stairs(line.y, line.x, label=label, linewidth=1.4, **look)
            continue
        every = max(1, len(line.x) // 12)
        look |= {"marker": _cycled(_MARKERS, number), "markevery": every}
        axes.plot(line.x, line.y, label=label, drawstyle="steps-mid" if chart.log else "default", **look)
    for border in chart.borders:
        axes.axvline(border + 0.5, color="#888888", linestyle="dotted", linewidth=1)
    axes.set(xlabel=chart.x, ylabel=chart.y, title=chart.title)
    if chart.log:
        if min(min(line.y) for line in chart.lines) > 0:
            axes.set_yscale("log")
        else:
            axes.set_yscale("symlog", linthresh=1)
    if chart.x == "epoch":
        axes.set_xlim(0.5, max(max(line.x) for line in chart.lines) + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    if any(kinds) and (not several or len(kinds) > 1):
        grey = [_key(color="#444444", linestyle=_cycled(_STYLES, i), label=kind) for i, kind in enumerate(kinds)]
        if len(kinds) > 4:
            low, high = axes.get_ylim()
            axes.set_ylim(low, high + (0.12 + 0.03 * len(kinds)) * (high - low))  # room for the legend
        axes.legend(handles=grey if several else None, ncol=3 if len(kinds) > 4 else 1)


def _bars(axes: Any, chart: Bars) -> None:
    base = np.zeros(len(chart.epochs))
    for i, (name, values) in enumerate(chart.parts.items()):
        look: dict[str, Any] = {"color": _cycled(COLOURS, i), "hatch": _cycled(_HATCHES, i), "edgecolor": "white"}
        axes.bar(chart.epochs, values, bottom=base, width=0.85, linewidth=0, label=name, **look)
        base = base + np.array(values)
    axes.set(xlabel="epoch", ylabel=chart.y, title=chart.title)
    axes.set_xlim(chart.epochs[0] - 0.5, chart.epochs[-1] + 0.5)
    axes.set_ylim(0, 1.3 * max(float(base.max()), 1e-9))  # room for the legend
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.yaxis.get_major_locator().set_params(integer=chart.y != "seconds", min_n_ticks=1)
    axes.grid(visible=False, axis="x")
    axes.legend(ncol=3, loc="upper left")


def _canvas(width: float, height: float, scale: float, title: str) -> tuple[Any, Any]:
    """A figure of width x height units, y downwards, `scale` inches each, to place images on."""
    with _style():
        figure = _figure(width * scale + 0.1, height * scale + 0.1 + 0.17 * (1 + title.count("\n")))
        axes = figure.add_subplot()
        axes.set(xlim=(-0.05, width + 0.05), ylim=(height, 0), aspect="equal")
        axes.axis("off")
        axes.set_title(title, fontsize=8, weight="normal", loc="left")
    return figure, axes


def _frame(axes: Any, left: float, top: float, colour: str, style: Any) -> None:
    from matplotlib.patches import Rectangle

    look: dict[str, Any] = {"edgecolor": colour, "linestyle": style, "linewidth": 2.2}
    axes.add_patch(Rectangle((left, top), 1, 2, fill=False, **look))


def _below(axes: Any, left: float, top: float, shot: Shot, more: str = "") -> None:
    """Who it is and which camera saw them, where that is known."""
    parts = [f"{word} {value}" for word, value in (("id", shot.identity), ("cam", shot.camera)) if value >= 0]
    axes.text(left + 0.5, top + 2.05, ", ".join(parts) + more, ha="center", va="top", fontsize=6.5)


def _pixels(shot: Shot) -> np.ndarray:
    """The file's image, `[H, W, 3]` uint8, of one size for all."""
    return np.asarray(open_image(shot.path).resize(_SHOT[::-1], Image.Resampling.LANCZOS))


def _lit(pixels: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """A grey image under a map `[h, w]` in [0, 1], whose colours grow lighter as its values do, `[H, W, 3]`."""
    import matplotlib

    maps = torch.from_numpy(seen)[None, None].float()
    weight = F.interpolate(maps, _SHOT, mode="bilinear", align_corners=False)[0, 0].numpy()
    grey = pixels.mean(2, keepdims=True) / 255
    return 0.4 * grey + 0.6 * matplotlib.colormaps["inferno"](weight)[..., :3]


def _key(**look: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)


def _cycled(items: Sequence[Any], number: int) -> Any:
    return items[number % len(items)]


def _wrapped(text: str, inches: float) -> str:
    return textwrap.fill(text, max(20, int(inches * 15.5)))


def _figure(width: float, height: float) -> Any:
    """An empty figure in inches, which no window and no global state knows of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _style() -> Any:
    demand_matplotlib()
    import matplotlib

    return matplotlib.rc_context(_STYLE)
