"""Comparison of methods: equal budgets, plain statistics, a command that can be given again."""

import importlib.util
import json
import logging
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2ssl.data.datasets import register_dataset
from d2ssl.errors import D2SSLError
from d2ssl.evaluation import compare, retrieval
from d2ssl.evaluation.retrieval import BoxRetrieval
from tests.conftest import CONFIGS, REPO, TINY

KEYS = {
    **dict(zip(TINY[::2], TINY[1::2])), "SSL.PRECISION": "fp32", "SSL.SOLVER.IMS_PER_BATCH": "2",
}  # fmt: skip
del KEYS["SSL.SOLVER.MAX_ITER"]
STEP = 2 * 3  # photos of an iteration x views of SoCo


def options(*without):
    return [word for key, value in KEYS.items() if key not in without for word in (key, value)]


OPTS = options()


@pytest.fixture(autouse=True)
def one_draw(monkeypatch):
    monkeypatch.setattr(retrieval, "DRAWS", 1)  # enough here, and four times as fast


@pytest.fixture
def method_file(tiny_cfg, tmp_path):
    """Callable: name, lines under SSL -> yaml of a method on the drawn balloons.

    ``tiny_cfg`` registers the set.
    """

    def write(name, *ssl):
        path = tmp_path / f"{name}.yaml"
        path.write_text("\n".join([f"_BASE_: {CONFIGS / 'demo.yaml'}", "SSL:", *ssl]) + "\n")
        return str(path)

    return write


@pytest.fixture
def soco(method_file):
    return method_file("soco", '  METHOD: "SoCo"')


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("tool", REPO / "tools/compare_methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plan(files, output, views=3 * STEP, seeds=(0,), opts=OPTS):
    return compare.plan(files, opts, seeds, views, str(output))


# Planning.


def test_every_run_shows_the_same_number_of_views(soco, method_file, tmp_path):
    small = method_file("small_batch", "  SOLVER: {IMS_PER_BATCH: 2}")  # 16 in demo.yaml
    opts = [*options("SSL.SOLVER.IMS_PER_BATCH"), "SSL.SOLVER.WARMUP_ITERS", "10"]
    runs = plan([soco, small], tmp_path, views=20 * 16 * 3 + 5, seeds=(0, 7), opts=opts)
    assert [(r.method, r.seed) for r in runs] == [
        ("SoCo", 0), ("small_batch", 0), ("SoCo", 7), ("small_batch", 7),
    ]  # fmt: skip
    solvers = [run.cfg.SSL.SOLVER for run in runs[:2]]
    assert [s.MAX_ITER for s in solvers] == [20, 160]
    assert [r.views_per_step for r in runs[:2]] == [48, 6]
    assert [s.WARMUP_ITERS for s in solvers] == [5, 40]  # 10 of the 40 iterations in demo.yaml
    assert runs[2].result_file == str(tmp_path / "SoCo" / "seed7" / "result.json")


def test_the_key_follows_from_all_that_decides_the_outcome(soco, tmp_path):
    def key(output="a", **kwargs):
        return plan([soco], tmp_path / output, **kwargs)[0].key

    reference = key()
    assert key(output="b") == reference
    others = {
        key(seeds=(1,)),
        key(views=5 * STEP),
        key(opts=[*OPTS, "SSL.MOMENTUM", "0.9"]),
        key(opts=[*OPTS, "DATASETS.TEST", "('balloon_demo_train',)"]),
    }
    assert len(others | {reference}) == 5
    photos = DatasetCatalog.get("balloon_demo_val")
    classes = MetadataCatalog.get("balloon_demo_val").thing_classes
    register_dataset("balloon_demo_val", lambda: photos[:3], thing_classes=classes)
    assert key() != reference  # other photos are asked about


@pytest.mark.parametrize("ssl", ["  INPUT: {VIEW_SIZE: 96}", "  PROPOSALS: {MAX_ASPECT: 2.0}"])
def test_only_the_method_may_differ(soco, method_file, tmp_path, ssl):
    opts = options("SSL.INPUT.VIEW_SIZE")
    with pytest.raises(D2SSLError, match="for SoCo and .* for other: only the method may differ"):
        plan([soco, method_file("other", ssl)], tmp_path, opts=opts)


# Statistics.


def test_interval_of_a_mean():
    # Quantiles of Student's t from printed tables: 4.303 for 2 degrees of freedom, 2.776 for 4.
    mean, (low, high) = compare.mean_interval([1.0, 2.0, 3.0])
    assert mean == 2 and low == pytest.approx(2 - 4.303 / math.sqrt(3), abs=1e-3)
    assert high == pytest.approx(2 + 4.303 / math.sqrt(3), abs=1e-3)
    mean, (low, high) = compare.mean_interval([0.0, 0.0, 0.0, 0.0, 10.0])
    assert (mean, high - low) == (2, pytest.approx(2 * 2.776 * math.sqrt(20 / 5), abs=2e-2))
    assert compare.mean_interval([0.3]) == (0.3, None)


def result(method, seed, before=0.1, after=0.2, cost=1.0, spread=0.5, **more):
    return {
        "method": method, "seed": seed, "failed": None, "seconds_per_view": cost, "spread": spread,
        "loss": [[10, 4.0 + seed], [20, 1.0]], "before": {"fpn": before, "res5": 0.0},
        "after": {"fpn": after, "res5": 0.5}, "seconds": 100.0, **more,
    }  # fmt: skip


def test_summary_is_over_the_finished_seeds_and_the_gain_is_paired():
    rows = compare.summarize(
        [
            result("MoCo", 0, before=0.1, after=0.4, cost=3.0),
            result("SoCo", 0, cost=2.0, spread=None),
            result("MoCo", 1, before=0.2, after=0.3, cost=5.0, spread=0.7),
            {"method": "SoCo", "seed": 1, "failed": "Loss became infinite"},
            {"method": "PLSiam", "seed": 0, "failed": "no"},
        ]
    )
    moco, soco, plsiam = rows
    assert moco["seeds"] == [0, 1] and not moco["failed"]
    assert moco["loss"] == [4.5, 1.0] and moco["spread"] == pytest.approx(0.6)
    fpn = moco["top1"]["fpn"]
    assert (fpn["before"], fpn["after"]) == (pytest.approx(0.15), pytest.approx(0.35))
    assert fpn["range"] == [0.3, 0.4] and fpn["gain"] == pytest.approx(0.2)
    half = 12.706 * math.sqrt(0.02 / 2)  # gains 0.3 and 0.1; t of 1 degree of freedom
    assert fpn["interval"] == pytest.approx([0.2 - half, 0.2 + half], abs=1e-3)
    assert moco["top1"]["res5"]["interval"] == [0.5, 0.5]
    assert moco["relative_cost"] == 1.5 and soco["relative_cost"] == 1.0
    assert soco["failed"] == {1: "Loss became infinite"} and soco["spread"] is None
    assert plsiam == {
        "method": "PLSiam", "seeds": [], "failed": {0: "no"}, "relative_cost": None,
    }  # fmt: skip


def test_without_soco_there_is_no_relative_cost():
    assert compare.summarize([result("MoCo", 0)])[0]["relative_cost"] is None


def test_time_left_goes_by_method(soco, method_file, tmp_path):
    runs = plan([soco, method_file("other", "  MOMENTUM: 0.9")], tmp_path, seeds=(0, 1, 2))
    results = [result("SoCo", 0, seconds=100.0), None, None, None, None, None]
    known = [r for r in results if r]
    assert compare.seconds_left(known, runs[1:]) == 500  # other: as SoCo, for want of better
    known.append(result("other", 0, seconds=10.0))
    assert compare.seconds_left(known, runs[2:5]) == 2 * 100 + 10
    assert math.isnan(compare.seconds_left([{"failed": "no"}], runs))
    assert "5 to go, about 8 min" in compare.progress(runs, results, 0)


def test_curve_is_the_mean_over_spans_of_iterations():
    history = [(float(i % 2), i) for i in range(400)]  # 0, 1, 0, 1 ...
    curve = compare.curve(history, views_per_step=5)
    assert len(curve) == compare.CURVE_POINTS == 40
    assert {loss for _, loss in curve} == {0.5}
    assert curve[0][0] == 5.5 * 5 and curve[-1][0] == 395.5 * 5  # iterations 1 to 10, 391 to 400
    assert compare.curve([(3.0, 0), (2.0, 1)], 12) == [[12, 3.0], [24, 2.0]]


# Runs.


def test_a_run_and_its_kept_result(soco, tmp_path):
    """Measured before and after training, repeatable, and kept under its key."""
    (run,) = plan([soco], tmp_path / "a")
    task = BoxRetrieval(run.cfg, run.cfg.DATASETS.TEST)
    level = logging.getLogger().level
    assert compare.finished(run) is None
    found = compare.execute(run, task)
    assert compare.finished(run) == found == json.loads(Path(run.result_file).read_text())
    assert found["iterations"] == 3 and found["photo_views"] == 3 * STEP
    assert [views for views, _ in found["loss"]] == [STEP, 2 * STEP, 3 * STEP]
    assert found["before"] != found["after"]
    assert 0 < found["seconds_per_view"] * STEP < found["seconds"]
    assert 0 < found["spread"] < 2
    assert logging.getLogger().level == level

    left = {path.name for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert {"result.json", "log.txt", "config.yaml", "metrics.json"} <= left
    assert not [name for name in left if name.endswith((".pth", ".tmp", "last_checkpoint"))]
    assert "Weights: none, all random" in Path(run.result_file).with_name("log.txt").read_text()

    (again,) = plan([soco], tmp_path / "b")
    repeated = compare.execute(again, task)
    for name in ("loss", "before", "after", "spread"):
        assert repeated[name] == found[name]

    (longer,) = plan([soco], tmp_path / "a", views=5 * STEP)
    assert compare.finished(longer) is None


def test_a_damaged_result_is_none(soco, tmp_path):
    (run,) = plan([soco], tmp_path)
    os.makedirs(os.path.dirname(run.result_file))
    Path(run.result_file).write_text('{"method": "So')
    assert compare.finished(run) is None


# The command.


def test_the_command_goes_on_after_a_failure_and_repeats_nothing(
    tool, soco, method_file, tmp_path, capsys, monkeypatch
):
    diverging = method_file("diverging", "  SOLVER: {BASE_LR: 1.0e+30, WARMUP_ITERS: 0}")
    opts = options("SSL.SOLVER.WARMUP_ITERS")
    command = [diverging, soco, "--views", str(3 * STEP), "--output", str(tmp_path / "out")]
    command += ["--seeds", "4", *opts]
    tool.run(command)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 runs, 0 of them finished before")
    assert "diverging seed 4 failed: Loss became infinite or NaN" in lines[1]
    assert lines[2].startswith("SoCo seed 4: loss")
    assert lines[3:] == [f"Table: {tmp_path / 'out' / 'comparison.md'}"]

    written = json.loads((tmp_path / "out/comparison.json").read_text())
    failed, row = written["methods"]
    assert (failed["method"], failed["seeds"], list(failed["failed"])) == ("diverging", [], ["4"])
    assert row["seeds"] == [4] and row["top1"]["fpn"]["after"] > 0
    assert written["overrides"] == opts and written["photo_views"] == 3 * STEP
    assert written["retrieval"]["heldout"] == ["balloon_demo_val"]
    page = (tmp_path / "out/comparison.md").read_text()
    assert "- diverging, seed 4, failed: Loss became infinite or NaN" in page

    executed = []

    def execute(run, task):
        executed.append(str(run))
        return {"method": run.method, "seed": run.seed, "key": run.key, "failed": "again"}

    monkeypatch.setattr(compare, "execute", execute)
    tool.run(command)
    assert executed == ["diverging seed 4"]
    assert json.loads((tmp_path / "out/comparison.json").read_text())["methods"][1] == row


def test_overrides_may_stand_behind_the_seeds(tool):
    args = tool.parse_args(["a.yaml", "--seeds", "3", "1", "MODEL.WEIGHTS", "", "b.yaml"])
    assert args.seeds == [3, 1] and args.opts == ["MODEL.WEIGHTS", ""]
    assert args.files == ["a.yaml", "b.yaml"]
    args = tool.parse_args(["a.yaml", "SSL.MOMENTUM", "0.9", "--seeds", "2", "--views", "64"])
    assert (args.seeds, args.views, args.opts) == ([2], 64, ["SSL.MOMENTUM", "0.9"])


@pytest.mark.parametrize(
    "args, message",
    [
        (["absent.yaml"], "absent.yaml: no such file; in that folder there is soco.yaml"),
        (["--views", "5"], "one step of SoCo takes 2 photos with 3 views each; give 6 or more"),
        (["DATASETS.TEST", "()"], "no held-out photos"),
        (["--heldout", "balloon_demo_vla"], "did you mean 'balloon_demo_val'"),
        (["--heldout", "balloon_demo_train"], "8 of 8 held-out photos are also in SSL.DATASETS"),
        (["SSL.METHOD", "SoCko"], "SSL.METHOD SoCko: choose from"),
        (["SSL.METOD", "SoCo"], "SSL.METOD does not exist"),
        (["SSL.ENABLED", "False"], "SSL.ENABLED is False"),
        (
            ["SSL.METHOD", "MoCo", "SSL.QUEUE.SIZE", "4096"],
            "SSL.QUEUE.SIZE 4096: the data set has 8 photos",
        ),
        (["SEED", "3"], "SEED is set by --seeds"),
        (["SSL.SOLVER.MAX_ITER", "3"], "SSL.SOLVER.MAX_ITER is set by --views"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tool, soco, tmp_path, capsys, args, message):
    if args == ["absent.yaml"]:
        args = [str(tmp_path / "absent.yaml")]
    files = [] if args[0].endswith(".yaml") else [soco]
    with pytest.raises(SystemExit) as stopped:
        given = ["--output", str(tmp_path / "out"), "--views", str(STEP), *OPTS]
        tool.run([*files, *given, *args])
    errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    assert stopped.value.code == 2
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "out").exists()


def test_help_needs_no_torch():
    process = subprocess.run(
        [sys.executable, "-X", "importtime", str(REPO / "tools/compare_methods.py"), "--help"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPO)},
    )  # fmt: skip
    assert process.returncode == 0 and "--heldout" in process.stdout
    assert " torch" not in process.stderr
