"""Curves: what is read from metrics.json, and what is drawn."""

import json
import re

from d2ssl.report import plots


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return str(path)


def test_last_value_of_a_repeated_iteration_counts(tmp_path):
    path = write(
        tmp_path / "metrics.json",
        [
            {"iteration": 19, "total_loss": 3.0},
            {"iteration": 39, "total_loss": 2.0, "lr": 0.1},
            {"iteration": 59, "total_loss": 1.0},
            # resumed after iteration 29
            {"iteration": 39, "total_loss": 2.5},
            {"iteration": 59, "total_loss": 1.5},
            {"iteration": 59, "segm/AP": 7.0},
        ],
    )
    metrics = plots.read_metrics(path)
    assert plots.series(metrics, "total_loss") == ([19, 39, 59], [3.0, 2.5, 1.5])
    assert plots.series(metrics, "lr") == ([39], [0.1])  # a line adds to an earlier one
    assert plots.series(metrics, "segm/AP") == ([59], [7.0])


def test_iterations_are_in_order(tmp_path):
    rows = [{"iteration": i, "total_loss": float(i)} for i in (99, 19, 59)]
    metrics = plots.read_metrics(write(tmp_path / "metrics.json", rows))
    assert plots.series(metrics, "total_loss") == ([19, 59, 99], [19.0, 59.0, 99.0])


def test_unfinished_line_is_skipped(tmp_path):
    rows = [{"iteration": 19, "total_loss": 3.0}]
    path = write(tmp_path / "metrics.json", rows, tail='{"iteration": 39, "total_lo')
    assert plots.read_metrics(path) == {19: {"total_loss": 3.0}}


def test_no_file_is_no_metrics(tmp_path):
    assert plots.read_metrics(str(tmp_path / "metrics.json")) == {}


def test_nothing_logged_is_no_figure():
    assert plots.plot_losses({}) == b""
    assert plots.plot_ap({19: {"total_loss": 3.0}}) == b""


def test_lines_lie_at_their_values():
    """A falling loss falls on the page (y grows downwards in SVG), at equal steps."""
    metrics = {i: {"total_loss": value} for i, value in ((0, 3.0), (10, 2.0), (20, 1.0))}
    svg = plots.plot_losses(metrics).decode()
    line = next(d for d in re.findall(r'<path d="([^"]+)"[^>]*stroke: #3a87d0', svg))
    points = [tuple(map(float, p)) for p in re.findall(r"[ML] ([\d.]+) ([\d.]+)", line)]
    (x0, y0), (x1, y1), (x2, y2) = points[:3]
    assert x0 < x1 < x2 and y0 < y1 < y2
    assert abs((x2 - x1) - (x1 - x0)) < 0.01 and abs((y2 - y1) - (y1 - y0)) < 0.01


def test_the_dev_set_is_drawn_where_there_is_one():
    test = {"segm/AP": 30.0, "bbox/AP": 20.0}
    dev = {"dev/segm/AP": 30.0, "dev/bbox/AP": 20.0}
    at_the_end = {20: {"segm/AP": 90.0, "bbox/AP": 80.0}}
    with_dev = plots.plot_ap({9: dev, 19: dev, **at_the_end})
    assert with_dev == plots.plot_ap({9: test, 19: test}) != b""
    losses = {"total_loss": 3.0, "val_total_loss": 4.0}
    assert b"total, dev photos" in plots.plot_losses({9: {**losses, **dev}})
    assert b"total, test photos" in plots.plot_losses({9: {**losses, **test}})


def test_same_metrics_give_the_same_file():
    metrics = {19: {"total_loss": 3.0, "loss_a": 1.0, "loss_b": 2.0}}
    assert plots.plot_losses(metrics, (0.0, 8.0)) == plots.plot_losses(metrics, (0.0, 8.0))
