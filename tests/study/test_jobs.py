"""Processes that diverge, are interrupted, get a GPU; and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from d2ssl.errors import D2SSLError
from d2ssl.study import conduct, jobs
from d2ssl.study.jobs import Launcher


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
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as behind & in a script
    process = study.run(
        "BUDGETS", "[3]", start=subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    signal.signal(signal.SIGINT, ignored)
    while process.poll() is None and not list((study.folder / "out").glob("runs/*/*/*/lock")):
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "Stopped; the same command goes on from here."
    time.sleep(3)
    left = subprocess.run(["pgrep", "-f", str(study.folder)], capture_output=True, text=True)
    assert not left.stdout.strip()


def test_what_was_begun_otherwise_is_not_gone_on_from(tmp_path):
    """Not even by the command after one that was stopped before it had begun."""
    task = SimpleNamespace(folder=str(tmp_path), key="new")
    (tmp_path / "key").write_text("old")
    left = [tmp_path / "pretrain" / n for n in ("last_checkpoint", "model_pretrained.pth")]
    left[0].parent.mkdir()
    for path in left:
        path.touch()
    assert not jobs._goes_on(task) and not any(path.exists() for path in left)
    left[0].touch()
    assert jobs._goes_on(task) and left[0].exists()


def test_each_process_gets_its_own_of_the_gpus_that_there_are(tmp_path, monkeypatch):
    launcher = Launcher(str(tmp_path), 2, [2, 3])
    assert launcher.call(os.getenv, "CUDA_VISIBLE_DEVICES") == "2"
    assert launcher.call(os.getenv, "CUDA_VISIBLE_DEVICES") == "3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert conduct._gpus() == [4, 6]
    with pytest.raises(D2SSLError, match="a job failed: ZeroDivisionError"):
        Launcher(str(tmp_path), 1).call(divmod, 1, 0)


@pytest.mark.parametrize("number", [1, 3])
def test_a_process_keeps_to_its_threads(number):
    program = (
        f"import cv2, torch; from d2ssl.study.jobs import use_threads; use_threads({number}); "
        "print(torch.get_num_threads(), cv2.getNumThreads())"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.stdout.split() == [f"{number}"] * 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config-file", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["SEEDZ", "3"], "key SEEDZ does not exist; the nearest is SEEDS"),
        (["--slurm", "partition=gpu"], "--slurm needs --cluster slurm"),
        (["--cluster", "slurm", "--slurm", "partition"], "--slurm partition: write KEY=VALUE"),
        (["--report-only"], "out: nothing was run here yet; leave --report-only out"),
        (["--cluster", "slurm", "--jobs", "0"], "--cluster slurm needs --jobs"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(study, arguments, message):
    process = study(*arguments)
    assert process.returncode == 2 and message in process.stderr.splitlines()[-1]
    assert not (study.folder / "out").exists()


def test_without_slurm(study):
    """Whether its commands are not there at all, or there without a cluster behind them."""
    process = study("--cluster", "slurm", "MODEL.DEVICE", "cpu")
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].startswith("error: --cluster slurm: ")
