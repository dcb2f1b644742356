"""What holds for all methods alike: exact resume, any number of processes, the hand-off."""

import json
import os

import pytest
import torch

from d2ssl.config import pretrain_cfg
from d2ssl.data.datasets import register_balloon
from d2ssl.engine.handoff import hand_off
from d2ssl.engine.launch import launch
from d2ssl.engine.pretraining import PretrainTrainer
from d2ssl.modeling.methods import PRETEXT_REGISTRY
from tests.engine.test_trainer import assert_identical, final_state, run_and_stop_at

NAMES = sorted(name for name, _ in PRETEXT_REGISTRY)
SEVERAL = ["SSL.METHODS", '[["SoCo", 1.0], ["PLMoCo", 0.5]]']
CASES = {**{name: ["SSL.METHOD", name] for name in NAMES}, "several": SEVERAL}


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact_and_hands_off(tiny_cfg, tmp_path, case):
    """Stopped in step 3 and resumed from step 2: queue, twins, optimizer and all are the same."""
    cfgs = {d: tiny_cfg(*CASES[case], output_dir=tmp_path / d) for d in ("whole", "parts")}
    whole, parts = (pretrain_cfg(cfg) for cfg in cfgs.values())
    os.makedirs(whole.OUTPUT_DIR), os.makedirs(parts.OUTPUT_DIR)
    PretrainTrainer(whole).train()
    run_and_stop_at(PretrainTrainer(parts), 3)
    resumed = PretrainTrainer(parts, resume=True)
    assert resumed.start_iter == 2
    resumed.train()
    assert_identical(final_state(whole.OUTPUT_DIR), final_state(parts.OUTPUT_DIR))

    record = torch.load(hand_off(cfgs["whole"]), weights_only=True)
    assert "bottom_up" in record["d2ssl"]["trained"]
    assert any(name.startswith("backbone.bottom_up.res2") for name in record["model"])


@pytest.mark.parametrize("name", NAMES)
def test_one_photo_is_enough_where_no_others_are_needed(model_and_batch, name):
    """A loss without negatives is 0, whatever the network makes of the photo."""
    model, batch = model_and_batch(name)
    losses = model([{**item, "index": 0} for item in batch]).values()
    assert any(loss == 0 for loss in losses) == PRETEXT_REGISTRY.get(name).needs_others


# One of each kind: rows gathered with gradient and without, norms with and without weights, labels,
# geometry, a decoder, several at once.
SHARED = ["DetCon", "DenseCL", "SimSiam", "PixPro", "Inpainting", "several"]


def train_all(cfgs):
    register_balloon("balloon_demo", os.path.join(os.environ["TEST_DEMO_ROOT"], "balloon_demo"))
    for cfg in cfgs:
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        PretrainTrainer(cfg).train()


def test_two_processes_equal_one(tiny_cfg, tmp_path, demo_root, monkeypatch):
    """Gathered keys, queues and statistics: all weights, and the first loss."""
    monkeypatch.setenv("TEST_DEMO_ROOT", str(demo_root))
    folders = {}
    for count in (1, 2):
        cfgs = {
            name: pretrain_cfg(
                tiny_cfg(*opts, "SSL.PRECISION", "fp32", "SSL.SOLVER.MAX_ITER", "2",
                         output_dir=tmp_path / str(count) / name)
            )
            for name, opts in ((name, CASES[name]) for name in SHARED)
        }  # fmt: skip
        folders[count] = {name: cfg.OUTPUT_DIR for name, cfg in cfgs.items()}
        launch(train_all, count, args=(list(cfgs.values()),))
    for name in SHARED:
        one, two = (final_state(folders[count][name])["model"] for count in (1, 2))
        assert one.keys() == two.keys()
        for key in one:
            # Rounding alone: norms over few cells enlarge it.
            torch.testing.assert_close(
                one[key], two[key], rtol=2e-3, atol=1e-3, msg=lambda m: f"{name} {key}: {m}"
            )
        losses = [first_loss(folders[count][name]) for count in (1, 2)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4, abs=1e-4), name


def first_loss(folder):
    with open(os.path.join(folder, "metrics.json")) as file:
        return json.loads(file.readline())["total_loss"]
