"""Axes, colors and labels of all displays."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from os.path import commonprefix
from typing import Any, Self

import numpy as np

from ..tables import printable

# the palette of Okabe and Ito, which is safe for color-blind readers
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#767676"
SEPARATED = re.compile(r".*[/._-]")  # up to the last separator
INCHES_PER_LABEL = 0.17
LONGEST_LABEL = 28  # characters


class Display(ABC):
    """Base class of displays: a subclass draws, and sets ``ax_`` and ``figure_``."""

    def plot(self, ax: Any = None) -> Self:
        """Draw.

        Parameters
        ----------
        ax : matplotlib Axes or None, default=None
            Axes to draw on. None creates a new figure.

        Returns
        -------
        display : Display
            This display, with ``ax_`` and ``figure_`` set.
        """
        self._draw(ax)
        return self

    @abstractmethod
    def _draw(self, ax: Any) -> None: ...


def new_axes(ax: Any, wide: float, tall: float) -> tuple[Any, Any]:
    """The figure and axes to draw on; new ones if none are given."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "Plots need matplotlib, which is not installed. Run pip install matplotlib, or install "
            "the extra sksoup[plot]."
        ) from error
    if ax is not None:
        return ax.figure, ax
    return plt.subplots(figsize=(wide, tall), layout="constrained")


def new_panels(wide: float, tall: float) -> tuple[Any, Any]:
    """A new figure with two axes side by side that share the vertical axis."""
    figure, left = new_axes(None, wide, tall)
    left.remove()
    return figure, figure.subplots(1, 2, sharey=True)


def label_ticks(ax: Any, which: str, names: Sequence[str]) -> None:
    """Label as many evenly spaced ticks as fit."""
    box = ax.get_window_extent().transformed(ax.figure.dpi_scale_trans.inverted())
    room = box.width if which == "x" else box.height
    step = max(1, int(np.ceil(len(names) * INCHES_PER_LABEL / max(room, 0.1))))
    set_ticks, angle = (ax.set_xticks, 90) if which == "x" else (ax.set_yticks, 0)
    texts, ticks = shortened(names)[::step], range(0, len(names), step)
    set_ticks(ticks, texts, rotation=angle, fontsize=8, parse_math=False)


def shortened(names: Sequence[str]) -> list[str]:
    """Names without common prefix and suffix; long names are shortened in the middle."""
    names = [printable(name) for name in names]
    start = SEPARATED.match(commonprefix(names))  # noqa: RUF071 - of characters
    end = SEPARATED.match(commonprefix([name[::-1] for name in names]))  # noqa: RUF071
    cut = slice(start.end() if start else 0, -end.end() if end else None)
    short = [name[cut] for name in names]
    if len(names) < 2 or not all(short):
        short = names
    return [
        text if len(text) <= LONGEST_LABEL else f"{text[: LONGEST_LABEL // 2]}…{text[-13:]}"
        for text in short
    ]


def room_for(names: Sequence[str]) -> float:
    """Height of rotated labels in inches."""
    return 0.075 * max(map(len, shortened(names)))
