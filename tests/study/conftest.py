"""A study's yaml on the drawn balloons of tests/conftest.py, and the tool as a user types it."""

import os
import subprocess
import sys

import pytest
import yaml

from tests.conftest import CONFIGS, REPO, TINY

EVIL = """
import os, signal

def die():
    # In the job of one run alone, as the out-of-memory killer would do it.
    if os.path.isfile("victim") and "SUBMITIT_EXECUTOR" in os.environ:
        os.remove("victim")
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def write_yaml(tiny_cfg, tmp_path):
    """Callable: keys of the study -> path of a yaml; arms scratch, soco and longer by default."""
    own = ("DATASETS.TRAIN", "TEST.EVAL_PERIOD")  # the study sets these itself
    common = {k: v for k, v in zip(TINY[::2], TINY[1::2]) if k not in own}

    def write(name="study.yaml", **keys):
        content = {
            "CONFIG": str(CONFIGS / "demo.yaml"),
            "COMMON": {**common, **keys.pop("COMMON", {})},
            "TRAIN": "balloon_demo_train",
            "DEV": 2,
            "BUDGETS": [3, 6, 8],
            "SUBSETS": 2,
            "BASELINE": "scratch",
            "CURVE_POINTS": 2,
            "ARMS": {
                "scratch": {"SSL.ENABLED": False},
                "soco": {"SSL.SOLVER.MAX_ITER": 2},
                "longer": {"FROM": "scratch", "COMPUTE_MATCHED": "soco"},
            },
            **keys,
        }
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return str(path)

    return write


@pytest.fixture
def study(demo_root, tmp_path, write_yaml):
    """Callable: arguments -> finished process of tools/study.py on two budgets and one subset."""
    (tmp_path / "evil.py").write_text(EVIL)
    env = {**os.environ, "DETECTRON2_DATASETS": str(demo_root), "PYTHONPATH": str(REPO),
           "D2SSL_CACHE": str(demo_root / "cache")}  # fmt: skip
    file = write_yaml(BUDGETS=[3, 6], SUBSETS=1, COMMON={"SSL.REGISTER": ["evil:die"]})
    command = [sys.executable, str(REPO / "tools/study.py"), "--config-file", file, "--jobs", "2"]

    def run(*args, start=subprocess.run, **more):
        return start([*command, "--output", "out", *args], env=env, cwd=tmp_path, text=True, **more)

    def finished(*args):
        return run(*args, capture_output=True, timeout=500)

    finished.run, finished.folder = run, tmp_path
    return finished
