"""A study's yaml on the drawn balloons of tests/conftest.py."""

import pytest
import yaml

from tests.conftest import CONFIGS, TINY


@pytest.fixture
def write_study(tiny_cfg, tmp_path):
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
