# SPDX-License-Identifier: Apache-2.0
"""The report's charts as SVG: training curves, and bars of untrained against trained scores."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
UNTRAINED, TRAINED, THIRD = "#9aa5b1", "#0b69a3", "#c99a2e"


def curves(panels: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> str:
    """Line charts side by side.

    Args:
      panels: for each its title, steps and values; points that are not finite are gaps.

    Returns:
      An SVG document.
    """
    figure = _figure(10.5, 2.7)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, steps, values), color in zip(
        axes, panels, [TRAINED, "#2f855a", THIRD, MUTED] * len(panels), strict=False
    ):
        smooth = _smoothed(values)
        if smooth is not None:
            ax.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
            ax.plot(steps, smooth, color=color, linewidth=1.8)
        else:
            ax.plot(steps, values, color=color, linewidth=1.8)
        ax.set_title(title, loc="left", color=INK, fontsize=10)
        ax.set_xlabel("step", color=MUTED, fontsize=8)
        ax.set_ylim(bottom=min([0.0, *(v for v in values if math.isfinite(v))]))
        _plain(ax)
    return _svg(figure)


def bars(names: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> str:
    """Grouped bars in percent.

    Args:
      names: under the groups.
      series: for each label its fractions, None where there is no score.

    Returns:
      An SVG document.
    """
    figure = _figure(10.5, 2.9)
    ax = figure.subplots()
    width = 0.8 / max(1, len(series))
    colors = [UNTRAINED, TRAINED] if len(series) > 1 else [TRAINED]
    for k, (label, fractions) in enumerate(series.items()):
        at = [i + (k - (len(series) - 1) / 2) * width for i in range(len(names))]
        heights = [100 * f if f is not None else 0.0 for f in fractions]
        ax.bar(at, heights, width * 0.94, label=label, color=colors[k % len(colors)])
        for x, height, fraction in zip(at, heights, fractions, strict=True):
            text = "–" if fraction is None else f"{height:.1f}"
            ax.text(x, height + 1.5, text, ha="center", fontsize=7.5, color=INK)
    ax.set_xticks(range(len(names)), names, fontsize=9, color=INK)
    ax.set_ylim(0, 112)
    ax.set_yticks(range(0, 101, 20))
    ax.set_ylabel("hit@1, percent", color=MUTED, fontsize=8)
    _plain(ax)
    if len(series) > 1:
        ax.legend(frameon=False, fontsize=8, loc="upper right", ncols=len(series))
    return _svg(figure)


def _smoothed(values: Sequence[float]) -> list[float] | None:
    """Means over a window around each point, so that a trend shows through the noise.

    None for a short curve, or one without noise (a schedule), which a mean would only blur.
    """
    known = [v for v in values if math.isfinite(v)]
    turns = sum((b - a) * (c - b) < 0 for a, b, c in zip(known, known[1:], known[2:], strict=False))
    if len(values) < 60 or turns < len(known) / 10:
        return None
    half = max(2, len(values) // 60)
    windows = (values[max(0, k - half) : k + half + 1] for k in range(len(values)))
    means = []
    for window in windows:
        there = [v for v in window if math.isfinite(v)]
        means.append(sum(there) / len(there) if there else math.nan)
    return means


def _figure(width: float, height: float) -> Any:
    # The object interface needs no display and leaves no figure in a global list.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _plain(ax: Any) -> None:
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(GRID)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(length=0, labelsize=8, labelcolor=MUTED)


def _svg(figure: Any) -> str:
    import matplotlib

    out = io.StringIO()
    # No date and a fixed salt: the same numbers give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "vlm2vec_jax"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()
