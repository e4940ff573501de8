"""The canvas: how figures look, as a PNG on white, and as SVG in the colours of the page that it stands in.

Sizes are pixels of the page. Figures are drawn in the light colours, each of which is there once, so that each can
become the page's own for its kind of display.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from functools import cache
from html import escape
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

COLOURS: Mapping[str, tuple[str, str]] = {  # on a light and on a dark page
    "surface": ("#ffffff", "#161b22"),
    "ink": ("#1b2430", "#e6eaf0"),
    "muted": ("#5f6b7c", "#9ba6b5"),
    "grid": ("#e7ebf0", "#272f3a"),
    "train": ("#2766d4", "#74aaff"),
    "held-out": ("#bf4d16", "#f39c64"),
    "useful": ("#23856d", "#46b896"),
    "redone": ("#d2445a", "#f07487"),
    "starting": ("#e9a83a", "#eec06a"),
    "preparing": ("#8791a5", "#7d899c"),
    "waiting": ("#c6cdd8", "#4c5665"),
    "other": ("#7398d6", "#7f9fda"),
    "failure": ("#c0263f", "#ff7d90"),
    "resize": ("#7346bd", "#b99cf6"),
}
LIGHT: Mapping[str, str] = {name: light for name, (light, _) in COLOURS.items()}
FONTS = ("Inter", "Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans")  # the last is matplotlib's
TITLE, TEXT, SMALL = 13.5, 11.0, 10.5  # sizes of type
PNG_SCALE, PNG_MARGIN = 2.5, 14 / 72


def new_figure(width: int, height: int, title: str) -> Figure:
    """An empty figure under its title."""
    figure = Figure(figsize=(width / 72, height / 72), facecolor=LIGHT["surface"])
    write(figure, 0, 4, title, size=TITLE, weight="bold")
    return figure


def place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at a place, in the house's style: no frame, faint lines across."""
    whole_width, whole_height = figure.get_size_inches() * 72
    bottom = whole_height - top - height
    box = (left / whole_width, bottom / whole_height, width / whole_width, height / whole_height)
    axes = figure.add_axes(box, facecolor="none")
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=LIGHT["grid"], linewidth=1)
    axes.grid(axis="y", color=LIGHT["grid"], linewidth=1)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=SMALL, labelcolor=LIGHT["muted"], pad=6)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=LIGHT["muted"], fontsize=SMALL)
    return axes


def write(figure: Figure, x: float, y: float, text: str, colour: str = "ink", size: float = TEXT, **style: Any) -> None:
    """Text whose top is y pixels below the figure's; never taken for mathematics."""
    width, height = figure.get_size_inches() * 72
    baseline = 1 - (y + size) / height
    figure.text(x / width, baseline, text, color=LIGHT[colour], fontsize=size, parse_math=False, **style)


def key(figure: Figure, x: float, y: float, text: str, colour: str, marker: str = "o") -> None:
    """A mark in a colour, and what it stands for."""
    width, height = figure.get_size_inches() * 72
    middle = [(x + 4) / width], [1 - (y + 0.62 * TEXT) / height]
    edge = 2 if marker == "_" else 0
    figure.add_artist(Line2D(*middle, marker=marker, markersize=7, color=LIGHT[colour], markeredgewidth=edge))
    write(figure, x + 12, y, text, "muted")


def png(figure: Figure) -> bytes:
    """The figure as a picture on white."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"font.sans-serif": _fonts()}):
        figure.savefig(buffer, format="png", dpi=72 * PNG_SCALE, bbox_inches=figure.bbox_inches.padded(PNG_MARGIN))
    return buffer.getvalue()


def svg(figure: Figure, title: str, description: str) -> str:
    """The figure as an <svg> element of a page that has a variable for each colour.

    Args:
        figure: drawn in the colours of `LIGHT`.
        title, description: what a screen reader says.
    """
    buffer, nothing = io.BytesIO(), dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # the page's
    text = re.sub(r"font: ([^;\"]*?)([\d.]+px) [^;\"]*", r"font-size: \2; font-weight: 600", text)
    text = re.sub(r"font-size: ([\d.]+)px", lambda size: f"font-size: {float(size[1]):g}px", text)
    text = re.sub(r' transform="rotate\(-0 [^"]*"', "", text)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]*)', text))
    text = re.sub(r' id="([^"]*)"', lambda name: name[0] if name[1] in used else "", text)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)  # hundredths of a pixel do
    for name, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{name})")
    width, height = (round(size * 72) for size in figure.get_size_inches())
    begin = f'<svg role="img" viewBox="0 0 {width} {height}" xmlns:xlink="http://www.w3.org/1999/xlink" '
    begin += f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title><desc>{escape(description)}</desc>'
    return begin + text.partition(">")[2].strip()


@cache
def _fonts() -> list[str]:
    """Those of `FONTS` that are here."""
    here = set(font_manager.get_font_names())
    return [font for font in FONTS if font in here]
