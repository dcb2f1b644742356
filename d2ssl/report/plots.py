"""Curves of a run, from the ``metrics.json`` that Detectron2 writes."""

import io
import json
import os
from typing import Dict, List, Optional, Tuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from d2ssl.engine.hooks import COLLAPSED

# One mid grey for axes and text: legible on white and on black, so figures can be transparent.
GREY = "#7b828c"
BLUE, ORANGE, GREEN, PURPLE = "#3a87d0", "#e08428", "#2fa36b", "#9a72cf"
PARTS = ("#4fb3a5", "#c9a227", "#d0679d", "#8d7fd1", "#8aa64a", "#b07a52")

STYLE = {
    "svg.fonttype": "path",  # looks the same wherever it is read
    "svg.hashsalt": "d2ssl",
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}

Metrics = Dict[int, Dict[str, float]]


def read_metrics(path: str) -> Metrics:
    """iteration -> {name: value}, in order of iterations; empty without the file.

    A resumed run logs some iterations again: the last value counts. A line that a killed run left
    unfinished is skipped.
    """
    if not os.path.isfile(path):
        return {}
    metrics: Metrics = {}
    with open(path) as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and "iteration" in row:
                metrics.setdefault(int(row.pop("iteration")), {}).update(row)
    return dict(sorted(metrics.items()))


def series(metrics: Metrics, name: str) -> Tuple[List[int], List[float]]:
    """Iterations and values of one scalar, where it was logged."""
    points = [(i, row[name]) for i, row in metrics.items() if name in row]
    return [i for i, _ in points], [value for _, value in points]


def component_names(metrics: Metrics) -> List[str]:
    """The losses that ``total_loss`` is the sum of."""
    return sorted({name for row in metrics.values() for name in row if name.startswith("loss_")})


def watched(metrics: Metrics) -> str:
    """Whose photos were evaluated while training: "dev" where there is a dev set, else "test"."""
    names = set().union(*metrics.values())
    return "dev" if any(name.startswith("dev/") for name in names) else "test"


def plot_losses(metrics: Metrics, known_range: Optional[Tuple[float, float]] = None) -> bytes:
    """Total loss, its components and, where logged, the validation loss.

    Args:
        known_range: values that the total can take, drawn as a band.
    Returns:
        an SVG file, as all plots here; empty if nothing was logged.
    """
    lines = [(name, name[5:], PARTS[i % len(PARTS)], 1.0)
             for i, name in enumerate(component_names(metrics))]  # fmt: skip
    if len(lines) == 1:
        lines = []  # it is the total
    lines.append(("total_loss", "total", BLUE, 2.0))
    lines.append(("val_total_loss", f"total, {watched(metrics)} photos", ORANGE, 2.0))
    return _plot(metrics, lines, "loss", band=known_range, band_label="possible range of the total")


def plot_spread(metrics: Metrics) -> bytes:
    """Spread of the embeddings, 0 (collapsed) to 1, with the level that is warned about."""
    lines = [("embedding_spread", "embeddings", GREEN, 2.0)]
    return _plot(metrics, lines, "spread", (0, 1.05), (0.0, COLLAPSED), "collapsed")


def plot_learning_rate(metrics: Metrics) -> bytes:
    """The highest learning rate of all parameter groups."""
    return _plot(metrics, [("lr", "", PURPLE, 2.0)], "learning rate", (0, None))


def plot_ap(metrics: Metrics) -> bytes:
    """AP of masks and boxes, in percent, at each evaluation: on the dev set where there is one."""
    of = "dev/" if watched(metrics) == "dev" else ""
    lines = [(f"{of}segm/AP", "masks", BLUE, 2.0), (f"{of}bbox/AP", "boxes", ORANGE, 2.0)]
    return _plot(metrics, lines, "AP (%)", (0, None))


def _plot(metrics, lines, ylabel, ylim=(None, None), band=None, band_label="") -> bytes:
    with matplotlib.rc_context({**STYLE, "font.size": 10}):
        figure = Figure(figsize=(5.2, 3.6))
        axes = figure.add_axes((0.14, 0.33, 0.83, 0.6))  # the same in all, so that they line up
        for name, label, color, width in lines:
            x, y = series(metrics, name)
            if x:
                dots = {"marker": "o", "markersize": 4} if len(x) <= 12 else {}
                axes.plot(x, y, color=color, linewidth=width, label=label, **dots)
        if not axes.lines:
            return b""
        if band:
            axes.axhspan(*band, color=GREY, alpha=0.13, linewidth=0, label=band_label, zorder=0)
        axes.set_ylim(*ylim)
        axes.set_xlim(0, None)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("iteration")
        axes.set_ylabel(ylabel)
        tidy(axes)
        handles, labels = axes.get_legend_handles_labels()
        if len(handles) > 1:
            axes.legend(
                handles,
                labels,
                loc="upper left",
                bbox_to_anchor=(-0.02, -0.2),
                ncol=3 if len(handles) > 4 else 2,
                frameon=False,
                fontsize=9.5,
            )
        return svg(figure)


def tidy(axes, values: str = "y") -> None:
    """No frame, and faint lines at the ticks of the axis of ``values``: "y", or "x" where each row
    has a name."""
    axes.spines[["top", "right"]].set_visible(False)
    if values == "x":
        axes.spines.left.set_visible(False)
        axes.tick_params(left=False)
    axes.grid(axis=values, color=GREY, alpha=0.2, linewidth=0.8)
    axes.set_axisbelow(True)


def svg(figure: Figure) -> bytes:
    """The same file whenever it is drawn; call it within the ``rc_context`` of the drawing."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()
