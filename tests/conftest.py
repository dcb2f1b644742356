"""Fixtures for all tests."""

import logging
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite runs in one process a core

import pytest  # noqa: E402


@pytest.fixture(autouse=True)
def loggers():
    """Detectron2's ``setup_logger``, which a run calls, keeps messages from whoever comes after."""
    yield
    for name in ("fvcore", "detectron2", "d2ssl"):
        logging.getLogger(name).propagate = True


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data and weights: $D2SSL_SHARED, else ../shared beside the repo."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("D2SSL_SHARED", default))
    if not (folder / "data").is_dir():
        pytest.skip(f"no shared data in {folder} (set D2SSL_SHARED)")
    return folder


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory) -> Path:
    """
    A folder of data sets with a small drawn one: ``balloon_demo``, 8 train and 4 val photos of
    96x128 pixels. :func:`tiny_cfg` registers it.
    """
    from d2ssl.data.datasets.synthetic import write_balloons

    root = tmp_path_factory.mktemp("datasets")
    write_balloons(str(root / "balloon_demo"), num_train=8, num_val=4, size=(96, 128))
    return root


@pytest.fixture
def tiny_cfg(demo_root, tmp_path, monkeypatch):
    """Callable: overrides -> the demo's config at the smallest useful size on ``demo_root``."""
    from d2ssl.config import load_cfg
    from d2ssl.data.datasets import register_balloon
    from d2ssl.engine.auto import resolve_auto

    register_balloon("balloon_demo", demo_root / "balloon_demo")
    monkeypatch.setenv("D2SSL_CACHE", str(demo_root / "cache"))

    def make(*opts, output_dir=None):
        opts = [*TINY, "OUTPUT_DIR", str(output_dir or tmp_path / "out"), *opts]
        return resolve_auto(load_cfg(str(CONFIGS / "demo.yaml"), opts))

    return make


REPO = Path(__file__).resolve().parents[1]
CONFIGS = REPO / "configs"
TINY = """
DATASETS.TRAIN ('balloon_demo_train@4',)
INPUT.MIN_SIZE_TRAIN (64,96) INPUT.MAX_SIZE_TRAIN 128 INPUT.MIN_SIZE_TEST 96 INPUT.MAX_SIZE_TEST 128
SOLVER.IMS_PER_BATCH 2 SOLVER.MAX_ITER 4 SOLVER.STEPS (3,) SOLVER.WARMUP_ITERS 2
SOLVER.CHECKPOINT_PERIOD 2 TEST.EVAL_PERIOD 0
MODEL.ROI_BOX_HEAD.FC_DIM 64 MODEL.FPN.OUT_CHANNELS 32 MODEL.ROI_MASK_HEAD.CONV_DIM 16
MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE 32 MODEL.RPN.POST_NMS_TOPK_TRAIN 100
SSL.INPUT.VIEW_SIZE 64 SSL.INPUT.SMALL_VIEW_SIZE 32 SSL.SOCO.MIN_BOX_SIZE 4 SSL.CALIBRATION_PHOTOS 4
SSL.HEAD.HIDDEN_DIM 32 SSL.HEAD.OUT_DIM 16 SSL.PROPOSALS.SOURCE grid
SSL.SOLVER.IMS_PER_BATCH 4 SSL.SOLVER.MAX_ITER 4 SSL.SOLVER.CHECKPOINT_PERIOD 2
SSL.SOLVER.WARMUP_ITERS 2
""".split()
