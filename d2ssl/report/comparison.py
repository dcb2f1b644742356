"""What :mod:`d2ssl.evaluation.compare` found, as numbers, a table and loss curves."""

import json
import math
import os
from typing import List, Optional, Sequence

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate

from d2ssl.atomic import atomic_open
from d2ssl.engine.environment import made_by_in_words
from d2ssl.report.plots import BLUE, GREY, ORANGE, STYLE, svg, tidy

COLUMNS = (
    "method", "loss", "top-1 (%)", "start (%)", "gain (points)", "res5: top-1", "res5: gain",
    "cost per view", "spread",
)  # fmt: skip
FEATURES = {"fpn": ("pyramid", BLUE), "res5": ("res5", ORANGE)}
ABSENT = "–"


def write_comparison(folder: str, comparison: dict) -> None:
    """Write ``comparison.json``, ``comparison.md``, ``gains.svg`` and ``losses.svg`` into a folder.

    Args:
        comparison: ``command``, ``versions``, ``devices``, ``start`` (name of the weights),
            ``photo_views``, ``retrieval`` (heldout, photos, boxes, chance), ``methods`` (see
            :func:`~d2ssl.evaluation.compare.summarize`), ``runs`` (see
            :func:`~d2ssl.evaluation.compare.execute`), and whatever else is to be kept.
    """
    os.makedirs(folder, exist_ok=True)
    contents = {
        "comparison.json": json.dumps(comparison, indent=1, allow_nan=False) + "\n",
        "comparison.md": page(comparison),
        "gains.svg": plot_gains(comparison["methods"]).decode(),
        "losses.svg": plot_losses(comparison["runs"]).decode(),
    }
    for name, content in contents.items():
        with atomic_open(os.path.join(folder, name), "w") as file:
            file.write(content)


def page(comparison: dict) -> str:
    """The table in Markdown, with what is needed to read it and to run it again."""
    task, methods = comparison["retrieval"], comparison["methods"]
    notes = [
        f"Each run: at most {comparison['photo_views']} photo views, from {comparison['start']}. "
        f"Seeds: {', '.join(map(str, comparison['seeds']))}.",
        f"**top-1**: share of boxes in {task['photos']} photos of {', '.join(task['heldout'])} "
        "that find themselves in another view among the boxes of all photos, about "
        f"{task['boxes']:.0f}, by features pooled from the pyramid; mean over seeds "
        f"[least..most]. Chance is {100 * task['chance']:.2g} %. "
        "**start**: the same before training. **gain**: the difference, paired by seed, with its "
        "95 % t interval. **res5**: the same with features of the ResNet's last stage.",
        "**loss**: mean of the first and of the last span of the curve; losses of different "
        "methods do not compare, and one with a queue rises while the queue fills. **cost per "
        "view**: time of a quick iteration (one in ten is quicker) per photo view, and as a "
        "multiple of SoCo's. "
        "**spread** of the embeddings at the end: near 1 is healthy, 0 is collapse.",
    ]
    failures = [
        f"- {row['method']}, seed {seed}, failed: {why}"
        for row in methods
        for seed, why in row["failed"].items()
    ]
    parts = [
        "# Pretext methods compared",
        table(methods),
        *(["\n".join(failures)] if failures else []),
        *notes,
        "![Gain in retrieval, a row a method](gains.svg)",
        "![Loss over photo views, a line a seed](losses.svg)",
        f"    {comparison['command']}",
        f"{made_by_in_words(comparison)}.",
    ]
    return "\n\n".join(parts) + "\n"


def table(methods: Sequence[dict]) -> str:
    """One line a method, in Markdown; – where nothing is known."""
    return tabulate(map(_row, methods), COLUMNS, "github", disable_numparse=True)


def _row(method: dict) -> List[str]:
    done, failed = len(method["seeds"]), len(method["failed"])
    name = method["method"] + (f" ({failed} of {done + failed} failed)" if failed else "")
    if not done:
        return [name, *[ABSENT] * (len(COLUMNS) - 1)]
    fpn, res5 = (method["top1"][feature] for feature in FEATURES)
    return [
        name,
        " → ".join(_number(x) for x in method["loss"]),
        _share(fpn, done),
        f"{100 * fpn['before']:.1f}",
        _gain(fpn, done),
        _share(res5, done),
        _gain(res5, done),
        _cost(method),
        _number(method["spread"], ".2f"),
    ]


def _number(value: Optional[float], form: str = ".3g") -> str:
    return ABSENT if value is None else format(value, form)


def _share(top1: dict, runs: int) -> str:
    least, most = (100 * x for x in top1["range"])
    return f"{100 * top1['after']:.1f}" + (f" [{least:.1f}..{most:.1f}]" if runs > 1 else "")


def _gain(top1: dict, runs: int) -> str:
    gain = f"{100 * top1['gain']:+.1f}"
    if top1["interval"] is None:
        return f"{gain} (n = {runs})"
    low, high = (100 * x for x in top1["interval"])
    return f"{gain} [{low:+.1f}, {high:+.1f}] (n = {runs})"


def _cost(method: dict) -> str:
    seconds, relative = method["seconds_per_view"], method["relative_cost"]
    if seconds is None:
        return ABSENT
    return f"{1000 * seconds:.3g} ms" + (f", {relative:.2f}×" if relative else "")


def plot_gains(methods: Sequence[dict]) -> bytes:
    """Gain in top-1 with its interval: a row a method, the largest by the pyramid first; an SVG
    file. Methods without a finished run are left out."""
    methods = sorted((m for m in methods if m["seeds"]), key=lambda m: m["top1"]["fpn"]["gain"])
    with matplotlib.rc_context({**STYLE, "font.size": 9}):
        figure = Figure(figsize=(6.4, 0.28 * len(methods) + 1.0), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=GREY, linewidth=0.8)
        for shift, (feature, (label, color)) in zip((0.15, -0.15), FEATURES.items()):
            for row, method in enumerate(methods):
                gain, interval = (method["top1"][feature][k] for k in ("gain", "interval"))
                low, high = interval or (gain, gain)
                axes.plot([100 * low, 100 * high], [row + shift] * 2, color=color, linewidth=1.4)
                axes.plot(100 * gain, row + shift, "o", color=color, markersize=4,
                          label=None if row else label)  # fmt: skip
        axes.set_yticks(range(len(methods)), [m["method"] for m in methods])
        axes.set_ylim(-0.6, len(methods) - 0.4)
        axes.set_xlabel("gain in top-1 over the untrained trunk, points")
        tidy(axes, "x")
        if methods:
            axes.legend(frameon=False, loc="lower right", labelcolor=GREY)
        return svg(figure)


def plot_losses(runs: Sequence[dict], columns: int = 4) -> bytes:
    """Loss over photo views: a panel a method, a thin line a seed; an SVG file.

    Panels share the axis of views; each has its own axis of losses, which do not compare.
    """
    methods = list(dict.fromkeys(run["method"] for run in runs))
    columns = min(columns, len(methods))
    rows = math.ceil(len(methods) / columns)
    with matplotlib.rc_context({**STYLE, "font.size": 8}):
        figure = Figure(figsize=(2.4 * columns + 0.3, 1.8 * rows + 0.3), layout="constrained")
        panels = figure.subplots(rows, columns, sharex=True, squeeze=False).ravel()
        for i, (method, axes) in enumerate(zip(methods, panels)):
            curves = [r["loss"] for r in runs if r["method"] == method and not r["failed"]]
            for curve in curves:
                dots = {"marker": "o", "markersize": 3} if len(curve) == 1 else {}
                axes.plot(*zip(*curve), color=BLUE, linewidth=0.9, alpha=0.8, **dots)
                axes.yaxis.set_major_locator(MaxNLocator(4))
            if not curves:
                axes.set_yticks([])
                axes.text(0.5, 0.5, "failed", ha="center", transform=axes.transAxes)
            axes.set_title(method, fontsize=9)
            axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
            axes.tick_params(labelbottom=i + columns >= len(methods))  # the lowest of a column
            tidy(axes)
        panels[0].set_xlim(0, None)
        for axes in panels[len(methods) :]:
            axes.set_visible(False)
        figure.supxlabel("photo views", fontsize=9)
        figure.supylabel("loss", fontsize=9)
        return svg(figure)
