# SPDX-License-Identifier: Apache-2.0
"""The report's charts as SVG: training curves, bars of averages, a radar over datasets."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
UNTRAINED, TRAINED, THIRD = "#9aa5b1", "#0b69a3", "#c99a2e"
OTHERS = (THIRD, "#2f855a", "#8a4fa3", "#c05621")
"""Published models, in the order in which they are shown."""


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
    colors = _colors(series)
    for k, (label, fractions) in enumerate(series.items()):
        at = [i + (k - (len(series) - 1) / 2) * width for i in range(len(names))]
        heights = [100 * f if f is not None else 0.0 for f in fractions]
        ax.bar(at, heights, width * 0.94, label=label, color=colors[k % len(colors)])
        for x, height, fraction in zip(at, heights, fractions, strict=True):
            text = "–" if fraction is None else f"{height:.1f}"
            small = 7.5 if len(series) < 4 else 5.5
            ax.text(x, height + 1.5, text, ha="center", fontsize=small, color=INK)
    ax.set_xticks(range(len(names)), names, fontsize=9, color=INK)
    ax.set_ylim(0, 112)
    ax.set_yticks(range(0, 101, 20))
    ax.set_ylabel("hit@1, percent", color=MUTED, fontsize=8)
    _plain(ax)
    if len(series) > 1:
        ax.legend(frameon=False, fontsize=8, loc="upper right", ncols=len(series))
    return _svg(figure)


def radar(names: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> str:
    """A radar chart in percent, an axis per dataset.

    Args:
      names: of the axes, clockwise from the top.
      series: for each label its fractions; None is drawn as a gap.

    Returns:
      An SVG document.
    """
    figure = _figure(10.5, 7.6)
    ax = figure.subplots(subplot_kw={"projection": "polar"})
    angles = [2 * math.pi * k / len(names) for k in range(len(names))]
    ax.set_theta_offset(math.pi / 2)
    ax.set_theta_direction(-1)
    for (label, fractions), color in zip(series.items(), _colors(series), strict=False):
        radii = [math.nan if f is None else 100 * f for f in fractions]
        ax.plot([*angles, angles[0]], [*radii, radii[0]], color=color, linewidth=1.6, label=label)
        if not any(math.isnan(r) for r in radii):
            ax.fill(angles, radii, color=color, alpha=0.08)
    ax.set_xticks(angles, names, fontsize=8, color=INK)
    for tick, angle in zip(ax.get_xticklabels(), angles, strict=True):
        across = math.sin(angle)
        tick.set_horizontalalignment(
            "center" if abs(across) < 0.1 else "left" if across > 0 else "right"
        )
    ax.set_ylim(0, 100)
    ax.set_yticks([20, 40, 60, 80, 100])
    ax.tick_params(axis="y", labelsize=7, labelcolor=MUTED)
    ax.grid(color=GRID, linewidth=0.8)
    ax.spines["polar"].set_color(GRID)
    if len(series) > 1:
        figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return _svg(figure)


def _colors(series: Mapping[str, Any]) -> list[str]:
    """Ours in blue (grey for the untrained), published models in other colours."""
    own = [n for n in series if n in ("untrained", "trained", "ours")]
    first = [UNTRAINED, TRAINED] if len(own) > 1 else [TRAINED]
    return [*first, *(OTHERS[k % len(OTHERS)] for k in range(max(0, len(series) - len(first))))]


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
