"""The tool, as a user types it, with its processes, on a small drawn data set."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from d2ssl.errors import D2SSLError
from d2ssl.study import conduct
from d2ssl.study.jobs import Launcher

REPO = Path(__file__).resolve().parents[2]
EVIL = """
import os, signal

def die():
    # In the job of one run alone, as the out-of-memory killer would do it.
    if os.path.isfile("victim") and "SUBMITIT_EXECUTOR" in os.environ:
        os.remove("victim")
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def study(demo_root, tmp_path, write_study):
    """Callable: arguments -> finished process of tools/study.py on two budgets and one subset."""
    (tmp_path / "evil.py").write_text(EVIL)
    env = {**os.environ, "DETECTRON2_DATASETS": str(demo_root), "PYTHONPATH": str(REPO),
           "D2SSL_CACHE": str(demo_root / "cache")}  # fmt: skip
    file = write_study(BUDGETS=[3, 6], SUBSETS=1, COMMON={"SSL.REGISTER": ["evil:die"]})
    command = [sys.executable, str(REPO / "tools/study.py"), "--config-file", file, "--jobs", "2"]

    def run(*args, start=subprocess.run, **more):
        return start([*command, "--output", "out", *args], env=env, cwd=tmp_path, text=True, **more)

    def finished(*args):
        return run(*args, capture_output=True, timeout=500)

    finished.run, finished.folder = run, tmp_path
    return finished


def lines(text, word):
    return [line for line in text.splitlines() if word in line]


def test_from_the_dry_run_to_the_answer(study):
    """One test, since each step goes on from the one before."""
    out = study.folder / "out"
    process = study("--dry-run")
    assert process.returncode == 0, process.stderr[-3000:]
    assert len(lines(process.stdout, "labels, subset 0, seed 0")) == 6
    assert "7 tasks, 7 to run, 2 at a time: about" in process.stdout
    assert not (out / "runs").exists()
    timing = json.loads((out / "timing.json").read_text())
    assert len(timing) == 2 and all(t["iteration"] > 0 for t in timing.values())

    (study.folder / "victim").touch()
    process = study()
    assert process.returncode == 0, process.stderr[-3000:]
    died = lines(process.stdout, "failed")
    assert died and "its process died" in died[0]
    assert study("--report-only").returncode == 0
    assert "its process died" in (out / "study.html").read_text()  # recorded, not hidden

    process = study()  # what died is tried again, the rest is not
    assert process.returncode == 0, process.stderr[-3000:]
    assert not lines(process.stdout, "failed") and "7 tasks, " in process.stdout
    content = json.loads((out / "study.json").read_text())
    assert not content["failed"] and len(content["runs"]) == 6
    by_arm = {(r["arm"], r["budget"]): r for r in content["runs"]}
    rows = list(csv.DictReader((out / "runs.csv").open()))
    for row in rows:
        run = by_arm[row["arm"], int(row["budget"])]
        assert float(row["segm AP"]) == run["ap"]["segm"] and not row["failed"]
    # The page is one file, and the bulk of a run is removed.
    page = (out / "study.html").read_text()
    assert "soco with 3 labels" in page and 'src="http' not in page
    assert (out / "curve.png").stat().st_size > 5000
    assert not list(out.glob("runs/**/*.pth"))
    assert [p.name for p in out.glob("pretraining/**/*.pth")] == ["model_pretrained.pth"]
    # AP from the matches is that of Detectron2's evaluator on the test set.
    for run in content["runs"]:
        place = f"runs/{run['arm']}/{run['budget']}/subset0-seed0/finetune"
        kept = json.loads((out / place / "results.json").read_text())["results"]
        for what in ("segm", "bbox"):
            assert run["ap"][what] == pytest.approx(kept[what]["AP"] or 0, abs=1e-6)
        names = [json.loads(x) for x in (out / place / "metrics.json").read_text().splitlines()]
        tested = [row["iteration"] for row in names if "segm/AP" in row or "bbox/AP" in row]
        assert len(tested) <= 1  # on the test set once
        assert [point[0] for point in run["curve"]][-1] == run["iterations"]
    # The compute-matched arm spends pretraining's time, the others do not.
    spent = [t["iteration"] for t in timing.values()]
    assert by_arm["longer", 3]["iterations"] in {4 + round(2 * a / b) for a in spent for b in spent}
    assert by_arm["scratch", 3]["iterations"] == by_arm["soco", 3]["iterations"] == 4

    before = (out / "study.html").stat().st_mtime
    process = study("--report-only")
    assert process.returncode == 0 and (out / "study.html").stat().st_mtime > before


def test_a_run_that_diverges_is_recorded_and_not_repeated(study):
    arms = [
        "ARMS",
        "{scratch: {SSL.ENABLED: false}, hot: {SSL.ENABLED: false, SOLVER.BASE_LR: 1e9}}",
    ]
    process = study(*arms, "BUDGETS", "[3]", "DEV", "0")
    assert process.returncode == 0, process.stderr[-3000:]
    assert "SOLVER.BASE_LR is 1000000000.0 in hot and 0.02 in the arm it is" in process.stderr
    assert "hot, 3 labels, subset 0, seed 0: failed: " in process.stdout
    content = json.loads((study.folder / "out" / "study.json").read_text())
    assert [f["arm"] for f in content["failed"]] == ["hot"]
    assert "Lower SOLVER.BASE_LR" in content["failed"][0]["failed"]
    assert "2 tasks, 2 of them done before" in study(*arms, "BUDGETS", "[3]", "DEV", "0").stdout


def test_interrupted_it_stops_its_processes(study):
    process = study.run(
        "BUDGETS", "[3]", start=subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and not list((study.folder / "out").glob("runs/*/*/*/lock")):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "Stopped; the same command goes on from here."
    time.sleep(3)
    left = subprocess.run(["pgrep", "-f", str(study.folder)], capture_output=True, text=True)
    assert not left.stdout.strip()


def test_each_process_gets_its_own_of_the_gpus_that_there_are(tmp_path, monkeypatch):
    launcher = Launcher(str(tmp_path), 2, [2, 3])
    assert launcher.call(os.getenv, "CUDA_VISIBLE_DEVICES") == "2"
    assert launcher.call(os.getenv, "CUDA_VISIBLE_DEVICES") == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert conduct._gpus() == [4, 6]
    with pytest.raises(D2SSLError, match="a job failed: .*division by zero"):
        Launcher(str(tmp_path), 1).call(divmod, 1, 0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-file", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["SEEDZ", "3"], "key SEEDZ does not exist; the nearest is SEEDS"),
        (["--slurm", "partition"], "--slurm partition: write KEY=VALUE"),
        (["--report-only"], "scratch was not begun yet; leave --report-only out"),
        (["--cluster", "slurm", "--jobs", "0"], "--cluster slurm needs --jobs"),
        (["--cluster", "slurm"], "--cluster slurm: "),  # there is none here
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(study, arguments, message):
    process = study(*arguments)
    assert process.returncode == 2 and message in process.stderr.splitlines()[-1]
    assert not (study.folder / "out").exists()
