"""The table and the curves of a comparison."""

import json
import re

import pytest

from d2ssl.report import comparison


def top1(after, gain, interval=None):
    return {
        "before": after - gain, "after": after, "range": [after - 0.02, after + 0.02],
        "gain": gain, "interval": interval,
    }  # fmt: skip


def run(method, seed, *losses, failed=None):
    curve = [[100.0 * (i + 1), loss] for i, loss in enumerate(losses)]
    return {"method": method, "seed": seed, "failed": failed, "loss": curve}


@pytest.fixture
def content():
    soco = {
        "method": "SoCo", "seeds": [0, 1, 2], "failed": {}, "loss": [-1.0, -7.25],
        "spread": 0.934, "seconds_per_view": 0.0125, "relative_cost": 1.0,
        "top1": {"fpn": top1(0.5, 0.3, [0.25, 0.35]), "res5": top1(0.4, -0.1, [-0.3, 0.1])},
    }  # fmt: skip
    generative = {
        "method": "Inpainting", "seeds": [0], "failed": {2: "Loss became infinite or NaN"},
        "loss": [0.3, 0.1], "spread": None, "seconds_per_view": None, "relative_cost": None,
        "top1": {"fpn": top1(0.21, 0.01), "res5": top1(0.11, 0.02)},
    }  # fmt: skip
    failed = {
        "method": "MoCo", "seeds": [], "failed": {0: "the queue is too long"},
        "relative_cost": None,
    }  # fmt: skip
    return {
        "command": "tools/compare_methods.py --views 300", "photo_views": 300, "overrides": [],
        "versions": [{"d2ssl": "1", "PyTorch": "2"}], "devices": ["CPU"], "start": "random weights",
        "seeds": [0, 1, 2],
        "retrieval": {"heldout": ["my_val"], "photos": 13, "boxes": 98.5, "chance": 1 / 98.5},
        "methods": [soco, generative, failed],
        "runs": [
            run("SoCo", 0, -1.0, -5.0, -7.0), run("SoCo", 1, -1.0, -6.0, -7.5),
            run("Inpainting", 0, 0.3, 0.2, 0.1), run("Inpainting", 2, failed="NaN"),
            {"method": "MoCo", "seed": 0, "failed": "the queue is too long"},
        ],
    }  # fmt: skip


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table_says_what_was_measured(content):
    head, rule, soco, inpainting, moco = comparison.table(content["methods"]).splitlines()
    assert cells(soco) == [
        "SoCo", "-1 → -7.25", "50.0 [48.0..52.0]", "20.0", "+30.0 [+25.0, +35.0] (n = 3)",
        "40.0 [38.0..42.0]", "-10.0 [-30.0, +10.0] (n = 3)", "12.5 ms, 1.00×", "0.93",
    ]  # fmt: skip
    assert cells(inpainting) == [
        "Inpainting (1 of 2 failed)", "0.3 → 0.1", "21.0", "20.0", "+1.0 (n = 1)",
        "11.0", "+2.0 (n = 1)", "–", "–",
    ]  # fmt: skip
    assert cells(moco) == ["MoCo (1 of 1 failed)", *["–"] * 8]
    assert len(cells(head)) == len(cells(rule)) == 9


def test_page_says_how_to_read_it_and_what_failed(content):
    page = comparison.page(content)
    assert "- Inpainting, seed 2, failed: Loss became infinite or NaN" in page
    assert "- MoCo, seed 0, failed: the queue is too long" in page
    assert "13 photos of my_val" in page and "Chance is 1 %" in page
    assert "300 photo views, from random weights" in page
    assert "    tools/compare_methods.py --views 300\n" in page


def test_files_are_written_whole(content, tmp_path):
    folder = tmp_path / "new" / "folder"
    comparison.write_comparison(str(folder), content)
    assert {path.name for path in folder.iterdir()} == {
        "comparison.json", "comparison.md", "gains.svg", "losses.svg",
    }  # fmt: skip
    kept = json.loads((folder / "comparison.json").read_text())
    assert kept["runs"] == content["runs"] and kept["retrieval"] == content["retrieval"]
    assert (folder / "comparison.md").read_text() == comparison.page(content)


def points(svg, color="#3a87d0"):
    """The curves, each a list of (x, y) on the page; y grows downwards."""
    paths = re.findall(rf'<path d="([^"]+)"[^>]*fill: none; stroke: {color}', svg.decode())
    return [
        [tuple(map(float, p)) for p in re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", d)] for d in paths
    ]


def test_a_line_for_each_finished_run_in_its_method_s_panel(content):
    first, second, inpainting = points(comparison.plot_losses(content["runs"]))
    assert [len(line) for line in (first, second, inpainting)] == [3, 3, 3]
    for line in (first, second, inpainting):
        assert line[0][0] < line[1][0] < line[2][0] and line[0][1] < line[1][1] < line[2][1]
    assert first[0] == second[0] and second[2][1] > first[2][1]  # -7.5 below -7.0
    assert inpainting[0][0] > second[2][0]  # the next panel


def test_many_methods_take_several_rows():
    runs = [run(f"method{i}", 0, 2.0, 1.0) for i in range(9)]
    lines = points(comparison.plot_losses(runs, columns=4))
    assert len(lines) == 9
    assert len({round(line[0][0]) for line in lines}) == 4  # columns
    assert len({round(line[0][1]) for line in lines}) == 3  # rows


def test_gains_are_drawn_with_their_intervals_the_largest_on_top(content):
    svg = comparison.plot_gains(content["methods"])
    for color, soco, inpainting in (
        ("#3a87d0", [25, 35], [1, 1]),
        ("#e08428", [-30, 10], [2, 2]),
    ):
        lower, upper = points(svg, color)  # MoCo failed and is not there
        assert upper[0][1] == upper[1][1] < lower[0][1]
        scale = (lower[0][0] - upper[0][0]) / (inpainting[0] - soco[0])  # on the page, per point
        assert upper[1][0] - upper[0][0] == pytest.approx(scale * (soco[1] - soco[0]), rel=1e-3)
        assert lower[1][0] - lower[0][0] == 0
    assert comparison.plot_gains([]).startswith(b"<?xml")


def test_same_runs_give_the_same_file(content):
    runs = content["runs"]
    assert comparison.plot_losses(runs) == comparison.plot_losses(runs)
