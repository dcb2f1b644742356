"""The figures of a study, from its findings."""

import io
from typing import Dict, List, Optional, Sequence, Tuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from d2ssl.report.plots import BLUE, GREEN, GREY, ORANGE, PARTS, PURPLE, STYLE, svg, tidy

COLORS = (BLUE, ORANGE, GREEN, PURPLE, *PARTS)


LINES = ("-", "--", ":")  # for more arms than colours


def looks(arms: Sequence[str]) -> Dict[str, Dict[str, str]]:
    """Colour and kind of line of each arm, the same in all figures."""
    turns = {arm: divmod(i, len(COLORS)) for i, arm in enumerate(arms)}
    return {
        arm: {"color": COLORS[i], "linestyle": LINES[turn % len(LINES)]}
        for arm, (turn, i) in turns.items()
    }


def plot_efficiency(
    cells: Sequence[dict], arms: Sequence[str], kind: str = "svg", what: str = "segm"
) -> bytes:
    """AP over labels: a line an arm, with the interval of each mean.

    Args:
        cells: see :func:`~d2ssl.study.findings.findings`.
        kind: "svg", transparent; or "png", on white.
    """
    budgets = sorted({cell["budget"] for cell in cells})
    with matplotlib.rc_context({**STYLE, "font.size": 10}):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log", base=2)
        shown = [arm for arm in arms if any(cell["arm"] == arm for cell in cells)]
        for i, arm in enumerate(shown):
            points = sorted((c for c in cells if c["arm"] == arm), key=lambda c: c["budget"])
            # Side by side, or intervals would hide one another.
            x = [c["budget"] * 2 ** (0.05 * (i - (len(shown) - 1) / 2)) for c in points]
            y = [c[what]["mean"] for c in points]
            look = looks(arms)[arm]
            axes.plot(x, y, marker="o", linewidth=1.6, markersize=5, label=arm, **look)
            for at, cell in zip(x, points):
                if cell[what]["interval"]:
                    axes.plot([at, at], cell[what]["interval"], color=look["color"], linewidth=1.2)
        axes.set_xlim(budgets[0] / 1.3, budgets[-1] * 1.3)
        axes.set_xticks(budgets, [str(b) for b in budgets])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("labelled photos")
        axes.set_ylabel(f"{what} AP on the test photos (%)")
        tidy(axes)
        axes.legend(frameon=False, loc="best")
        return svg(figure) if kind == "svg" else _png(figure)


def plot_differences(differences: Sequence[dict], arms: Sequence[str], kind: str = "svg") -> bytes:
    """Segm AP over another arm with its interval, a row a difference, and above it each repeat
    that it is the mean of; empty without any difference.

    Args:
        differences: see :func:`~d2ssl.study.findings.findings`.
        kind: "svg", transparent; or "png", on white.
    """
    rows = list(reversed(differences))
    if not rows:
        return b""
    with matplotlib.rc_context({**STYLE, "font.size": 9}):
        figure = Figure(figsize=(7.2, 0.3 * len(rows) + 0.9), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=GREY, linewidth=0.8)
        for y, row in enumerate(rows):
            color, segm = looks(arms)[row["arm"]]["color"], row["segm"]
            each = [value for _, _, value, _ in row["each"]]
            axes.plot(each, [y + 0.2] * len(each), "o", color=color, alpha=0.5, markersize=4, mew=0)
            if segm["interval"]:
                axes.plot(segm["interval"], [y, y], color=color, linewidth=1.6)
            axes.plot(segm["mean"], y, "o", color=color, markersize=6)
        labels = [f"{r['arm']} over {r['against']}, {r['budget']} labels" for r in rows]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("difference in segm AP")
        tidy(axes, "x")
        return svg(figure) if kind == "svg" else _png(figure)


def plot_panels(
    lines: Dict[int, Dict[str, List[Tuple[float, Optional[float]]]]],
    arms: Sequence[str],
    xlabel: str,
    ylabel: str,
    marker: str = "",
) -> bytes:
    """A panel a budget, a line an arm; SVG, empty where there is nothing to draw.

    Args:
        lines: budget -> arm -> points; a y of None is left out.
        marker: of the points, "o" for a few.
    """
    lines = {budget: of_arm for budget, of_arm in lines.items() if any(of_arm.values())}
    if not lines:
        return b""
    with matplotlib.rc_context({**STYLE, "font.size": 9}):
        figure = Figure(figsize=(max(5.2, 2.7 * len(lines) + 0.6), 2.9), layout="constrained")
        panels = figure.subplots(1, len(lines), sharey=True, squeeze=False)[0]
        for (budget, of_arm), axes in zip(lines.items(), panels):
            for arm, points in of_arm.items():
                points = [p for p in points if p[1] is not None]
                if points:
                    look = looks(arms)[arm]
                    axes.plot(*zip(*points), marker=marker, label=arm, markersize=3.5, **look)
            axes.set_xlim(0, None)
            axes.set_title(f"{budget} labels", fontsize=9)
            axes.xaxis.set_major_locator(MaxNLocator(4))
            axes.set_xlabel(xlabel)
            tidy(axes)
        panels[0].set_ylabel(ylabel)
        panels[0].set_ylim(0, None)
        legends = [axes.get_legend_handles_labels() for axes in panels]
        shown = {
            label: handle for handles, labels in legends for handle, label in zip(handles, labels)
        }
        shown = {arm: shown[arm] for arm in arms if arm in shown}
        figure.legend(
            shown.values(), shown.keys(), loc="outside lower center", ncol=3, frameon=False
        )
        return svg(figure)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=160, facecolor="white")
    return file.getvalue()
